//! The optimizer's state in memory: [`SrklState`], [`Snapshot`], and copies of an optimizer.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, TensorId, Var, bail};
use candle_nn::VarMap;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use twox_hash::XxHash3_128;

use crate::block::{Block, Parameters};
use crate::builder::{Parameter, engine_of, variables_of};
use crate::checkpoint::{Loaded, Source, fingerprint, saved_state, version_of, with_file};
use crate::micro_batches::Accumulated;
use crate::optimizer::Srkl;
use crate::ranks::claim;
use crate::schedule::MeasureState;
use crate::state::{Beside, Format, STATE, Saved, SavedTensor};

/// The state of an optimizer in memory: what [`Srkl::save`] writes to a file, as named tensors and metadata. Made by
/// [`Srkl::state`], taken by [`Srkl::load_state`]. It does not change with the optimizer; clones share its memory, which is the
/// host's.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use candle_srkl::{ParamsSrkl, Srkl, SrklState};
///
/// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let mut opt = Srkl::builder()
///     .default_group(ParamsSrkl::adamw(0.1))
///     .build([("w".to_string(), w.clone())])?;
/// opt.backward_step(&w.sqr()?.sum_all()?)?;
///
/// let state = opt.state()?;
/// let m = state.get("w", "m")?.expect("Adam has a first moment");
/// assert!((m.to_vec1::<f32>()?[0] - 0.2).abs() < 1e-6); // 0.1 times the gradient.
///
/// // A file format of your own has these bytes, or `metadata` and `tensors`.
/// let bytes = state.to_safetensors()?;
/// opt.load_state(&SrklState::from_safetensors(&bytes)?)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct SrklState {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Arc<Raw>>,
    /// Of the optimizer that it was made by, the variables by name.
    variables: HashMap<String, TensorId>,
}

/// A tensor as a file has it, little-endian.
struct Raw {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Raw {
    fn view(&self) -> Result<TensorView<'_>> {
        Ok(TensorView::new(self.dtype, self.shape.clone(), &self.bytes)?)
    }
}

