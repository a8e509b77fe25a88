//! [`SrklBuilder`]: parameter groups, names, and the checks of both.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::LazyLock;

use candle_core::{Result, TensorId, Var, bail};
use candle_nn::VarMap;

use crate::backend::cpu::access;
use crate::backend::masters;
#[cfg(feature = "cuda")]
use crate::backend::{Backend, cuda};
use crate::block::{Block, Parameters};
use crate::collective::Collective;
use crate::engine::Engine;
#[cfg(feature = "cuda")]
use crate::engine::device::Device;
use crate::engine::host::Host;
use crate::matrices::{Matrices, hidden_matrices};
use crate::micro_batches::{Accumulated, Reduction};
use crate::optimizer::{DEFAULT_GROUP, Srkl, settings};
use crate::params::{Group, ParamsSrkl};
use crate::ranks::{BUCKET_BYTES, Ranks, Statement, claim};
use crate::schedule::{MeasureSchedule, MeasureState};
use crate::shards::{Share, shards};
use crate::state::bytes;

impl Srkl {
    /// An optimizer of all variables of `varmap`, in the order of their names, in one group. A variable of
    /// several names (tied weights) is one parameter, under the first of them.
    ///
    /// # Errors
    ///
    /// As [`SrklBuilder::build`].
    pub fn from_varmap(varmap: &VarMap, params: ParamsSrkl) -> Result<Self> {
        Self::builder().default_group(params).build_varmap(varmap)
    }

    /// Starts an optimizer with several parameter groups.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let varmap = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    /// let model = candle_nn::linear(4, 2, vb.pp("head"))?;
    ///
    /// let decayed = ParamsSrkl { weight_decay: 0.1, ..ParamsSrkl::reference() };
    /// let opt = Srkl::builder()
    ///     .default_group(decayed.clone())
    ///     .group("no_decay", ParamsSrkl { weight_decay: 0., ..decayed }, |_, var| var.rank() < 2)
    ///     .build_varmap(&varmap)?;
    /// let groups: Vec<_> = opt.telemetry()?.into_iter().map(|t| (t.name, t.group)).collect();
    /// assert_eq!(groups[0], ("head.bias".to_string(), "no_decay".to_string()));
    /// assert_eq!(groups[1], ("head.weight".to_string(), "default".to_string()));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn builder<'a>() -> SrklBuilder<'a> {
        let matrices = Box::new(hidden_matrices);
        SrklBuilder {
            default: ParamsSrkl::default(),
            groups: vec![],
            matrices,
            collective: None,
            bucket_bytes: BUCKET_BYTES,
            sharded: false,
        }
    }
}

/// Whether a name and a variable belong to a group.
type Predicate<'a> = Box<dyn Fn(&str, &Var) -> bool + 'a>;

/// How many matrices a name and a variable are taken for.
type MatricesOf<'a> = Box<dyn Fn(&str, &Var) -> usize + 'a>;

/// Builds an [`Srkl`] with several parameter groups: see [`Srkl::builder`].
#[must_use = "`build` or `build_varmap` makes the optimizer"]
pub struct SrklBuilder<'a> {
    default: ParamsSrkl,
    groups: Vec<(Group, Predicate<'a>)>,
    matrices: MatricesOf<'a>,
    collective: Option<Box<dyn Collective>>,
    bucket_bytes: usize,
    sharded: bool,
}

impl<'a> SrklBuilder<'a> {
    /// The settings of every parameter that no group takes, under the name [`DEFAULT_GROUP`];
    /// [`ParamsSrkl::reference`] if not set. Its `lr` is what learning rates are relative to: see
    /// [`set_learning_rate`](candle_nn::Optimizer::set_learning_rate).
    pub fn default_group(mut self, params: ParamsSrkl) -> Self {
        self.default = params;
        self
    }

    /// Adds a group of the parameters for which `belongs` is true, given their name and variable. A parameter goes to
    /// the first group, in the order of these calls, that takes it.
    pub fn group(
        mut self,
        name: impl Into<String>,
        params: ParamsSrkl,
        belongs: impl Fn(&str, &Var) -> bool + 'a,
    ) -> Self {
        self.groups.push((Group::new(name.into(), params), Box::new(belongs)));
        self
    }

