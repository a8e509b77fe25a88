//! Checkpoints: the optimizer's state in one safetensors file.
//!
//! | where | key | value |
//! |---|---|---|
//! | metadata | `format` | `candle-srkl` |
//! | metadata | `version` | `3`, the version of this layout; 1 and 2 are read too |
//! | metadata | `steps`, `skipped_steps` | the counters, decimal |
//! | metadata | `schedule`, `grad_scale` | f64, the shortest decimal that reads back exactly |
//! | metadata | `lr_schedule` | if one is set, the number of its next step and the schedule: `constant F`, `linear FROM TO STEPS`, `cosine FROM TO STEPS`, `step EVERY GAMMA`, `sequence COUNT` and then for each START and schedule, `product COUNT` and then each schedule; numbers as above |
//! | metadata | `grad_scaler` | if it follows the gradients: steps in a row that were not skipped, steps since the counters were looked at, what `steps` and `skipped_steps` were then, whether a second gradient was infinite since, and whether the next measurement is a repeated one, 0 or 1; decimal |
//! | metadata | `attempts`, `asked`, `draws` | steps so far, skipped ones included; how many of them measured; random vectors drawn; decimal |
//! | metadata | `seed` | the base of the step seeds, decimal |
//! | metadata | `requested`, `blind`, `measured` | whether the next step measures because that was requested, or because a parameter has no estimate; whether its measurement has been taken; 0 or 1 |
//! | metadata | `by_position` | whether names are indices in a list, 0 or 1; without it 0 |
//! | metadata | `parameter.NAME` | dtype, shape and names of its state, for every parameter |
//! | metadata | `fingerprint.NAME` | XXH3 (128 bits, seed 0) of the parameter's bytes, little-endian, as 32 hexadecimal digits; older files have none |
//! | metadata | `place.NAME` | its place in sums over all parameters, decimal; without it that of the optimizer that loads |
//! | metadata | `skipped.NAME` | how often this parameter alone was skipped, decimal |
//! | metadata | `powers.NAME` | products of decays: of the first and second moment and the average, f64 |
//! | metadata | `curvature.NAME` | the estimate of its curvature: mean, row_sum_sq, power, variance, entered, curvature, last, lowest, highest (f64), in_average, infinite, still, measured_at, then the counts taken, nonfinite, unmoved, uninformative, missing, and reach (f64), which older files do not have |
//! | metadata | `trained.NAME` | whether any step has had a gradient for it, 0 or 1 |
//! | metadata | `known.NAME` | whether it has an estimate of its curvature, or the last measurement found no direction to measure along, 0 or 1; older files do not tell |
//! | metadata | `frozen.NAME` | whether it is frozen by itself, 0 or 1; older files do not tell |
//! | tensor | `NAME.STATE` | f32 (f64 for an f64 parameter, bf16 for a packed average), the parameter's shape; STATE is one of `master`, `m`, `v`, `v_max`, `average`, `q` |
//! | tensor | `NAME.m.codes`, `NAME.v.codes` | of a compact moment in place of that: i8, u8, the parameter's shape |
//! | tensor | `NAME.m.exponents`, `NAME.v.exponents` | and for each 256 elements the exponent, u8 |
//! | tensor | `NAME.master.rest` | of a split master: i16, the parameter's shape |

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use candle_core::{CpuStorage, DType, Device, Error, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};
use twox_hash::XxHash3_128;

use crate::backend::masters;
use crate::block::Block;
use crate::compact::kept_m;
use crate::engine::Progress;
use crate::estimate::Estimate;
use crate::file::Target;
use crate::loss_scale::ScalerState;
use crate::lr_schedule::Scheduled;
use crate::optimizer::Srkl;
use crate::params::{Above, Average, ParamsSrkl, check, check_grad_scale};
use crate::ranks::{Claim, Ranks, claim};
use crate::rule::Powers;
use crate::schedule::MeasureState;
use crate::state::{Beside, Format, STATE, Saved, SavedTensor, Slot};

const FORMAT: &str = "candle-srkl";
const VERSION: u64 = 3;

/// A counter from here on is none that `save` has written: no training takes so many steps.
const MOST_COUNTED: u64 = 1 << 62;

