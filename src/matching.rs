//! Checkpoints that are loaded in part.

use std::fs;
use std::path::Path;

use candle_core::{Result, bail};

use crate::block::Block;
use crate::checkpoint::{
    LoadedBlock, Source, counter, description, hash, load_block, optional, same_parameters,
    version_of, with_file,
};
use crate::engine::Progress;
use crate::optimizer::Srkl;
use crate::ranks::claim;
use crate::snapshot::SrklState;

/// What was loaded of a checkpoint, and what was not: see [`Srkl::load_matching`]. Names are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "it tells what was not loaded"]
#[non_exhaustive]
pub struct LoadReport {
    /// The parameters whose state was taken.
    pub taken: Vec<String>,
    /// Those that the optimizer has, and the checkpoint has not: their state is as it was.
    pub missing: Vec<String>,
    /// Those that the checkpoint has, and the optimizer has not.
    pub left: Vec<String>,
    /// Those that both have, in another dtype, shape or kind of state, and what differs: their state is as it was.
    pub mismatched: Vec<(String, String)>,
}

/// The state for each block that has some, by place.
type Found = Vec<Option<LoadedBlock>>;

impl Srkl {
    /// Takes from a checkpoint the state of the parameters that have the same name, dtype, shape and kinds of state there, and
    /// leaves that of the others as it is: a model that is trained further with another head.
    ///
    /// Load the model's parameters **first**, as for [`Srkl::load`]. State in another format is converted. Counters, schedule,
    /// gradient scale, seed and what is [frozen](Srkl::freeze) stay those of this optimizer.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let var = |n: usize| Var::ones(n, DType::F32, &Device::Cpu);
    /// let named = |body: &Var, head: &Var| [("body".to_string(), body.clone()), ("head".to_string(), head.clone())];
    /// let adamw = || Srkl::builder().default_group(ParamsSrkl::adamw(0.1));
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("optimizer.safetensors");
    /// let (body, head) = (var(3)?, var(5)?);
    /// let mut opt = adamw().build(named(&body, &head))?;
    /// opt.backward_step(&(body.sqr()?.sum_all()? + head.sqr()?.sum_all()?)?)?;
    /// opt.save(&path)?;
    ///
    /// let mut tuned = adamw().build(named(&body, &var(2)?))?;
    /// let report = tuned.load_matching(&path)?;
    /// assert_eq!(report.taken, ["body"]);
    /// assert_eq!(report.mismatched[0].0, "head");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is truncated or not of this format, or of a newer version; state that is not as
    /// [`Srkl::save`] writes it; masters that do not round to their parameters; a step that waits for its measurement; names that
    /// are places in a list ([`Srkl::new`](candle_nn::Optimizer::new)), here or there. Nothing has changed then.
    pub fn load_matching(&mut self, path: impl AsRef<Path>) -> Result<LoadReport> {
        let path = path.as_ref();
        let read = || {
            let bytes = fs::read(path)?;
            Ok((with_file(&bytes, |source| self.matching(source))?, hash(&bytes)))
        };
        let found = read().map_err(|e: candle_core::Error| e.with_path(path));
        self.take_matching("load_matching", found)
    }

    /// The same from a state in memory.
    ///
    /// # Errors
    ///
    /// As [`Srkl::load_matching`], but for those of a file.
    pub fn load_state_matching(&mut self, state: &SrklState) -> Result<LoadReport> {
        let found = state.source().and_then(|source| self.matching(&source));
        let digest = if self.ranks.is_some() { state.digest() } else { String::new() };
        self.take_matching("load_state_matching", found.map(|found| (found, digest)))
    }

    /// What of `source` fits this optimizer.
    fn matching(&self, source: &Source) -> Result<(Found, LoadReport)> {
        let metadata = source.metadata;
        self.refuse_pending()?;
        self.engine.refuse_capture("loading state")?;
        let version = version_of(metadata)?;
        let places = optional::<u8>(metadata, "by_position")?.unwrap_or(0) != 0;
        if self.by_position || places {
            bail!(
                "parameters without names can't be matched in part (with `Srkl::new` places in a list are all they \
                 have); build the optimizer by `Srkl::builder` or `Srkl::from_varmap`, when saving too"
            )
        }
        // Measurements keep their age.
        let then = counter(metadata, "steps")? + counter(metadata, "skipped_steps")?;
        let now = self.steps()? + self.skipped_steps()?;
        let (mut all, mut report) = (vec![], LoadReport::default());
        for block in &self.all.blocks {
            let (name, expected) = (&block.name, description(block));
            let found = match metadata.get(&format!("parameter.{name}")) {
                Some(saved) if *saved == expected => {
                    let params = self.all.of(block);
                    let mut found = load_block(block, name, params, version, source)?;
                    let age = then.saturating_sub(found.estimate.measured_at);
                    found.estimate.measured_at = now.saturating_sub(age);
                    report.taken.push(name.clone());
                    Some(found)
                }
                Some(saved) => {
                    let reason = format!("expected {expected}, the checkpoint has {saved}");
                    report.mismatched.push((name.clone(), reason));
                    None
                }
                None => {
                    report.missing.push(name.clone());
                    None
                }
            };
            all.push(found);
        }
        let known = |name: &&str| self.all.blocks.iter().any(|block| block.name == *name);
        let saved = metadata.keys().filter_map(|key| key.strip_prefix("parameter."));
        report.left = saved.filter(|name| !known(name)).map(str::to_string).collect();
        for names in [&mut report.taken, &mut report.missing, &mut report.left] {
            names.sort_unstable();
        }
        report.mismatched.sort_unstable();
        Ok((all, report))
    }

    fn take_matching(
        &mut self,
        call: &str,
        found: Result<((Found, LoadReport), String)>,
    ) -> Result<LoadReport> {
        let found = found.and_then(|found| Ok((found, self.progress()?)));
        let claims = |((_, digest), _): &((_, String), _), blocks: &[Block]| {
            Ok(vec![claim("what is loaded", digest), same_parameters(blocks)?])
        };
        let (((found, report), _), mut progress) = self.agree_on(call, found, claims)?;
        let every = self.all.blocks.iter_mut().zip(&mut progress.blocks).zip(found);
        for ((block, numbers), found) in every {
            if let Some(found) = found {
                found.set(block)?;
                *numbers = (found.powers, found.estimate, found.skipped);
            }
        }
        self.engine.set_progress(&mut self.all, progress)?;
        self.note_unknown();
        Ok(report)
    }

    /// What the engine would go on from.
    pub(crate) fn progress(&self) -> Result<Progress> {
        let counters = self.engine.counters()?;
        let numbers = self.engine.powers()?.into_iter().zip(self.engine.estimates()?);
        let all = numbers.zip(self.engine.outcomes(&self.all)?);
        let blocks = all.map(|((powers, estimate), (_, skipped))| (powers, estimate, skipped));
        Ok(Progress {
            steps: counters.steps,
            skipped_steps: counters.skipped_steps,
            blocks: blocks.collect(),
        })
    }
}