impl SrklState {
    /// The bytes of the file that [`Srkl::save`] would write: see there.
    ///
    /// # Errors
    ///
    /// None.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let views = self.tensors.iter().map(|(name, raw)| Ok((name, raw.view()?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        Ok(safetensors::serialize(views, Some(self.metadata.clone()))?)
    }

    /// Reads what [`to_safetensors`](Self::to_safetensors) or [`Srkl::save`] wrote.
    ///
    /// # Errors
    ///
    /// Bytes that are truncated or not of this format, or of a newer version. Whether the state fits an optimizer is seen by
    /// [`Srkl::load_state`].
    pub fn from_safetensors(bytes: &[u8]) -> Result<Self> {
        with_file(bytes, |source| {
            version_of(source.metadata)?;
            let raw = |(name, view): (&String, &TensorView)| {
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                (name.clone(), Arc::new(Raw { dtype, shape, bytes: view.data().to_vec() }))
            };
            Ok(Self {
                metadata: source.metadata.clone(),
                tensors: source.tensors.iter().map(raw).collect(),
                variables: HashMap::new(),
            })
        })
    }

    /// Counters, settings of the step and what is known of each parameter, as texts: the metadata of the file.
    #[must_use]
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// All tensors as they are kept, by their names in the file: `NAME.m`, `NAME.master`, and so on. Those of compact moments
    /// are their codes and exponents; the codes of `m`, which are i8 in the file, are given as u8 of the same bits.
    ///
    /// # Errors
    ///
    /// None.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let tensor = |(name, raw): (&String, &Arc<Raw>)| {
            let dtype = match raw.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F64 => DType::F64,
                Dtype::BF16 => DType::BF16,
                Dtype::I16 => DType::I16,
                Dtype::U8 | Dtype::I8 => DType::U8,
                dtype => bail!("`{name}`: no state is of {dtype:?}"),
            };
            let tensor = Tensor::from_raw_buffer(&raw.bytes, dtype, &raw.shape, &Device::Cpu)?;
            Ok((name.clone(), tensor))
        };
        self.tensors.iter().map(tensor).collect()
    }

    /// The state of what [`metadata`](Self::metadata) and [`tensors`](Self::tensors) gave.
    ///
    /// # Errors
    ///
    /// Metadata that are not of this format, or of a newer version, and a tensor of a dtype that no state has. Whether the state
    /// fits an optimizer is seen by [`Srkl::load_state`].
    pub fn from_tensors(
        metadata: HashMap<String, String>,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<Self> {
        version_of(&metadata)?;
        let raw = |(name, tensor): (String, Tensor)| {
            let raw = raw_of(&name, &tensor)?;
            Ok((name, Arc::new(raw)))
        };
        let tensors = tensors.into_iter().map(raw).collect::<Result<_>>()?;
        Ok(Self { metadata, tensors, variables: HashMap::new() })
    }

    /// The names of the parameters that it has the state of, sorted.
    #[must_use]
    pub fn parameters(&self) -> Vec<&str> {
        let names = self.metadata.keys().filter_map(|key| key.strip_prefix("parameter."));
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        names
    }

    /// The numbers of a kind of state of a parameter, in its shape and on the CPU: `m` and `v`, the moments, without bias
    /// corrections; `v_max`, the largest `v` so far ([`Direction::AmsGrad`](crate::Direction::AmsGrad)); `master`; `average`; `q`, the squared row norms of
    /// [`Curvature::Hutchinson`](crate::Curvature::Hutchinson). They are f32, of packed state too; f64 for an f64 parameter.
    /// `None` for an unknown parameter and for state that it does not have.
    ///
    /// # Errors
    ///
    /// Another name of a kind of state; tensors that are not as [`Srkl::save`] writes them; `master` of
    /// [`MasterWeights::Split`](crate::MasterWeights::Split), of which the state has the lower half alone (the upper one is the
    /// parameter): [`Srkl::state_of`] has it.
    pub fn get(&self, parameter: &str, kind: &str) -> Result<Option<Tensor>> {
        check_kind(kind)?;
        let Some((dtype, saved, shape)) = self.saved(parameter, kind)? else { return Ok(None) };
        if saved.format == Format::Split {
            bail!(
                "master of `{parameter}`: the state has its lower half alone, the upper one is the parameter; use `state_of` \
                 of the optimizer"
            )
        }
        let v = match kind {
            "m" if saved.format == Format::Compact => self.saved(parameter, "v")?,
            _ => None,
        };
        if let Some((_, _, of_v)) = &v
            && *of_v != shape
        {
            bail!("`{parameter}`: `m` has shape {shape:?}, and `v` {of_v:?}")
        }
        decoded(kind, &saved, v.as_ref().map(|(_, v, _)| v), (dtype, &shape, &[])).map(Some)
    }

    /// The dtype of a parameter, a kind of its state and the shape of that.
    fn saved(&self, parameter: &str, kind: &str) -> Result<Option<(DType, Saved, Vec<usize>)>> {
        let Some(description) = self.metadata.get(&format!("parameter.{parameter}")) else {
            return Ok(None);
        };
        let dtype = description.split(' ').find_map(|part| part.strip_prefix("dtype="));
        let dtype = dtype.and_then(|dtype| dtype.parse::<DType>().ok());
        let Some(dtype) = dtype else {
            bail!("`parameter.{parameter}`: expected what `save` writes, got {description:?}")
        };
        let first = |format: &Format| {
            let first = format.tensors(kind, &[]).swap_remove(0);
            let raw = self.tensors.get(&format!("{parameter}.{kind}{}", first.suffix))?;
            Some((*format, raw.shape.clone()))
        };
        let Some((format, shape)) = Format::of(kind, dtype).iter().find_map(first) else {
            return Ok(None);
        };
        let source = self.source()?;
        let saved = saved_state((dtype, &shape), parameter, (kind, format), &source)?;
        Ok(Some((dtype, saved, shape)))
    }

    /// It as what state is loaded from.
    pub(crate) fn source(&self) -> Result<Source<'_>> {
        let views = self.tensors.iter().map(|(name, raw)| Ok((name.clone(), raw.view()?)));
        let tensors = views.collect::<Result<_>>()?;
        Ok(Source { metadata: &self.metadata, tensors, values: None, by_name: false })
    }

    /// By which ranks tell whether they have the same.
    pub(crate) fn digest(&self) -> String {
        let mut hasher = XxHash3_128::new();
        let metadata: BTreeMap<_, _> = self.metadata.iter().collect();
        hasher.write(format!("{metadata:?}").as_bytes());
        for (name, raw) in &self.tensors {
            hasher.write(format!("{name:?} {:?} {:?}", raw.dtype, raw.shape).as_bytes());
            hasher.write(&raw.bytes);
        }
        format!("{:032x}", hasher.finish_128())
    }
}