impl Srkl {
    /// Writes the state to a safetensors file: master weights, moments, averages and estimates of curvature,
    /// counters, the schedule with its multiplier, and the gradient scale, with where its [`GradScaler`](crate::GradScaler)
    /// is. Save the parameters beside it, for instance by
    /// [`VarMap::save`](candle_nn::VarMap::save); settings ([`ParamsSrkl`](crate::ParamsSrkl)) are not part of it.
    ///
    /// The file is written under a temporary name in the same folder, flushed to the disk and
    /// renamed, so a crash leaves the old file, or the new one, whole. A symbolic link stays, and the file that
    /// it leads to is replaced; permissions are those of the old file. A process that is killed meanwhile
    /// may leave up to two files in that folder whose names begin with `.srkl-` or `.tmp`; they can be deleted.
    ///
    /// If a parameter was written outside of the optimizer since the last step, its master is saved with its value,
    /// as after [`Srkl::sync_master`].
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{Optimizer, VarBuilder, VarMap, linear};
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let folder = folder.path();
    /// let mut varmap = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&varmap, DType::BF16, &Device::Cpu);
    /// linear(4, 2, vb.pp("head"))?;
    /// let mut opt = Srkl::from_varmap(&varmap, ParamsSrkl::reference())?;
    ///
    /// varmap.save(folder.join("model.safetensors"))?;
    /// opt.save(folder.join("optimizer.safetensors"))?;
    ///
    /// // Later, in this order:
    /// varmap.load(folder.join("model.safetensors"))?;
    /// let mut opt = Srkl::from_varmap(&varmap, ParamsSrkl::reference())?;
    /// opt.load(folder.join("optimizer.safetensors"))?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// It takes the memory of the largest tensor in the file, once more.
    ///
    /// # Errors
    ///
    /// Whatever the file system refuses, a path that leads to anything but a regular file, a step that waits
    /// for its measurement, or a learning rate that `step` would refuse; an older file of that name is then
    /// untouched.
    ///
    /// # Several ranks
    ///
    /// All ranks call it, and rank 0 writes the file, at its path. It knows no number of ranks: any number of them, or a single
    /// process, goes on from it with the same bits. Parameters that are not the same on all ranks, since something else has written
    /// to them, are an error.
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        // What `load` would refuse is refused.
        let fits = |scheduled: &Scheduled| self.check_schedule(&scheduled.schedule);
        let fits = self.lr_schedule.as_ref().map_or(Ok(()), fits);
        let ready = fits.and_then(|()| self.scalars()).and_then(|_| self.refuse_pending());
        self.agree_on("save", ready, |(), blocks| Ok(vec![same_parameters(blocks)?]))?;
        let synced = self.sync_master();
        let saved = match (self.rank(), self.sharding_ranks()) {
            (0, None) => synced.and_then(|()| self.write(path)),
            // All ranks have that error.
            (_, Some(_)) if synced.is_err() => return synced,
            (0, Some(ranks)) => {
                let written = self.write(path);
                ranks.broadcast(0, &mut END.to_le_bytes())?;
                written
            }
            (_, Some(ranks)) => ranks.or_abort(self.serve(ranks)),
            (_, None) => synced,
        };
        self.agree_on("save, of a file that is written", saved, |(), _| Ok(vec![]))
    }

    /// The metadata of a checkpoint.
    pub(crate) fn metadata(&self) -> Result<HashMap<String, String>> {
        let mut metadata = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("version".to_string(), VERSION.to_string()),
            ("steps".to_string(), self.steps()?.to_string()),
            ("skipped_steps".to_string(), self.skipped_steps()?.to_string()),
            ("schedule".to_string(), format!("{:?}", self.schedule)),
            ("grad_scale".to_string(), format!("{:?}", self.grad_scale)),
            ("attempts".to_string(), self.measure_state.step_calls.to_string()),
            ("asked".to_string(), self.measure_state.asked.to_string()),
            ("draws".to_string(), self.measure_state.probe_count.to_string()),
            ("seed".to_string(), self.seed.to_string()),
            ("requested".to_string(), (self.measure_state.requested as u8).to_string()),
            ("blind".to_string(), (self.measure_state.blind as u8).to_string()),
            ("measured".to_string(), (self.measure_state.measured as u8).to_string()),
            ("by_position".to_string(), (self.by_position as u8).to_string()),
        ]);
        if let Some(scheduled) = &self.lr_schedule {
            metadata.insert("lr_schedule".to_string(), scheduled.to_text());
        }
        if let Some(scaling) = &self.scaling {
            let numbers = scaling.state.numbers().map(|number| number.to_string());
            metadata.insert("grad_scaler".to_string(), numbers.join(" "));
        }
        let powers = self.engine.powers()?.into_iter().zip(self.engine.estimates()?);
        let numbers = self.engine.outcomes(&self.all)?.into_iter().zip(powers);
        for (place, (block, numbers)) in self.all.blocks.iter().zip(numbers).enumerate() {
            let ((_, skipped), (powers, estimate)) = numbers;
            let name = &block.name;
            let Powers { first, second, average } = powers;
            metadata.insert(format!("parameter.{name}"), description(block));
            metadata.insert(format!("fingerprint.{name}"), fingerprint(&block.var)?);
            metadata.insert(format!("place.{name}"), place.to_string());
            metadata.insert(format!("skipped.{name}"), skipped.to_string());
            metadata.insert(format!("powers.{name}"), format!("{first:?} {second:?} {average:?}"));
            metadata.insert(format!("curvature.{name}"), estimate.to_text());
            metadata.insert(format!("trained.{name}"), (block.trained as u8).to_string());
            metadata.insert(format!("known.{name}"), (block.known as u8).to_string());
            metadata
                .insert(format!("frozen.{name}"), (self.all.is_frozen(block) as u8).to_string());
        }
        Ok(metadata)
    }

    fn write(&self, path: &Path) -> Result<()> {
        let target = Target::of(path).map_err(|e| e.with_path(path))?;
        let metadata = self.metadata()?;
        let failed = Cell::new(None);
        let ranks = self.sharding_ranks();
        let mut tensors = vec![];
        for (number, part) in self.state_parts().into_iter().enumerate() {
            let (name, tensor) = part.tensor();
            tensors.push((name, StateTensor { tensor, part, number, ranks, failed: &failed }));
        }

        let write = |path: &Path| {
            safetensors::serialize_to_file(tensors, Some(metadata), path)?;
            failed.take().map_or(Ok(()), Err)
        };
        target.replace(write).map_err(|e| e.with_path(path))
    }

    /// All parts of the state, in an order that is the same on all ranks.
    pub(crate) fn state_parts(&self) -> Vec<StatePart<'_>> {
        let mut parts = vec![];
        for block in &self.all.blocks {
            for (kind, slot) in block.state.named() {
                let count = slot.format().tensors(kind, &[]).len();
                parts.extend((0..count).map(|part| StatePart { block, kind, slot, part }));
            }
        }
        parts
    }

    /// Gives rank 0 this rank's shards of the state, as it asks for them.
    fn serve(&self, ranks: &Ranks) -> Result<()> {
        let parts = self.state_parts();
        loop {
            let mut number = [0; 8];
            ranks.broadcast(0, &mut number)?;
            match parts.get(u64::from_le_bytes(number) as usize) {
                Some(part) => part.gather(ranks, false).map(|_| ())?,
                None => return Ok(()),
            }
        }
    }

    /// Reads what [`Srkl::save`] wrote, into an optimizer of the same parameters. Training goes on with the same bits
    /// as if it had not been interrupted, given the same settings and, with parameters on a CUDA device, the same
    /// order of parameters. (Otherwise the file restores its own order.)
    ///
    /// Load the model's parameters **first**: masters that do not round to them are an error.
    ///
    /// State in another format ([`StateFormat`](crate::StateFormat), [`MasterWeights::Split`](crate::MasterWeights::Split),
    /// [`AverageFormat`](crate::AverageFormat)) is converted: moments and averages are rounded to nearest, masters keep all of
    /// their bits, but for one f32 number half-way between two of bf16.
    ///
    /// If both optimizers were built with names, state is matched to parameters by name; a parameter without a master
    /// may then have another value than when it was saved. If one of them was built by
    /// [`Srkl::new`](candle_nn::Optimizer::new), which has no names, state is matched by dtype, shape and **value**.
    /// (Older files have no fingerprints of values: there the index in the list counts as a name.)
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is truncated or not of this format, or of a newer version; one whose parameters
    /// differ in name, dtype, shape or kind of state, or whose masters do not round to the parameters; one in which
    /// the match by value is ambiguous. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let loaded = self.read(path).map_err(|e| e.with_path(path));
        self.take("load", loaded, |bytes| hash(bytes), &BTreeMap::new())
    }

    /// Goes on from a checkpoint that has passed all checks, with these `values` of parameters in place of those they have.
    /// `digest` tells whether ranks have the same one.
    pub(crate) fn take<T>(
        &mut self,
        call: &str,
        loaded: Result<(Loaded, T)>,
        digest: impl Fn(&T) -> String,
        values: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let claims = |(_, from): &(Loaded, T), blocks: &[Block]| {
            Ok(vec![claim("what is loaded", digest(from)), same_parameters(blocks)?])
        };
        let (loaded, _) = self.agree_on(call, loaded, claims)?;
        // Nothing below can fail, but for a device that has failed already, or is being captured.
        for block in &self.all.blocks {
            values
                .get(&block.name)
                .map_or(Ok(()), |value| block.var.set(&value.to_device(block.var.device())?))?;
        }
        for (place, loaded) in loaded.blocks.iter().enumerate() {
            loaded.set(&mut self.all.blocks[place])?;
            if let Some(frozen) = loaded.frozen {
                self.all.set_frozen(place, frozen);
            }
        }
        self.schedule = loaded.schedule;
        self.last_schedule = None;
        self.lr_schedule = loaded.lr_schedule;
        self.clear_accumulated();
        match (&mut self.scaling, loaded.scaler) {
            (Some(scaling), None) => {
                scaling.state = ScalerState::after(loaded.steps, loaded.skipped_steps);
            }
            (scaling, saved) => {
                if let (Some(scaling), Some(saved)) = (scaling, saved) {
                    scaling.state = saved;
                }
                self.grad_scale = loaded.grad_scale;
            }
        }
        self.seed = loaded.seed;
        let checked = self.measure_state.checked;
        self.measure_state = MeasureState { checked, ..loaded.measure_state };
        let mut both: Vec<_> = loaded.blocks.into_iter().zip(self.all.blocks.drain(..)).collect();
        // Sums are added, and random vectors drawn, in the order of blocks.
        if self.engine.may_reorder() {
            both.sort_by_key(|(loaded, _)| loaded.place);
        }
        let numbers =
            |(loaded, _): &(LoadedBlock, Block)| (loaded.powers, loaded.estimate, loaded.skipped);
        let (steps, skipped_steps) = (loaded.steps, loaded.skipped_steps);
        let progress =
            Progress { steps, skipped_steps, blocks: both.iter().map(numbers).collect() };
        self.all.blocks.extend(both.into_iter().map(|(_, block)| block));
        self.upload_settings()?;
        self.engine.set_progress(&mut self.all, progress)?;
        self.note_unknown();
        Ok(())
    }
}