    /// For groups of [`Direction::Muon`](crate::Direction::Muon): how many matrices a parameter is taken for, given its
    /// name and variable. 0: none, and it takes Adam; 1: it is one matrix, or a convolution's kernel as out x rest; n: it
    /// is n of them, of equal shape, one after the other along the first dimension, and each is orthogonalised by itself.
    /// [`hidden_matrices`](crate::hidden_matrices) if not set. Of a variable of several names (tied weights) each must be a
    /// matrix.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_srkl::{ParamsSrkl, Srkl, hidden_matrices};
    ///
    /// let varmap = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    /// let hidden = candle_nn::linear(4, 16, vb.pp("hidden"))?;
    /// let last = candle_nn::linear(16, 2, vb.pp("last"))?;
    ///
    /// // `last` is the head of this model, which its name does not tell.
    /// let opt = Srkl::builder()
    ///     .default_group(ParamsSrkl::braked_muon())
    ///     .matrices(|name, var| if name == "last.weight" { 0 } else { hidden_matrices(name, var) })
    ///     .build_varmap(&varmap)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn matrices(mut self, of: impl Fn(&str, &Var) -> usize + 'a) -> Self {
        self.matrices = Box::new(of);
        self
    }

    /// Steps together with other ranks: copies of the training in other threads, or processes, each with micro-batches of its
    /// own. A step is by the mean of the gradients of all of them, and leaves the same parameters and state on all.
    ///
    /// All ranks make the same calls in the same order: [`build`](Self::build), where the parameters become those of rank 0;
    /// `step`, `step_consuming`, `backward_step`, `backward_step_with`, `backward_step_over`, `step_accumulated`; `observe`,
    /// `observe_accumulated`, `perturb`, `perturb_accumulated`; `mean_over_ranks`; `save`, `load`, `load_state`, `restore`,
    /// `load_matching`, `load_state_matching`; `freeze` and `unfreeze`, also of groups. What differs between them
    /// (names, shapes, settings, learning rates, numbers of steps and micro-batches), and an error on any of them, is an error on
    /// all, which names the rank; nothing has changed then. A rank that leaves or panics makes the calls of the others fail.
    ///
    /// Other methods are each rank's own. Those that change settings or state must be called by all (setters,
    /// `request_measurement`, `skip_measurement`, `sync_master`); those that only look (`telemetry`, `swap_averaged`, `master`, `state`, `state_of`)
    /// need not, unless state is [`sharded`](Self::sharded). A step of several ranks can be part of a capture of a CUDA stream with
    /// `Nccl` alone.
    ///
    /// For the same micro-batches the bits are the same for any number of ranks, as long as each has a power of two of them
    /// ([`accumulate`](Srkl::accumulate)): one process with 8, two ranks with 4, eight with 1. Rank `r` has the `r`-th run of
    /// neighbouring ones.
    ///
    /// [`Threads`](crate::Threads) has an example; `docs/ranks.md` in the repository has more.
    pub fn collective(mut self, collective: impl Collective + 'static) -> Self {
        self.collective = Some(Box::new(collective));
        self
    }

    /// The most bytes of gradients or parameters that a rank sends at a time, 4 MiB unless set. A step allocates about three
    /// times as much, and besides the sums of gradients: 4 bytes for each parameter, or each that is stepped here.
    pub fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.bucket_bytes = bytes.max(1);
        self
    }

    /// Whether each of several ranks keeps moments, masters, averages and squared row norms of its shard alone, and steps that:
    /// an Nth of the memory and of the work. Not unless set.
    ///
    /// Shards are runs of whole chunks, of 8192 elements, of about equal bytes; a matrix that is orthogonalised
    /// ([`Direction::Muon`](crate::Direction::Muon)) is one rank's. The bits are those of one process, as without.
    ///
    /// [`swap_averaged`](Srkl::swap_averaged), [`master`](Srkl::master), [`state`](Srkl::state), [`state_of`](Srkl::state_of) and, after [`record_norms`](Srkl::record_norms),
    /// [`telemetry`](Srkl::telemetry) are calls of all ranks then. Parameters and gradients stay whole on every rank.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl, Threads};
    ///
    /// let train = |rank: Threads| -> candle_core::Result<f32> {
    ///     let w = Var::ones(20_000, DType::F32, &Device::Cpu)?;
    ///     let mut opt = Srkl::builder()
    ///         .default_group(ParamsSrkl::adamw(0.1))
    ///         .collective(rank)
    ///         .sharded(true)
    ///         .build([("w".to_string(), w.clone())])?;
    ///     opt.backward_step(&w.sqr()?.sum_all()?)?;
    ///     w.mean_all()?.to_scalar()
    /// };
    /// let after: Vec<f32> = std::thread::scope(|scope| {
    ///     let ranks = Threads::new(2).into_iter().map(|rank| scope.spawn(move || train(rank)));
    ///     ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect::<Result<_, _>>()
    /// })?;
    /// assert!(after[0] < 0.91 && after[0] == after[1]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn sharded(mut self, sharded: bool) -> Self {
        self.sharded = sharded;
        self
    }

    /// An optimizer of all variables of `varmap`, in the order of their names. A variable of several names
    /// (tied weights) is one parameter, under the first of them; [`BlockTelemetry::tied`](crate::BlockTelemetry::tied) has the others.
    ///
    /// # Errors
    ///
    /// As [`SrklBuilder::build`], and a variable whose names belong to different groups.
    pub fn build_varmap(self, varmap: &VarMap) -> Result<Srkl> {
        let named = variables_of(varmap)?;
        let mut places: HashMap<TensorId, usize> = HashMap::new();
        let mut parameters: Vec<(String, Vec<String>, Var)> = vec![];
        for (name, var) in named {
            let place = *places.entry(var.id()).or_insert(parameters.len());
            match parameters.get_mut(place) {
                Some((_, tied, _)) => tied.push(name),
                None => parameters.push((name, vec![], var)),
            }
        }
        self.build_all(parameters)
    }

    /// An optimizer of named variables, in the given order; those of an integer dtype are left out,
    /// as candle's optimizers do. Masters are made from the parameters as they are now.
    ///
    /// # Errors
    ///
    /// Settings out of range (see [`ParamsSrkl::validate`]), two groups of one name, the same name
    /// or the same variable twice, a variable on a device that is neither the CPU nor (with feature
    /// `cuda`) a CUDA device, one of a float dtype other than f32, f64, bf16 and f16, one of f64 in
    /// a group of [`MasterWeights::F32`](crate::MasterWeights::F32), or one that [`SrklBuilder::matrices`] takes for
    /// matrices that its shape is not.
    pub fn build(self, named: impl IntoIterator<Item = (String, Var)>) -> Result<Srkl> {
        self.build_all(named.into_iter().map(|(name, var)| (name, vec![], var)))
    }

    /// An optimizer of variables, each with its name and its other names.
    fn build_all(
        mut self,
        named: impl IntoIterator<Item = (String, Vec<String>, Var)>,
    ) -> Result<Srkl> {
        let (bucket_bytes, sharded) = (self.bucket_bytes, self.sharded);
        let ranks = self.collective.take().map(|c| Ranks::new(c, bucket_bytes, sharded));
        let ranks = ranks.transpose()?.flatten();
        let Some(mut ranks) = ranks else { return self.build_one(named, None) };
        // The parameters first: masters are made from them.
        let named: Vec<_> = named.into_iter().filter(|(.., var)| var.dtype().is_float()).collect();
        let parameter = |(name, tied, var): &(String, Vec<String>, Var)| {
            let shape = format!("{:?} {:?}", var.dtype(), var.dims());
            claim(
                format!("parameter `{}`", [std::slice::from_ref(name), tied].concat().join("`, `")),
                shape,
            )
        };
        let vars: Vec<Var> = named.iter().map(|(.., var)| var.clone()).collect();
        let device = ranks.on_device(|devices| Ok(devices.device())).ok();
        ranks.by_device = !vars.is_empty()
            && device.is_some_and(|device| vars.iter().all(|v| v.device().same_device(&device)));
        let settings_of_ranks = [
            claim("`bucket_bytes`", bucket_bytes),
            claim("`sharded`", sharded),
            claim("whether gradients go from device to device", ranks.by_device),
        ];
        let claims = named.iter().map(parameter).chain(settings_of_ranks).collect();
        let stated = ranks.agree(Ok(Statement { claims, own: identities(&vars) }))?;
        refuse_shared(&stated)?;
        let statement = |opt: &Srkl| {
            let group = |block: &Block| {
                let matrices = format!("{:?}", block.matrices);
                let group = &opt.all.groups[block.group].name;
                claim(
                    format!("the group of `{}`", block.name),
                    format!("{group}, matrices {matrices}"),
                )
            };
            let settings = opt.all.groups.iter().map(settings);
            let claims = settings.chain(opt.all.blocks.iter().map(group)).collect();
            Ok(Statement { claims, own: vec![] })
        };
        let built = self.build_one(named, Some(&ranks));
        let (mut opt, _) = ranks.agree_on(built, statement)?;
        ranks.broadcast_parameters(&vars)?;
        opt.sync_master()?;
        opt.upload_settings()?;
        Ok(opt)
    }

    /// The same of one rank.
    fn build_one(
        self,
        named: impl IntoIterator<Item = (String, Vec<String>, Var)>,
        ranks: Option<&Ranks>,
    ) -> Result<Srkl> {
        let default = Group::new(DEFAULT_GROUP.to_string(), self.default);
        let (groups, predicates): (Vec<Group>, Vec<Predicate>) = self.groups.into_iter().unzip();
        let mut groups: Vec<Group> = std::iter::once(default).chain(groups).collect();
        let mut names = HashSet::new();
        for group in &groups {
            group.params.validate().map_err(|e| e.context(format!("group `{}`", group.name)))?;
            if !names.insert(group.name.as_str()) {
                bail!("two parameter groups are named `{}`", group.name)
            }
        }

        // What takes Adam beside Muon comes behind all groups.
        let mut beside: HashMap<usize, usize> = HashMap::new();
        for i in 0..groups.len() {
            if groups[i].params.is_muon() {
                beside.insert(i, groups.len());
                groups.push(groups[i].beside());
            }
        }

        let measure_schedule = MeasureSchedule::of_all(groups.iter().map(|group| &group.params))?;
        let mut parameters = vec![];
        let mut names: HashSet<String> = HashSet::new();
        let mut ids: HashMap<TensorId, String> = HashMap::new();
        for (name, tied, var) in named {
            if !var.dtype().is_float() {
                continue;
            }
            if !names.insert(name.clone()) {
                bail!("two parameters are named `{name}`")
            }
            if let Some(other) = ids.insert(var.id(), name.clone()) {
                bail!("`{name}` and `{other}` are the same variable, which would be stepped twice")
            }
            let group_of = |name: &str| {
                let taken = predicates.iter().position(|belongs| belongs(name, &var));
                taken.map_or(0, |place| place + 1)
            };
            let group = group_of(&name);
            if let Some(other) = tied.iter().find(|other| group_of(other) != group) {
                bail!(
                    "`{name}` and `{other}` are the same variable, which can't be in two groups: `{}` and `{}`",
                    groups[group].name,
                    groups[group_of(other)].name
                )
            }
            let matrices = match beside.contains_key(&group) {
                true => matrices_of(&name, &tied, &var, &groups[group].name, &self.matrices)?,
                false => None,
            };
            let group = match (matrices, beside.get(&group)) {
                (None, Some(beside)) => *beside,
                _ => group,
            };
            parameters.push((name, tied, var, group, matrices));
        }
        groups.extend(groups.iter().map(Group::twin).collect::<Vec<_>>());
        let shards = ranks.map(|ranks| {
            let share = |(.., var, group, matrices): &(_, _, Var, usize, Option<Matrices>)| Share {
                n: var.elem_count(),
                bytes: bytes(&groups[*group].params, var),
                // Gradients are added up anywhere.
                matrices: matrices.filter(|_| ranks.sharded),
            };
            shards(&parameters.iter().map(share).collect::<Vec<_>>(), ranks.world_size)
        });
        let mut blocks: Vec<Block> = vec![];
        for (place, (name, tied, var, group, matrices)) in parameters.into_iter().enumerate() {
            let shards = shards.as_ref().map_or(vec![], |shards| shards[place].clone());
            let own = ranks.filter(|ranks| ranks.sharded).map(|ranks| shards[ranks.rank].clone());
            let parameter = Parameter { name, tied, var, group, matrices, place };
            let block = parameter.block(&groups[group].params, own)?;
            blocks.push(Block { shards, ..block });
        }
        let mut all = Parameters::new(groups, blocks);
        let engine = engine_of(&mut all, ranks.filter(|ranks| ranks.sharded))?;
        let measure_state =
            MeasureState { blind: measure_schedule.is_some(), ..MeasureState::default() };
        Ok(Srkl {
            all,
            by_position: false,
            schedule: 1.,
            last_schedule: None,
            lr_schedule: None,
            grad_scale: 1.,
            scaling: None,
            measure_schedule,
            measure_state,
            seed: 0,
            records: false,
            engine,
            ranks: ranks.cloned().map(Box::new),
            step_count: 1,
            accumulated: Accumulated::default(),
            reduction: Reduction::default(),
        })
    }
}