/// The parameters, and the counters, of which it is the state.
impl fmt::Debug for SrklState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SrklState")
            .field("parameters", &self.parameters().len())
            .field("steps", &self.metadata.get("steps"))
            .field("skipped_steps", &self.metadata.get("skipped_steps"))
            .finish_non_exhaustive()
    }
}

/// The state of an optimizer together with the values of its parameters: made by [`Srkl::snapshot`], taken by
/// [`Srkl::restore`]. Clones share its memory, which is the host's.
#[derive(Clone, Debug)]
pub struct Snapshot {
    state: SrklState,
    values: BTreeMap<String, Tensor>,
}

impl Snapshot {
    /// The state.
    #[must_use]
    pub fn state(&self) -> &SrklState {
        &self.state
    }

    /// The value of a parameter, on the CPU.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.values.get(name)
    }
}

impl Srkl {
    /// The state, which [`Srkl::save`] would write to a file, in memory. It takes the memory of the file.
    ///
    /// Masters of parameters that were written outside of the optimizer since the last step are taken from their values, as by
    /// [`Srkl::sync_master`].
    ///
    /// If state is sharded, all ranks must call it, and each then has the state of all.
    ///
    /// # Errors
    ///
    /// A step that waits for its measurement, or a learning rate that `step` would refuse.
    pub fn state(&mut self) -> Result<SrklState> {
        let ready = self.scalars().and_then(|_| self.refuse_pending());
        match self.sharding_ranks() {
            Some(_) => self.agree_on("state", ready, |(), _| Ok(vec![]))?,
            None => ready?,
        }
        self.sync_master()?;
        let ranks = self.sharding_ranks();
        let mut tensors = BTreeMap::new();
        for part in self.state_parts() {
            let (name, SavedTensor { dtype, shape, .. }) = part.tensor();
            let bytes = match ranks {
                Some(ranks) => ranks.or_abort(part.gather(ranks, true))?,
                None => part.own()?,
            };
            tensors.insert(name, Arc::new(Raw { dtype, shape, bytes }));
        }
        let variables = self.all.blocks.iter().map(|block| (block.name.clone(), block.id));
        Ok(SrklState { metadata: self.metadata()?, tensors, variables: variables.collect() })
    }

    /// Goes on from a state: [`Srkl::load`] without the file, with the same checks. The parameters must have the values that they had
    /// when it was taken: masters that do not round to them are an error. ([`Srkl::snapshot`] and [`Srkl::restore`] take care of
    /// them.) Of several ranks all must call it.
    ///
    /// State is matched to parameters as by [`Srkl::load`]; but that of this very optimizer, or another one of the same variables
    /// under the same names, always by name.
    ///
    /// # Errors
    ///
    /// As [`Srkl::load`], but for those of a file. Nothing has changed then.
    pub fn load_state(&mut self, state: &SrklState) -> Result<()> {
        self.load_with("load_state", state, BTreeMap::new())
    }