impl Srkl {
    /// A checkpoint, and its bytes.
    fn read(&self, path: &Path) -> Result<(Loaded, Vec<u8>)> {
        let bytes = fs::read(path)?;
        let loaded = with_file(&bytes, |source| self.check_source(source))?;
        Ok((loaded, bytes))
    }

    /// What is loaded, checked.
    pub(crate) fn check_source(&self, source: &Source) -> Result<Loaded> {
        self.engine.refuse_capture("loading state")?;
        let params = |block: &Block| self.all.of(block);
        let loaded = Loaded::new(source, &self.all.blocks, self.by_position, params)?;
        for group in &self.all.groups {
            check("schedule, times `lr`", loaded.schedule * group.params.lr, Above::OrZero)
                .map_err(|e| e.context(format!("group `{}`", group.name)))?;
        }
        if let Some(scheduled) = &loaded.lr_schedule {
            self.check_schedule(&scheduled.schedule)?;
        }
        Ok(loaded)
    }
}

/// What rank 0 asks for at last.
const END: u64 = u64::MAX;

/// A tensor of a checkpoint that holds a kind of state of a block, or a part of it.
#[derive(Clone, Copy)]
pub(crate) struct StatePart<'a> {
    pub block: &'a Block,
    pub kind: &'static str,
    pub slot: &'a Slot,
    /// Of the slot's tensors.
    part: usize,
}

