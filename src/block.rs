//! [`Block`]: a parameter tensor with its state, the unit that the rule works on.

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, TensorId, Var, bail};
#[cfg(feature = "cuda")]
use cudarc::driver::CudaSlice;

use crate::estimate::{Estimate, StepSums};
use crate::params::{Curvature, Direction, MasterWeights, ParamsSrkl};
use crate::rule::Powers;

/// A parameter tensor and its state.
///
/// What a step asks of the variable is kept beside it: with thousands of small tensors its time
/// goes into following pointers.
pub(crate) struct Block {
    pub name: String,
    /// Its other names.
    pub tied: Vec<String>,
    pub var: Var,
    pub id: TensorId,
    pub dtype: DType,
    pub shape: Shape,
    /// Elements.
    pub n: usize,
    pub on_cpu: bool,
    /// The addresses of the variable's storage, which it keeps for life, and of its first element.
    pub storage: usize,
    pub elements: usize,
    /// Its place in the optimizer's list of groups.
    pub group: usize,
    /// Its place in the list that the optimizer was given. A checkpoint may bring blocks into another order.
    pub place: usize,
    pub state: State,
    pub powers: Powers,
    pub estimate: Estimate,
    /// The parameter as it was, while it is perturbed or replaced.
    pub old: Kept,
    /// What the last step left for its measurement, or for telemetry, where the block is on the CPU.
    pub step_sums: StepSums,
    /// What the last step multiplied the gradient by, unscaling and clipping.
    pub grad_factor: f64,
    /// Its sums of `D^2` over strips, until it is measured.
    pub strips: Vec<f64>,
    /// Whether any step has had a gradient for it.
    pub trained: bool,
    /// Whether there is an estimate of its curvature, or nothing to make one of.
    pub known: bool,
    /// Whether its last step was a small one, for lack of an estimate, or none.
    pub small: bool,
    /// How often it was skipped alone.
    pub skipped: u64,
    pub last: Option<Last>,
}

/// What the last step did, if it moved the block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Last {
    pub curvature: f64,
    pub phi: f64,
    /// `||g||_2`, unscaled, and `||D||_2`, if they were recorded.
    pub norms: Option<[f64; 2]>,
}

/// Room for the parameter as it was, used again and again: new memory costs more than the copy.
#[derive(Default)]
pub(crate) struct Kept {
    pub memory: Option<Var>,
    pub valid: bool,
}

/// What a block has beside its parameter: a number an element, where its settings ask for it.
#[derive(Default)]
pub(crate) struct State {
    /// f32 masters of a parameter of 16 bits.
    pub master: Option<Buffer>,
    /// The first moment of [`Direction::Momentum`] and [`Direction::Adam`].
    pub m: Option<Buffer>,
    /// The second moment of [`Direction::Adam`].
    pub v: Option<Buffer>,
    /// The average of the parameter.
    pub average: Option<Buffer>,
    /// The squared row norms of [`Curvature::Hutchinson`].
    pub q: Option<Buffer>,
}

/// Numbers of the compute type of a block, where the parameter is.
pub(crate) enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    #[cfg(feature = "cuda")]
    CudaF32(CudaSlice<f32>),
    #[cfg(feature = "cuda")]
    CudaF64(CudaSlice<f64>),
}

/// Whether gradients and parameters of this dtype are handled.
pub(crate) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
}

impl Block {
    /// Still without masters, and the address of its elements: see `masters.rs` and `access.rs` in `backend`.
    ///
    /// # Errors
    ///
    /// A variable on a device or of a dtype that is not handled, one that loses bits in its master,
    /// or one that is not as candle makes variables.
    pub fn new(name: String, var: Var, group: usize, params: &ParamsSrkl) -> Result<Self> {
        let masters = params.master_weights;
        let dtype = var.dtype();
        let on_cpu = match var.device() {
            Device::Cpu => true,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => false,
            device => {
                let places =
                    if cfg!(feature = "cuda") { "the CPU or a CUDA device" } else { "the CPU" };
                bail!(
                    "`{name}`: expected a variable on {places}, got one on {:?}",
                    device.location()
                )
            }
        };
        if !is_supported(dtype) {
            bail!("`{name}`: expected a variable of f32, f64, bf16 or f16, got {dtype:?}")
        }
        if !var.is_contiguous() || var.layout().start_offset() != 0 {
            bail!("`{name}`: expected a contiguous variable at offset 0, got {:?}", var.layout())
        }
        if masters == MasterWeights::F32 && dtype == DType::F64 {
            bail!(
                "`{name}`: `MasterWeights::F32` would lose bits of an f64 variable; use \
                 `MasterWeights::Auto` or `None`"
            )
        }
        let zeros = |name| match has_state(params, name) {
            true => Buffer::zeros(&var).map(Some),
            false => Ok(None),
        };
        let state = State {
            master: None,
            m: zeros("m")?,
            v: zeros("v")?,
            average: zeros("average")?,
            q: zeros("q")?,
        };
        let storage = storage_address(&var.storage_and_layout().0);
        let (id, shape, n) = (var.id(), var.shape().clone(), var.elem_count());
        let (skipped, last) = (0, None);
        let (powers, estimate) = (Powers::NONE, Estimate::NONE);
        Ok(Self {
            name,
            tied: vec![],
            var,
            id,
            dtype,
            shape,
            n,
            on_cpu,
            storage,
            elements: 0,
            group,
            place: 0,
            state,
            powers,
            estimate,
            old: Kept::default(),
            step_sums: StepSums::default(),
            grad_factor: 1.,
            strips: vec![],
            trained: false,
            known: false,
            small: true,
            skipped,
            last,
        })
    }