    /// The state and the parameters, to come back to by [`Srkl::restore`]: before a spike of the loss, or an experiment.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.1))?;
    /// let loss = || w.sqr()?.sum_all();
    /// opt.backward_step(&loss()?)?;
    ///
    /// let good = opt.snapshot()?;
    /// let before = loss()?.to_scalar::<f32>()?;
    /// opt.set_learning_rate(1e6);
    /// opt.backward_step(&loss()?)?;
    /// assert!(loss()?.to_scalar::<f32>()? > 1e6);
    ///
    /// opt.restore(&good)?; // The learning rate too.
    /// assert_eq!(loss()?.to_scalar::<f32>()?, before);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Srkl::state`].
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        let state = self.state()?;
        let value = |block: &Block| {
            let value = block.var.detach();
            let value = if block.on_cpu { value.copy()? } else { value.to_device(&Device::Cpu)? };
            Ok((block.name.clone(), value))
        };
        let values = self.all.blocks.iter().map(value).collect::<Result<_>>()?;
        Ok(Snapshot { state, values })
    }

    /// Goes back to a snapshot: the parameters have the values of then, and training goes on with the same bits as it did then.
    ///
    /// Variables that are not parameters of the optimizer (running statistics of batch norm are, in a
    /// [`VarMap`](candle_nn::VarMap)) and the data are yours.
    ///
    /// # Errors
    ///
    /// As [`Srkl::load_state`], and a snapshot without a value for some parameter. Nothing has changed then. (Unless a device fails,
    /// or has no room for a copy of the largest parameter.)
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.load_with("restore", &snapshot.state, snapshot.values.clone())
    }

    /// An optimizer of other variables, with the settings, the state and the counters of this one: its next steps have the same
    /// bits for the same gradients. The variables, which may be on another device, get the values of the parameters.
    ///
    /// `named` has the names that the parameters have here, with variables of the same dtypes and shapes. (Integers are left out;
    /// so may be the other names of tied weights.) Micro-batches that have been accumulated are not copied.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// // Population training: the best member takes the place of another, with a learning rate of its own.
    /// let best = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let other = Var::new(&[7f32, 7., 7.], &Device::Cpu)?;
    /// let mut opt = Srkl::builder()
    ///     .default_group(ParamsSrkl::adamw(0.1))
    ///     .build([("w".to_string(), best.clone())])?;
    /// opt.backward_step(&best.sqr()?.sum_all()?)?;
    ///
    /// let mut copy = opt.copy_to([("w".to_string(), other.clone())])?;
    /// copy.set_learning_rate(opt.learning_rate() * 1.2);
    /// assert_eq!(other.to_vec1::<f32>()?, best.to_vec1::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Srkl::state`]; a parameter without a variable, a variable of another dtype or shape, or that no parameter has the name
    /// of; a variable twice, or one of the parameters; several ranks. The variables are unchanged then.
    pub fn copy_to(&mut self, named: impl IntoIterator<Item = (String, Var)>) -> Result<Self> {
        if self.ranks.is_some() {
            bail!(
                "`copy_to`: an optimizer of several ranks can't be copied; build another and use `load_state`"
            )
        }
        let vars = self.vars_of_copy(named)?;
        let Snapshot { state, values } = self.snapshot()?;
        let block = |(block, var): (&Block, Var)| {
            let (name, tied) = (block.name.clone(), block.tied.clone());
            let Block { group, matrices, place, .. } = *block;
            let parameter = Parameter { name, tied, var, group, matrices, place };
            parameter.block(self.all.of(block), None)
        };
        let blocks = self.all.blocks.iter().zip(vars).map(block).collect::<Result<_>>()?;
        let mut all = Parameters::new(self.all.groups.clone(), blocks);
        let engine = engine_of(&mut all, None)?;
        let MeasureState { checked, .. } = self.measure_state;
        let mut copy = Self {
            all,
            by_position: self.by_position,
            schedule: self.schedule,
            last_schedule: None,
            lr_schedule: None, // That of the state is loaded.
            grad_scale: self.grad_scale,
            scaling: self.scaling,
            measure_schedule: self.measure_schedule,
            measure_state: MeasureState { checked, ..MeasureState::default() },
            seed: self.seed,
            records: self.records,
            engine,
            ranks: None,
            step_count: self.step_count,
            reduction: self.reduction,
            accumulated: Accumulated::default(),
        };
        let loaded = copy.load_checked(&state, &values, true)?;
        copy.take("copy_to", Ok((loaded, ())), |()| String::new(), &values)?;
        Ok(copy)
    }

    /// [`copy_to`](Self::copy_to) the variables of `varmap`.
    ///
    /// # Errors
    ///
    /// As [`copy_to`](Self::copy_to).
    pub fn copy_to_varmap(&mut self, varmap: &VarMap) -> Result<Self> {
        self.copy_to(variables_of(varmap)?)
    }

    /// For each parameter the variable of the same name.
    fn vars_of_copy(&self, named: impl IntoIterator<Item = (String, Var)>) -> Result<Vec<Var>> {
        let mut vars: HashMap<String, Var> = HashMap::new();
        for (name, var) in named.into_iter().filter(|(_, var)| var.dtype().is_float()) {
            if vars.insert(name.clone(), var).is_some() {
                bail!("`copy_to`: two variables are named `{name}`")
            }
        }
        let mut taken: HashMap<TensorId, &str> =
            self.all.blocks.iter().map(|block| (block.id, block.name.as_str())).collect();
        let mut all = vec![];
        for block in &self.all.blocks {
            let name = &block.name;
            let Some(var) = vars.remove(name) else {
                bail!("`copy_to`: parameter `{name}`: there is no variable of this name")
            };
            if var.dtype() != block.dtype || var.dims() != block.var.dims() {
                bail!(
                    "`copy_to`: parameter `{name}`: expected a variable of {:?} {:?}, got {:?} {:?}",
                    block.dtype,
                    block.var.dims(),
                    var.dtype(),
                    var.dims()
                )
            }
            if let Some(other) = taken.insert(var.id(), name) {
                bail!("`copy_to`: the variable for `{name}` is that of `{other}` already")
            }
            for tied in &block.tied {
                if vars.remove(tied).is_some_and(|other| other.id() != var.id()) {
                    bail!(
                        "`copy_to`: `{name}` and `{tied}` are one parameter, and got two variables"
                    )
                }
            }
            all.push(var);
        }
        match vars.keys().min() {
            Some(stranger) => bail!("`copy_to`: no parameter is named `{stranger}`"),
            None => Ok(all),
        }
    }

    /// Goes on from `state`, with these values of all parameters, unless there are none.
    fn load_with(
        &mut self,
        call: &str,
        state: &SrklState,
        values: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let same = |b: &Block| state.variables.get(&b.name) == Some(&b.id);
        let by_name = self.all.blocks.iter().all(same);
        let loaded = self.load_checked(state, &values, by_name);
        let digest = |(): &()| {
            let values = values.values().map(|value| fingerprint(value).unwrap_or_default());
            format!("{} {}", state.digest(), values.collect::<String>())
        };
        self.take(call, loaded.map(|loaded| (loaded, ())), digest, &values)
    }

    fn load_checked(
        &self,
        state: &SrklState,
        values: &BTreeMap<String, Tensor>,
        by_name: bool,
    ) -> Result<Loaded> {
        for block in self.all.blocks.iter().filter(|_| !values.is_empty()) {
            let Some(value) = values.get(&block.name) else {
                bail!("parameter `{}`: the snapshot has none of this name", block.name)
            };
            if value.dtype() != block.dtype || value.dims() != block.var.dims() {
                bail!(
                    "parameter `{}`: expected {:?} {:?}, the snapshot has {:?} {:?}",
                    block.name,
                    block.dtype,
                    block.var.dims(),
                    value.dtype(),
                    value.dims()
                )
            }
        }
        let values = Some(values).filter(|values| !values.is_empty());
        self.check_source(&Source { values, by_name, ..state.source()? })
    }

    /// The numbers of a kind of state of a parameter, by any of its names, in its shape and on the CPU: what
    /// [`SrklState::get`] gives, of one parameter alone, and masters of any format. `None` for an unknown parameter and for state
    /// that it does not have. If state is sharded, all ranks must call it.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.1))?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// let v = opt.state_of("0", "v")?.expect("Adam has a second moment");
    /// assert!((v.to_vec1::<f32>()?[1] - 0.016).abs() < 1e-5); // (1 - 0.999) times the gradient's square.
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Another name of a kind of state than those of [`SrklState::get`].
    pub fn state_of(&self, name: &str, kind: &str) -> Result<Option<Tensor>> {
        let ready = check_kind(kind);
        let ranks = self.sharding_ranks();
        match ranks {
            Some(_) => self.agree_on("state_of", ready, |(), _| {
                Ok(vec![claim("the parameter", name), claim("the kind of state", kind)])
            })?,
            None => ready?,
        }
        let Some(block) = self.all.blocks.iter().find(|block| block.is_named(name)) else {
            return Ok(None);
        };
        let saved = |kind: &str| -> Result<Option<Saved>> {
            let of_block = self.state_parts().into_iter().filter(|part| part.block.id == block.id);
            let parts: Vec<_> = of_block.filter(|part| part.kind == kind).collect();
            let Some(format) = parts.first().map(|part| part.slot.format()) else {
                return Ok(None);
            };
            let bytes = parts.iter().map(|part| match ranks {
                Some(ranks) => ranks.or_abort(part.gather(ranks, true)),
                None => part.own(),
            });
            Ok(Some(Saved { format, parts: bytes.collect::<Result<_>>()? }))
        };
        let Some(found) = saved(kind)? else { return Ok(None) };
        let v = match (kind, found.format) {
            ("m", Format::Compact) => saved("v")?,
            _ => None,
        };
        let parameter = match found.format {
            Format::Split => block.var.flatten_all()?.to_vec1()?,
            _ => vec![],
        };
        let of = (block.dtype, block.var.dims(), &parameter[..]);
        decoded(kind, &found, v.as_ref(), of).map(Some)
    }
}