impl StatePart<'_> {
    /// Its name, and what it is.
    pub fn tensor(&self) -> (String, SavedTensor) {
        let Self { block, kind, slot, part } = *self;
        let tensor = slot.format().tensors(kind, block.var.dims()).swap_remove(part);
        (format!("{}.{kind}{}", block.name, tensor.suffix), tensor)
    }

    /// The bytes of what is kept here.
    pub fn own(&self) -> Result<Vec<u8>> {
        Ok(self.slot.save()?.parts.swap_remove(self.part))
    }

    /// Those of all ranks, if they are wanted `here`; else each rank has those of one other at a time.
    pub fn gather(&self, ranks: &Ranks, here: bool) -> Result<Vec<u8>> {
        let size = |shard: &Range<usize>| {
            self.slot.format().tensors(self.kind, &[shard.len()])[self.part].bytes()
        };
        let mut whole = vec![];
        ranks.each_shard(self.own()?, self.block.shards.iter().map(size), |bytes| {
            if here {
                whole.extend(bytes);
            }
        })?;
        Ok(whole)
    }
}

/// Where state is loaded from: the contents of a checkpoint.
pub(crate) struct Source<'a> {
    pub metadata: &'a HashMap<String, String>,
    pub tensors: HashMap<String, TensorView<'a>>,
    /// Values that parameters will have then, by name, if not those that they have.
    pub values: Option<&'a BTreeMap<String, Tensor>>,
    /// Whether names tell parameters apart, even where they are places in a list.
    pub by_name: bool,
}

impl<'a> Source<'a> {
    fn tensor(&self, name: &str) -> Option<&TensorView<'a>> {
        self.tensors.get(name)
    }

    /// The parameter that the state must fit.
    fn value<'b>(&'b self, block: &'b Block) -> &'b Tensor {
        let given = self.values.and_then(|values| values.get(&block.name));
        given.unwrap_or(block.var.as_tensor())
    }
}

/// Runs `f` on the contents of a file.
pub(crate) fn with_file<T>(bytes: &[u8], f: impl FnOnce(&Source) -> Result<T>) -> Result<T> {
    let broken = |e| Error::msg(format!("truncated, or not a safetensors file: {e}"));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
    let Some(metadata) = header.metadata() else {
        bail!("not a checkpoint of {FORMAT}: the file has no metadata")
    };
    let tensors = tensors.tensors().into_iter().collect();
    f(&Source { metadata, tensors, values: None, by_name: false })
}

/// The version of a checkpoint with this metadata.
pub(crate) fn version_of(metadata: &HashMap<String, String>) -> Result<u64> {
    match metadata.get("format") {
        Some(format) if format == FORMAT => {}
        format => bail!("not a checkpoint of {FORMAT}: its `format` is {format:?}"),
    }
    let version = number::<u64>(metadata, "version")?;
    match version {
        1..=VERSION => Ok(version),
        version if version > VERSION => {
            bail!("written by a newer {FORMAT}: version {version}, this one reads {VERSION}")
        }
        version => bail!("unknown version {version}"),
    }
}

/// That all ranks have the same parameters.
pub(crate) fn same_parameters(blocks: &[Block]) -> Result<Claim> {
    let fingerprints = blocks.iter().map(|block| fingerprint(&block.var));
    let all: String = fingerprints.collect::<Result<_>>()?;
    Ok(claim("the hash of all parameters", hash(all.as_bytes())))
}

pub(crate) fn hash(bytes: &[u8]) -> String {
    format!("{:032x}", XxHash3_128::oneshot(bytes))
}

/// A checkpoint that has passed all checks.
pub(crate) struct Loaded {
    steps: u64,
    skipped_steps: u64,
    schedule: f64,
    lr_schedule: Option<Scheduled>,
    grad_scale: f64,
    scaler: Option<ScalerState>,
    seed: u64,
    measure_state: MeasureState,
    blocks: Vec<LoadedBlock>,
}