    /// Whether the parameter is on this device.
    #[cfg(feature = "cuda")]
    pub fn is_on(&self, device: &CudaDevice) -> bool {
        matches!(self.var.device(), Device::Cuda(other) if other.id() == device.id())
    }

    /// What a gradient must have in common with its parameter.
    pub fn check_gradient(&self, gradient: &Tensor) -> Result<()> {
        let Self { name, shape, .. } = self;
        if !gradient.device().same_device(self.var.device()) {
            bail!(
                "gradient of `{name}`: expected it on {:?}, got {:?}",
                self.var.device().location(),
                gradient.device().location()
            )
        }
        if gradient.dims() != shape.dims() {
            bail!("gradient of `{name}`: expected shape {shape:?}, got {:?}", gradient.shape())
        }
        if !is_supported(gradient.dtype()) {
            bail!(
                "gradient of `{name}`: expected f32, f64, bf16 or f16, got {:?}",
                gradient.dtype()
            )
        }
        Ok(())
    }

    /// A gradient must not be in the storage of a variable, of which `storages` is the sorted list.
    pub fn check_alias(&self, address: usize, storages: &[usize]) -> Result<()> {
        if storages.binary_search(&address).is_ok() {
            bail!(
                "gradient of `{}`: it shares its memory with a parameter, which the step writes to; \
                 pass a copy",
                self.name
            )
        }
        Ok(())
    }

    /// The parameter as it was kept.
    pub fn kept(&self) -> Option<&Tensor> {
        let Kept { memory, valid } = &self.old;
        memory.as_deref().filter(|_| *valid)
    }

    /// The masters, on the host.
    pub fn master_values(&self) -> Result<Option<Vec<f32>>> {
        let bytes = self.state.master.as_ref().map(|master| master.to_bytes(self.n)).transpose()?;
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(bytes.map(|bytes| bytes.chunks_exact(4).map(value).collect()))
    }
}

/// The names of a block's state, as [`State::named`] and checkpoints have them.
pub(crate) const STATE: [&str; 5] = ["master", "m", "v", "average", "q"];

/// Whether these settings ask for state of this name; masters depend on the parameter's dtype too.
pub(crate) fn has_state(params: &ParamsSrkl, name: &str) -> bool {
    match name {
        "m" => params.direction != Direction::Gradient,
        "v" => matches!(params.direction, Direction::Adam { .. }),
        "average" => params.average.is_some(),
        "q" => matches!(params.curvature, Curvature::Hutchinson { .. }),
        _ => false,
    }
}

impl State {
    /// What there is, by name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Buffer)> {
        let Self { master, m, v, average, q } = self;
        let all = STATE.into_iter().zip([master, m, v, average, q]);
        all.filter_map(|(name, buffer)| Some((name, buffer.as_ref()?)))
    }

    pub fn named_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Buffer)> {
        let Self { master, m, v, average, q } = self;
        let all = STATE.into_iter().zip([master, m, v, average, q]);
        all.filter_map(|(name, buffer)| Some((name, buffer.as_mut()?)))
    }
}

impl Buffer {
    fn zeros(var: &Var) -> Result<Self> {
        let n = var.elem_count();
        Ok(match (var.device(), var.dtype()) {
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), DType::F64) => Self::CudaF64(device.alloc_zeros(n.max(1))?),
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), _) => Self::CudaF32(device.alloc_zeros(n.max(1))?),
            (_, DType::F64) => Self::F64(vec![0.; n]),
            _ => Self::F32(vec![0.; n]),
        })
    }

    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
            #[cfg(feature = "cuda")]
            Self::CudaF32(_) => DType::F32,
            #[cfg(feature = "cuda")]
            Self::CudaF64(_) => DType::F64,
        }
    }

    /// Its `n` numbers on the host, little-endian.
    pub fn to_bytes(&self, n: usize) -> Result<Vec<u8>> {
        let narrow = |values: &[f32]| values[..n].iter().flat_map(|x| x.to_le_bytes()).collect();
        let wide = |values: &[f64]| values[..n].iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(match self {
            Self::F32(values) => narrow(values),
            Self::F64(values) => wide(values),
            #[cfg(feature = "cuda")]
            Self::CudaF32(values) => narrow(&values.stream().clone_dtoh(values).w()?),
            #[cfg(feature = "cuda")]
            Self::CudaF64(values) => wide(&values.stream().clone_dtoh(values).w()?),
        })
    }

    /// Replaces all of its numbers, little-endian.
    pub fn set(&mut self, bytes: &[u8]) -> Result<()> {
        let (narrow, _) = bytes.as_chunks::<4>();
        let narrow = narrow.iter().map(|b| f32::from_le_bytes(*b));
        let (wide, _) = bytes.as_chunks::<8>();
        let wide = wide.iter().map(|b| f64::from_le_bytes(*b));
        match self {
            Self::F32(values) => values.iter_mut().zip(narrow).for_each(|(x, y)| *x = y),
            Self::F64(values) => values.iter_mut().zip(wide).for_each(|(x, y)| *x = y),
            #[cfg(feature = "cuda")]
            Self::CudaF32(values) => {
                let host: Vec<f32> = narrow.collect();
                values.stream().clone().memcpy_htod(&host, values).w()?;
            }
            #[cfg(feature = "cuda")]
            Self::CudaF64(values) => {
                let host: Vec<f64> = wide.collect();
                values.stream().clone().memcpy_htod(&host, values).w()?;
            }
        }
        Ok(())
    }
}

/// Equal for tensors that share their memory, as candle shares it: one storage behind one lock.
pub(crate) fn storage_address(storage: &Storage) -> usize {
    std::ptr::from_ref(storage).addr()
}