/// An error for what is not the name of a kind of state.
fn check_kind(kind: &str) -> Result<()> {
    match STATE.contains(&kind) {
        true => Ok(()),
        false => bail!("expected a kind of state, one of {STATE:?}, got `{kind}`"),
    }
}

/// The numbers of the state `kind` of a parameter of this dtype, shape and, if it is split, value.
fn decoded(
    kind: &str,
    saved: &Saved,
    v: Option<&Saved>,
    (dtype, dims, parameter): (DType, &[usize], &[bf16]),
) -> Result<Tensor> {
    if let (DType::F64, [bytes]) = (dtype, &saved.parts[..]) {
        return Tensor::from_raw_buffer(bytes, DType::F64, dims, &Device::Cpu);
    }
    let beside = Beside { v: None, parameter };
    let v = v.map(|v| v.to_f32("v", beside)).transpose()?;
    let values = saved.to_f32(kind, Beside { v: v.as_deref(), parameter })?;
    Tensor::from_vec(values, dims, &Device::Cpu)
}

/// A tensor as a file has it.
fn raw_of(name: &str, tensor: &Tensor) -> Result<Raw> {
    fn bytes<T: Copy, const N: usize>(values: &[T], to_bytes: fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|x| to_bytes(*x)).collect()
    }
    let shape = tensor.dims().to_vec();
    let tensor = tensor.to_device(&Device::Cpu)?.force_contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + tensor.elem_count();
    let (dtype, bytes) = match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => (Dtype::F32, bytes(&x[range], f32::to_le_bytes)),
        Storage::Cpu(CpuStorage::F64(x)) => (Dtype::F64, bytes(&x[range], f64::to_le_bytes)),
        Storage::Cpu(CpuStorage::I16(x)) => (Dtype::I16, bytes(&x[range], i16::to_le_bytes)),
        Storage::Cpu(CpuStorage::BF16(x)) => (Dtype::BF16, bytes(&x[range], bf16::to_le_bytes)),
        Storage::Cpu(CpuStorage::U8(x)) => {
            let signed = name.ends_with(".m.codes");
            (if signed { Dtype::I8 } else { Dtype::U8 }, x[range].to_vec())
        }
        _ => bail!("`{name}`: expected f32, f64, bf16, i16 or u8, got {:?}", tensor.dtype()),
    };
    Ok(Raw { dtype, shape, bytes })
}