pub(crate) struct LoadedBlock {
    place: u64,
    pub skipped: u64,
    trained: bool,
    /// Older files don't tell these two.
    known: Option<bool>,
    frozen: Option<bool>,
    pub powers: Powers,
    pub estimate: Estimate,
    /// Each kind of state, in order, of the elements that are stepped here.
    state: Vec<Saved>,
}

impl LoadedBlock {
    /// Gives `block` its state.
    pub fn set(&self, block: &mut Block) -> Result<()> {
        for ((_, slot), saved) in block.state.named_mut().zip(&self.state) {
            slot.set(saved)?;
        }
        masters::after_loading(block)?;
        block.trained = self.trained;
        block.known = self.known.unwrap_or(self.estimate.is_known());
        Ok(())
    }
}

impl Loaded {
    fn new<'a>(
        source: &Source,
        blocks: &'a [Block],
        by_position: bool,
        params: impl Fn(&'a Block) -> &'a ParamsSrkl,
    ) -> Result<Self> {
        let metadata = source.metadata;
        let version = version_of(metadata)?;
        let schedule = number(metadata, "schedule")?;
        check("schedule", schedule, Above::OrZero)?;
        let lr_schedule = match metadata.get("lr_schedule") {
            Some(text) => {
                let read: Result<Scheduled> = text.parse();
                Some(read.map_err(|e| e.context(format!("`lr_schedule`: {text:?}")))?)
            }
            None => None,
        };
        let grad_scale = number(metadata, "grad_scale")?;
        check_grad_scale(grad_scale)?;
        let key = "grad_scaler";
        let scaler = match metadata.contains_key(key) {
            true => {
                let saved: [u64; 6] = numbers(metadata, key)?;
                let [.., overflowed, repeats] = saved;
                if saved.iter().any(|count| *count >= MOST_COUNTED) || overflowed.max(repeats) > 1 {
                    bail!("`{key}`: expected four counts and two flags, got {saved:?}")
                }
                Some(ScalerState::from_numbers(saved))
            }
            false => None,
        };

        let names = match_names(blocks, by_position, source)?;
        let load = |(block, name)| load_block(block, name, params(block), version, source);
        let loaded = blocks.iter().zip(names).map(load);
        let step_calls = counter(metadata, "attempts")?;
        let (asked, seed, blind) = match version {
            1 => (step_calls, 0, false),
            _ => (counter(metadata, "asked")?, number(metadata, "seed")?, flag(metadata, "blind")?),
        };
        let measure_state = MeasureState {
            step_calls,
            asked,
            probe_count: counter(metadata, "draws")?,
            requested: flag(metadata, "requested")?,
            blind,
            measured: flag(metadata, "measured")?,
            ..Default::default()
        };
        Ok(Self {
            steps: counter(metadata, "steps")?,
            skipped_steps: counter(metadata, "skipped_steps")?,
            schedule,
            lr_schedule,
            grad_scale,
            scaler,
            seed,
            measure_state,
            blocks: loaded.collect::<Result<_>>()?,
        })
    }
}

/// The name under which the state of each block was saved: its own, unless names are only places in a list.
fn match_names<'a>(
    blocks: &'a [Block],
    by_position: bool,
    source: &'a Source,
) -> Result<Vec<&'a str>> {
    let metadata = source.metadata;
    let saved = metadata.keys().filter_map(|key| key.strip_prefix("parameter."));
    let positions = by_position || optional::<u8>(metadata, "by_position")?.unwrap_or(0) != 0;
    let by_value = positions && !source.by_name;
    let has_values = metadata.keys().any(|key| key.starts_with("fingerprint."));
    if !by_value || !has_values {
        let known: HashSet<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        if let Some(stranger) = saved.filter(|name| !known.contains(name)).min() {
            bail!("the checkpoint has a parameter `{stranger}`, this optimizer has not")
        }
        return Ok(blocks.iter().map(|block| block.name.as_str()).collect());
    }
    match_values(blocks, by_position, source)
}