/// The variables of a `VarMap`, in the order of their names.
pub(crate) fn variables_of(varmap: &VarMap) -> Result<Vec<(String, Var)>> {
    let mut named: Vec<(String, Var)> = match varmap.data().lock() {
        Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
        Err(_) => bail!("the VarMap is poisoned: a thread panicked while it held its lock"),
    };
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(named)
}

/// A variable to be stepped.
pub(crate) struct Parameter {
    pub name: String,
    pub tied: Vec<String>,
    pub var: Var,
    pub group: usize,
    pub matrices: Option<Matrices>,
    pub place: usize,
}

impl Parameter {
    /// It with fresh state, of the elements `own` if other ranks have the others.
    pub fn block(self, params: &ParamsSrkl, own: Option<Range<usize>>) -> Result<Block> {
        let Self { name, tied, var, group, matrices, place } = self;
        let (sharded, own) = (own.is_some(), own.unwrap_or(0..var.elem_count()));
        let block = Block::new(name, var, group, params, own)?;
        let mut block = Block { tied, sharded, matrices, place, ..block };
        block.state.master = masters::of_block(&block, params.master_weights)?;
        block.elements = access::first_element(&block)?;
        Ok(block)
    }
}

/// What tells the variables of one process apart: a number of the process, and each variable's identity.
fn identities(vars: &[Var]) -> Vec<u8> {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(0));
    let lines = vars.iter().map(|var| format!("{:?}\n", var.id()));
    format!("{}\n{}", *PROCESS, lines.collect::<String>()).into_bytes()
}

