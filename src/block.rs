//! [`Block`]: a parameter tensor with its state, the unit that the rule works on.

use std::borrow::Cow;

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, TensorId, Var, bail};

use crate::backend::cpu;
use crate::backend::gradient::{Gradient, is_supported};
use crate::params::MasterWeights;

/// A parameter tensor and its state.
///
/// What a step asks of the variable is kept beside it: with thousands of small tensors its time
/// goes into following pointers.
pub(crate) struct Block {
    pub name: String,
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
    pub master: Option<Master>,
    /// How often it was skipped alone.
    pub skipped: u64,
    pub last: Last,
}

/// Curvature and brake of the last step, if it moved the block.
pub(crate) type Last = Option<(f64, f64)>;

/// The f32 masters of a parameter, where the parameter is.
pub(crate) enum Master {
    Cpu(Vec<f32>),
    #[cfg(feature = "cuda")]
    Cuda(CudaSlice<f32>),
}

impl Block {
    /// # Errors
    ///
    /// A variable on a device or of a dtype that is not handled, one that loses bits in its master,
    /// or one that is not as candle makes variables.
    pub fn new(name: String, var: Var, group: usize, masters: MasterWeights) -> Result<Self> {
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
        let is_half = matches!(dtype, DType::BF16 | DType::F16);
        let master = match masters {
            MasterWeights::Auto | MasterWeights::F32 if is_half => Some(Master::new(&var)?),
            _ => None,
        };
        let (storage, elements) = {
            let (storage, layout) = var.storage_and_layout();
            let elements = if on_cpu { Gradient::new(&storage, layout)?.address() } else { 0 };
            (storage_address(&storage), elements)
        };
        let (id, shape, n) = (var.id(), var.shape().clone(), var.elem_count());
        let (skipped, last) = (0, None);
        Ok(Self {
            name,
            var,
            id,
            dtype,
            shape,
            n,
            on_cpu,
            storage,
            elements,
            group,
            master,
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

    /// The masters, on the host.
    pub fn master_values(&self) -> Result<Option<Cow<'_, [f32]>>> {
        Ok(match &self.master {
            None => None,
            Some(Master::Cpu(values)) => Some(Cow::Borrowed(values.as_slice())),
            #[cfg(feature = "cuda")]
            Some(Master::Cuda(values)) => {
                let mut host = self.var.device().as_cuda_device()?.clone_dtoh(values)?;
                host.truncate(self.n);
                Some(Cow::Owned(host))
            }
        })
    }

    /// Replaces the masters, if there are any, in place.
    pub fn set_master(&mut self, new: Vec<f32>) -> Result<()> {
        match &mut self.master {
            None => Ok(()),
            Some(Master::Cpu(values)) => {
                *values = new;
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Some(Master::Cuda(_)) if new.is_empty() => Ok(()),
            #[cfg(feature = "cuda")]
            Some(Master::Cuda(values)) => {
                self.var.device().as_cuda_device()?.memcpy_htod(&new, values)
            }
        }
    }

    /// Brings the masters to a parameter that somebody else has written.
    pub fn sync_master(&mut self) -> Result<()> {
        match &mut self.master {
            None => Ok(()),
            Some(Master::Cpu(values)) => cpu::sync_master(&self.var, values).map(|_| ()),
            #[cfg(feature = "cuda")]
            Some(Master::Cuda(_)) => {
                let mut values = self.master_values()?.unwrap_or_default().into_owned();
                match cpu::sync_master(&self.var.to_device(&Device::Cpu)?, &mut values)? {
                    true => self.set_master(values),
                    false => Ok(()),
                }
            }
        }
    }
}

impl Master {
    fn new(var: &Var) -> Result<Self> {
        match var.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Ok(Self::Cuda(crate::backend::cuda::new_master(var)?)),
            _ => Ok(Self::Cpu(cpu::new_master(var)?)),
        }
    }
}

/// Equal for tensors that share their memory, as candle shares it: one storage behind one lock.
pub(crate) fn storage_address(storage: &Storage) -> usize {
    std::ptr::from_ref(storage).addr()
}