/// The same where names don't tell: matches by dtype, shape, kind of state, and value. Where all of these are the
/// same, either the state must be too, or the names of our blocks settle it.
fn match_values<'a>(
    blocks: &[Block],
    by_position: bool,
    source: &'a Source,
) -> Result<Vec<&'a str>> {
    let metadata = source.metadata;
    let saved = metadata.keys().filter_map(|key| key.strip_prefix("parameter."));
    let place = |name| Ok((saved_place(metadata, name)?, name));
    let mut saved = saved.map(place).collect::<Result<Vec<(u64, &str)>>>()?;
    saved.sort();
    if saved.len() != blocks.len() {
        bail!(
            "expected the state of {} parameters, the checkpoint has {}",
            blocks.len(),
            saved.len()
        )
    }
    let like = |block: &Block| Ok([description(block), fingerprint(source.value(block))?]);
    let own = blocks.iter().map(like).collect::<Result<Vec<_>>>()?;
    // By description and value, the names that were saved and the places of our blocks.
    let mut alike: BTreeMap<[&str; 2], (Vec<&str>, Vec<usize>)> = BTreeMap::new();
    for (_, name) in saved {
        let description = text(metadata, &format!("parameter.{name}"))?;
        let value = text(metadata, &format!("fingerprint.{name}"))?;
        alike.entry([description, value]).or_default().0.push(name);
    }
    for (i, [description, value]) in own.iter().enumerate() {
        if let Some((saved, own)) = alike.get_mut(&[description.as_str(), value])
            && own.len() < saved.len()
        {
            own.push(i);
            continue;
        }
        let name = &blocks[i].name;
        if !alike.keys().any(|[other, _]| other == description) {
            bail!("parameter `{name}`: expected {description}, the checkpoint has none like it")
        }
        bail!(
            "parameter `{name}`, {description}: the checkpoint has none of its value, by which parameters \
             without names are told (with `Srkl::new` places in a list are all they have); load the \
             model's parameters of the same checkpoint first, or save and load by `Srkl::from_varmap`, \
             which goes by names"
        )
    }
    // There are as many blocks as names, so each name has found its block.
    let mut names = vec![""; blocks.len()];
    for (saved, own) in alike.values() {
        let sure = if saved.iter().all(|name| same_state(source, [saved[0], name])) {
            Some(saved.clone())
        } else {
            let given = |i: &usize| saved.iter().find(|name| **name == blocks[*i].name).copied();
            own.iter().map(given).collect::<Option<_>>().filter(|_| !by_position)
        };
        let Some(sure) = sure else {
            bail!(
                "parameters saved as {saved:?}: their values are equal and their states differ, so nothing \
                 tells whose is whose; build the optimizer by `Srkl::builder`, or `Srkl::from_varmap`, with \
                 the names that these were saved under"
            )
        };
        own.iter().zip(sure).for_each(|(i, name)| names[*i] = name);
    }
    Ok(names)
}

/// Whether it does not matter which of two names a parameter takes its state from.
fn same_state(source: &Source, [a, b]: [&str; 2]) -> bool {
    let entry = |kind, name| source.metadata.get(&format!("{kind}.{name}"));
    let tensor = |kind: &str, name| source.tensor(&format!("{name}.{kind}")).map(|t| t.data());
    let same = |kind: &str| {
        let formats = [DType::F64, DType::BF16].map(|dtype| Format::of(kind, dtype)).concat();
        let parts = formats.into_iter().flat_map(|format| format.tensors(kind, &[]));
        parts
            .map(|part| format!("{kind}{}", part.suffix))
            .all(|part| tensor(&part, a) == tensor(&part, b))
    };
    ["skipped", "powers", "estimate", "curvature", "trained", "known", "frozen"]
        .iter()
        .all(|kind| entry(kind, a) == entry(kind, b))
        && STATE.into_iter().all(same)
}

/// `block` with the state that was saved as `name`.
pub(crate) fn load_block(
    block: &Block,
    name: &str,
    params: &ParamsSrkl,
    version: u64,
    source: &Source,
) -> Result<LoadedBlock> {
    let metadata = source.metadata;
    let expected = description(block);
    match metadata.get(&format!("parameter.{name}")) {
        Some(saved) if *saved == expected => {}
        Some(saved) => bail!("parameter `{name}`: expected {expected}, the checkpoint has {saved}"),
        None => bail!("parameter `{name}`: the checkpoint has none of this name"),
    }
    let skipped = counter(metadata, &format!("skipped.{name}"))?;
    let [first, second, average] = numbers(metadata, &format!("powers.{name}"))?;
    let powers = Powers { first, second, average };
    let counted = matches!(params.average, Some(Average::Polynomial(_)));
    let valid = |power: &f64| (0. ..=1.).contains(power);
    let valid_average =
        if counted { average >= 1. && average.fract() == 0. } else { valid(&average) };
    if ![first, second].iter().all(valid) || !valid_average {
        bail!(
            "`powers.{name}`: expected numbers from 0 to 1 (for a polynomial average a whole one from 1), got {powers:?}"
        )
    }
    let (key, estimate) = match version {
        1 => {
            let key = format!("estimate.{name}");
            let numbers = numbers(metadata, &key)?;
            check_counts(&key, &numbers[3..])?;
            (key, Estimate::from_version_1(numbers, params.curvature))
        }
        _ => {
            let key = format!("curvature.{name}");
            let all = text(metadata, &key)?.split(' ').count();
            let (first, reach) = match all {
                18 => (numbers(metadata, &key)?, 0.),
                _ => {
                    let [first @ .., reach] = numbers::<f64, 19>(metadata, &key)?;
                    (first, reach)
                }
            };
            check_counts(&key, &first[9..])?;
            let [.., infinite, _, _, _, _, _, _, _] = first;
            if infinite > 1. {
                bail!("`{key}`: expected 0 or 1 for whether it is infinite, got {infinite}")
            }
            (key, Estimate::from_numbers(first, reach))
        }
    };
    if !estimate.is_valid(params.curvature) {
        bail!("`{key}`: expected what `save` writes, got {estimate:?}")
    }
    let trained = match version {
        1 => powers != Powers::NONE,
        _ => flag(metadata, &format!("trained.{name}"))?,
    };
    let mut state = load_state(block, name, source)?;
    if block.sharded {
        let own = block.first..block.first + block.n;
        state.iter_mut().for_each(|saved| saved.cut(own.clone()));
    }
    let place = saved_place(metadata, name)?;
    let newer = |kind: &str| {
        let key = format!("{kind}.{name}");
        metadata.contains_key(&key).then(|| flag(metadata, &key)).transpose()
    };
    let (known, frozen) = (newer("known")?, newer("frozen")?);
    Ok(LoadedBlock { place, skipped, trained, known, frozen, powers, estimate, state })
}

