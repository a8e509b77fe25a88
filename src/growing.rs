//! Parameters that an optimizer gets or loses while it lives.

use std::collections::{HashMap, HashSet};

use candle_core::{Result, TensorId, Var, bail};

use crate::block::Block;
use crate::builder::{Parameter, engine_of, matrices_of};
use crate::engine::Progress;
use crate::estimate::Estimate;
use crate::matrices::hidden_matrices;
use crate::optimizer::Srkl;
use crate::rule::Powers;
use crate::schedule::MeasureSchedule;

impl Srkl {
    /// Adds parameters to a group that the optimizer was built with, behind all others: layers that a model grows, or an
    /// embedding for new tokens. They start as in a new optimizer; the state of the others and all counters stay. Integers are left
    /// out.
    ///
    /// In a group of [`Direction::Muon`](crate::Direction::Muon) those that [`hidden_matrices`] takes for matrices are
    /// orthogonalised. If the group measures curvature, the next step measures. What the last step did
    /// ([`telemetry`](Srkl::telemetry), [`grad_norm`](Srkl::grad_norm)) is forgotten.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{DEFAULT_GROUP, ParamsSrkl, Srkl};
    ///
    /// let (a, b) = (Var::new(1f32, &Device::Cpu)?, Var::new(1f32, &Device::Cpu)?);
    /// let mut opt = Srkl::builder()
    ///     .default_group(ParamsSrkl::adamw(0.1))
    ///     .build([("a".to_string(), a.clone())])?;
    /// opt.backward_step(&a.sqr()?)?;
    ///
    /// opt.add_parameters(DEFAULT_GROUP, [("b".to_string(), b.clone())])?;
    /// opt.backward_step(&(a.sqr()? + b.sqr()?)?)?;
    /// assert!(b.to_scalar::<f32>()? < 1.);
    ///
    /// opt.remove_parameters(|name| name == "a")?;
    /// opt.backward_step(&b.sqr()?)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No group of that name; a name or a variable that the optimizer has already, or twice; a variable that
    /// [`SrklBuilder::build`](crate::SrklBuilder::build) refuses; a step that waits for its measurement; micro-batches that
    /// have been [accumulated](Srkl::accumulate); a step that has been captured in a CUDA graph, whose replays would not know of it; several ranks. Nothing has changed then.
    pub fn add_parameters(
        &mut self,
        group: &str,
        named: impl IntoIterator<Item = (String, Var)>,
    ) -> Result<()> {
        self.refuse_change("add_parameters")?;
        let Some(whole) = self.all.groups.iter().position(|g| g.name == group) else {
            bail!("no parameter group `{group}`")
        };
        let beside = self.all.groups.iter().position(|g| g.name == group && g.beside_muon);
        let blocks = &self.all.blocks;
        let mut ids: HashMap<TensorId, String> =
            blocks.iter().map(|block| (block.id, block.name.clone())).collect();
        let of_block = |block: &Block| [vec![block.name.clone()], block.tied.clone()].concat();
        let mut names: HashSet<String> = blocks.iter().flat_map(of_block).collect();
        let before = blocks.iter().map(|block| block.place + 1).max().unwrap_or(0);
        let mut added = vec![];
        for (name, var) in named.into_iter().filter(|(_, var)| var.dtype().is_float()) {
            if !names.insert(name.clone()) {
                bail!("two parameters are named `{name}`")
            }
            if let Some(other) = ids.insert(var.id(), name.clone()) {
                bail!("`{name}` and `{other}` are the same variable, which would be stepped twice")
            }
            let matrices = match beside {
                Some(_) => matrices_of(&name, &[], &var, group, &hidden_matrices)?,
                None => None,
            };
            let group = match (matrices, beside) {
                (None, Some(beside)) => beside,
                _ => whole,
            };
            let place = before + added.len();
            let parameter = Parameter { name, tied: vec![], var, group, matrices, place };
            added.push(parameter.block(&self.all.groups[group].params, None)?);
        }
        if added.is_empty() {
            return Ok(());
        }
        let mut progress = self.progress()?;
        progress.blocks.extend(added.iter().map(|_| (Powers::NONE, Estimate::NONE, 0)));
        let before = self.all.blocks.len();
        self.all.blocks.extend(added);
        if let Err(e) = self.rebuild(progress) {
            self.all.blocks.truncate(before);
            self.all.note_blocks();
            return Err(e);
        }
        let added = &self.all.groups[whole].params;
        self.measure_state.blind |= MeasureSchedule::measures(added);
        Ok(())
    }

    /// Drops the parameters for which `which` is true of any of their names, and their state. The state of the others and all
    /// counters stay. Returns the names of what was dropped. What the last step did is forgotten.
    ///
    /// The bits of the others are those without what was dropped, if neither sums over all parameters nor random numbers enter: those
    /// of random rounding and of [`Curvature::Hutchinson`](crate::Curvature::Hutchinson) go by places in the list.
    ///
    /// # Errors
    ///
    /// `which` is true for none of the parameters; a step that waits for its measurement; micro-batches that have been
    /// [accumulated](Srkl::accumulate); a step that has been captured in a CUDA graph; several ranks. Nothing has changed then.
    pub fn remove_parameters(&mut self, which: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        self.refuse_change("remove_parameters")?;
        let chosen = self.named_by("remove_parameters", which)?;
        let mut progress = self.progress()?;
        let mut kept = chosen.iter();
        progress.blocks.retain(|_| kept.next() != Some(&true));
        let (mut left, mut removed) = (vec![], vec![]);
        for (block, chosen) in self.all.blocks.drain(..).zip(&chosen) {
            if *chosen { &mut removed } else { &mut left }.push(block);
        }
        self.all.blocks = left;
        if let Err(e) = self.rebuild(progress) {
            let (mut left, mut removed) = (self.all.blocks.drain(..), removed.into_iter());
            let next = |chosen: bool| if chosen { removed.next() } else { left.next() };
            let all = chosen.into_iter().filter_map(next).collect();
            drop(left);
            self.all.blocks = all;
            self.all.note_blocks();
            return Err(e);
        }
        removed.sort_by_key(|block| block.place);
        Ok(removed.into_iter().map(|block| block.name).collect())
    }

    /// An error if the list of parameters can't change now.
    fn refuse_change(&self, call: &str) -> Result<()> {
        if self.ranks.is_some() {
            bail!(
                "`{call}`: the parameters of several ranks stay as they are; build other optimizers"
            )
        }
        if self.engine.is_captured()? {
            bail!(
                "`{call}`: a step of this optimizer has been captured in a CUDA graph, which has the addresses of \
                 its parameters; build another optimizer, and go on by `state` and `load_state_matching`"
            )
        }
        if self.accumulated.count > 0 {
            bail!(
                "`{call}`: {} micro-batches have been accumulated, by the parameters as they are; call \
                 `step_accumulated` first",
                self.accumulated.count
            )
        }
        self.refuse_pending()
    }

    /// Replaces the engine by one for the list of blocks as it is now, which goes on from `progress`.
    fn rebuild(&mut self, progress: Progress) -> Result<()> {
        let scalars = self.scalars()?;
        self.all.note_blocks();
        let mut engine = engine_of(&mut self.all, None)?;
        engine.upload_settings(&self.all, scalars)?;
        engine.set_progress(&mut self.all, progress)?;
        self.engine = engine;
        Ok(())
    }
}