/// An error for ranks that have the same variables, which each would step.
fn refuse_shared(stated: &[Vec<u8>]) -> Result<()> {
    let mut seen: HashMap<(&[u8], &[u8]), usize> = HashMap::new();
    for (rank, stated) in stated.iter().enumerate() {
        let mut lines = stated.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let process = lines.next().unwrap_or_default();
        for id in lines {
            if let Some(other) = seen.insert((process, id), rank) {
                bail!(
                    "ranks {other} and {rank} have the same variables: each needs a model of its own (a clone of a \
                     `VarMap` shares its variables)"
                )
            }
        }
    }
    Ok(())
}

/// The matrices that a variable of one or several names is taken for, if each of them says so.
pub(crate) fn matrices_of(
    name: &str,
    tied: &[String],
    var: &Var,
    group: &str,
    of: &dyn Fn(&str, &Var) -> usize,
) -> Result<Option<Matrices>> {
    let count = of(name, var);
    for other in tied {
        match of(other, var) {
            0 => return Ok(None),
            others if count > 0 && others != count => bail!(
                "`{name}` and `{other}` are the same variable, which can't be {count} matrices and {others}"
            ),
            _ => {}
        }
    }
    (count > 0).then(|| Matrices::new(name, group, var.dims(), count)).transpose()
}

/// The engine for these parameters; `ranks` if they are sharded.
pub(crate) fn engine_of(all: &mut Parameters, ranks: Option<&Ranks>) -> Result<Box<dyn Engine>> {
    #[cfg(not(feature = "cuda"))]
    let devices = vec![];
    #[cfg(feature = "cuda")]
    let devices = {
        let mut devices: Vec<Box<dyn Backend>> = vec![];
        for cuda in cuda::devices_of(all)? {
            if cuda.has_all(all) {
                return Ok(Box::new(Device::new(cuda, ranks, all)?));
            }
            devices.push(Box::new(cuda));
        }
        devices
    };
    Ok(Box::new(Host::new(devices, ranks.cloned(), all)?))
}

impl fmt::Debug for SrklBuilder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups: Vec<_> = self.groups.iter().map(|(g, _)| (&g.name, &g.params)).collect();
        f.debug_struct("SrklBuilder")
            .field("default_group", &self.default)
            .field("groups", &groups)
            .finish_non_exhaustive()
    }
}