/// The state of `block` that was saved as `name`, in the formats that the block has.
fn load_state(block: &Block, name: &str, source: &Source) -> Result<Vec<Saved>> {
    let value = source.value(block);
    let parameter = match block.dtype {
        DType::BF16 => value.flatten_all()?.to_vec1()?,
        _ => vec![],
    };
    let beside = Beside { v: None, parameter: &parameter };
    let mut all = vec![];
    for (kind, slot) in block.state.named() {
        let saved =
            saved_state((block.dtype, block.var.dims()), name, (kind, slot.format()), source)?;
        match (kind, saved.format) {
            ("master", Format::F32) => {
                check_master(&block.name, value, &saved.to_f32(kind, beside)?)?
            }
            ("master", _) => {
                check_parameter(block, name, source)?;
                check_master(&block.name, value, &saved.to_f32(kind, beside)?)?;
            }
            _ => {}
        }
        all.push((kind, slot.format(), saved));
    }
    // Moments are converted together: a compact `m` is in units of `sqrt(v)`.
    let is_moment = |kind: &str| matches!(kind, "m" | "v");
    let mut saved_moments =
        all.iter().filter(|(kind, ..)| is_moment(kind)).map(|(.., saved)| saved.format);
    if let Some(first) = saved_moments.next()
        && let Some(other) = saved_moments.find(|format| *format != first)
    {
        bail!("moments of `{name}`: expected both in one format, got {first:?} and {other:?}")
    }
    let moments = all.iter().any(|(kind, to, saved)| is_moment(kind) && *to != saved.format);
    let second = all.iter().find(|(kind, ..)| moments && *kind == "v");
    let (mut old_v, mut new_v) = (None, None);
    if let Some((kind, to, saved)) = second {
        let values = saved.to_f32(kind, beside)?;
        new_v = Some(Saved::of_f32(*to, kind, &values, beside)?.to_f32(kind, beside)?);
        old_v = Some(values);
    }
    let convert = |(kind, to, saved): (&str, Format, Saved)| {
        if to == saved.format && !(is_moment(kind) && moments) {
            return Ok(saved);
        }
        let mut values = saved.to_f32(kind, Beside { v: old_v.as_deref(), ..beside })?;
        if let ("m", Format::Compact, Some(v)) = (kind, to, &old_v) {
            values.iter_mut().zip(v).for_each(|(m, v)| *m = kept_m(*m, *v));
        }
        Saved::of_f32(to, kind, &values, Beside { v: new_v.as_deref(), ..beside })
    };
    all.into_iter().map(convert).collect()
}

/// The state `kind` that was saved as `name`, in whatever format that is in.
pub(crate) fn saved_state(
    (dtype, dims): (DType, &[usize]),
    name: &str,
    (kind, format): (&str, Format),
    source: &Source,
) -> Result<Saved> {
    let get = |part: &SavedTensor| source.tensor(&format!("{name}.{kind}{}", part.suffix));
    let fits = |part: &SavedTensor| {
        get(part).is_some_and(|t| t.dtype() == part.dtype && t.shape() == part.shape)
    };
    let has = |format: &Format| format.tensors(kind, dims).iter().all(fits);
    let Some(found) = Format::of(kind, dtype).iter().copied().find(has) else {
        let parts = format.tensors(kind, dims);
        let Some(expected) = parts.iter().find(|part| !fits(part)) else {
            bail!("{kind} of `{name}`: the checkpoint has none")
        };
        let Some(tensor) = get(expected) else {
            bail!(
                "{kind} of `{name}`: expected a tensor `{name}.{kind}{}`, the checkpoint has none",
                expected.suffix
            )
        };
        bail!(
            "{kind} of `{name}`: expected {:?} {:?}, got {:?} {:?}",
            expected.dtype,
            expected.shape,
            tensor.dtype(),
            tensor.shape()
        )
    };
    let parts = found.tensors(kind, dims);
    let parts = parts.iter().filter_map(|part| Some(get(part)?.data().to_vec())).collect();
    let saved = Saved { format: found, parts };
    saved.check(kind).map_err(|e| e.context(format!("{kind} of `{name}`")))?;
    Ok(saved)
}

/// A parameter must be the one that its split master was saved with.
fn check_parameter(block: &Block, name: &str, source: &Source) -> Result<()> {
    let saved = text(source.metadata, &format!("fingerprint.{name}"))?;
    if saved != fingerprint(source.value(block))? {
        bail!(
            "master of `{}`: the checkpoint has what the parameter of then lacked to it, and the parameter has \
             another value; load the model's parameters of the same checkpoint first",
            block.name
        )
    }
    Ok(())
}

/// Masters must be those of the parameter.
fn check_master(name: &str, value: &Tensor, master: &[f32]) -> Result<()> {
    let parameter = value.to_device(&Device::Cpu)?;
    if let Some(i) = masters::first_disagreement(&parameter, master)? {
        bail!(
            "master of `{name}`: element {i} ({}) does not round to the parameter's; load the model's \
             parameters of the same checkpoint first",
            master[i]
        )
    }
    Ok(())
}

/// A hash of the bits of a parameter.
pub(crate) fn fingerprint(var: &Tensor) -> Result<String> {
    fn hash<T: Copy, const N: usize>(values: &[T], to_bytes: fn(T) -> [u8; N]) -> String {
        let (mut hasher, mut bytes) = (XxHash3_128::new(), vec![]);
        for values in values.chunks(4096) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|x| to_bytes(*x)));
            hasher.write(&bytes);
        }
        format!("{:032x}", hasher.finish_128())
    }
    let (var, n) = (var.to_device(&Device::Cpu)?, var.elem_count());
    let (storage, _) = var.storage_and_layout();
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(w)) => hash(&w[..n], f32::to_le_bytes),
        Storage::Cpu(CpuStorage::F64(w)) => hash(&w[..n], f64::to_le_bytes),
        Storage::Cpu(CpuStorage::BF16(w)) => hash(&w[..n], bf16::to_le_bytes),
        Storage::Cpu(CpuStorage::F16(w)) => hash(&w[..n], f16::to_le_bytes),
        _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
    })
}

/// What must be equal for a checkpoint to fit a parameter.
pub(crate) fn description(block: &Block) -> String {
    let state: Vec<&str> = block.state.named().map(|(kind, _)| kind).collect();
    let state = if state.is_empty() { "none".to_string() } else { state.join(",") };
    format!("dtype={} shape={:?} state={state}", block.var.dtype().as_str(), block.var.dims())
}

fn text<'a>(metadata: &'a HashMap<String, String>, key: &str) -> Result<&'a str> {
    let Some(text) = metadata.get(key) else { bail!("`{key}` is missing in the metadata") };
    Ok(text)
}

/// The place of a parameter in sums; 0, and so that of its optimizer, for all of an older file.
fn saved_place(metadata: &HashMap<String, String>, name: &str) -> Result<u64> {
    Ok(optional(metadata, &format!("place.{name}"))?.unwrap_or(0))
}

/// A number that older files do not have.
pub(crate) fn optional<T: FromStr>(
    metadata: &HashMap<String, String>,
    key: &str,
) -> Result<Option<T>> {
    metadata.contains_key(key).then(|| number(metadata, key)).transpose()
}

pub(crate) fn number<T: FromStr>(metadata: &HashMap<String, String>, key: &str) -> Result<T> {
    let text = text(metadata, key)?;
    let Ok(number) = text.parse() else { bail!("`{key}` is not a number: {text:?}") };
    Ok(number)
}

/// A counter, with room to count on.
pub(crate) fn counter(metadata: &HashMap<String, String>, key: &str) -> Result<u64> {
    let count = number(metadata, key)?;
    if count >= MOST_COUNTED {
        bail!("`{key}`: expected a number below 2^62, got {count}")
    }
    Ok(count)
}

fn flag(metadata: &HashMap<String, String>, key: &str) -> Result<bool> {
    match number::<u64>(metadata, key)? {
        0 => Ok(false),
        1 => Ok(true),
        other => bail!("`{key}`: expected 0 or 1, got {other}"),
    }
}

/// Counts of an estimate, which were read as all of its numbers are.
fn check_counts(key: &str, counts: &[f64]) -> Result<()> {
    let counts_on = |count: &f64| (0. ..MOST_COUNTED as f64).contains(count) && count.fract() == 0.;
    if let Some(wrong) = counts.iter().find(|count| !counts_on(count)) {
        bail!("`{key}`: expected counts, whole numbers below 2^62, got {wrong}")
    }
    Ok(())
}

/// Several numbers with spaces between them.
fn numbers<T: FromStr, const N: usize>(
    metadata: &HashMap<String, String>,
    key: &str,
) -> Result<[T; N]> {
    let text = text(metadata, key)?;
    let parsed: Option<Vec<T>> = text.split(' ').map(|number| number.parse().ok()).collect();
    match parsed.and_then(|numbers| numbers.try_into().ok()) {
        Some(numbers) => Ok(numbers),
        None => bail!("`{key}`: expected {N} numbers, got {text:?}"),
    }
}

/// State as a safetensors tensor, whose bytes are made when they are written: one tensor at a time.
struct StateTensor<'a> {
    tensor: SavedTensor,
    part: StatePart<'a>,
    /// Its number in [`Srkl::state_parts`].
    number: usize,
    /// If the state is sharded.
    ranks: Option<&'a Ranks>,
    /// Why some bytes could not be read, from a device.
    failed: &'a Cell<Option<Error>>,
}

impl View for StateTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.tensor.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = match self.ranks {
            Some(ranks) => ranks
                .or_abort(ranks.broadcast(0, &mut (self.number as u64).to_le_bytes()))
                .and_then(|()| ranks.or_abort(self.part.gather(ranks, true))),
            None => self.part.own(),
        };
        Cow::Owned(match bytes {
            Ok(bytes) => bytes,
            Err(e) => {
                self.failed.set(Some(e));
                vec![0; self.data_len()]
            }
        })
    }
    fn data_len(&self) -> usize {
        self.tensor.bytes()
    }
}
