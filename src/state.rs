//! The state that is kept for a parameter: where, and in which format.

use std::borrow::Cow;
use std::fmt::Debug;
use std::mem::discriminant;

use candle_core::backend::{BackendDevice, BackendStorage};
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CpuStorage, DType, Device, Result, Storage, Var, bail};

use crate::params::{Curvature, Direction, ParamsSrkl};

/// The state of a block: for each kind that its settings need, one number per element.
#[derive(Default)]
pub(crate) struct State {
    /// f32 masters of a parameter of 16 bits.
    pub master: Option<Slot>,
    /// The first moment, of all directions but [`Direction::Gradient`].
    pub m: Option<Slot>,
    /// The second moment of [`Direction::Adam`].
    pub v: Option<Slot>,
    /// The average of the parameter.
    pub average: Option<Slot>,
    /// The squared row norms of [`Curvature::Hutchinson`].
    pub q: Option<Slot>,
}

/// The names of a block's state, as [`State::named`] and checkpoints have them.
pub(crate) const STATE: [&str; 5] = ["master", "m", "v", "average", "q"];

/// Whether these settings ask for state of this name; masters depend on the parameter's dtype too.
fn has_state(params: &ParamsSrkl, name: &str) -> bool {
    match name {
        "m" => params.direction != Direction::Gradient,
        "v" => matches!(params.direction, Direction::Adam { .. }),
        "average" => params.average.is_some(),
        "q" => matches!(params.curvature, Curvature::Hutchinson(_)),
        _ => false,
    }
}

/// An error if the settings `new` of a group need other state than `built`, those that it was built with.
pub(crate) fn refuse_other_state(group: &str, built: &ParamsSrkl, new: &ParamsSrkl) -> Result<()> {
    for name in STATE {
        let (had, has) = (has_state(built, name), has_state(new, name));
        if had != has {
            let expected = if had { "settings that keep" } else { "settings without" };
            bail!(
                "group `{group}`: expected {expected} the state `{name}`, as it was built, got {new:?}"
            )
        }
    }
    // The same name, with numbers that mean something else.
    let other_kind = |field: &str, built: &dyn Debug, new: &dyn Debug| -> Result<()> {
        bail!(
            "`{field}` of group `{group}`: expected one of the kind of {built:?}, as it was built, got {new:?}"
        )
    };
    if discriminant(&built.direction) != discriminant(&new.direction) {
        other_kind("direction", &built.direction, &new.direction)?;
    }
    if let (Direction::Muon { bf16: had, .. }, Direction::Muon { bf16: has, .. }) =
        (built.direction, new.direction)
        && had != has
    {
        bail!(
            "`bf16` (Direction::Muon) of group `{group}`: expected {had}, as it was built, got {has}"
        )
    }
    if built.average.as_ref().map(discriminant) != new.average.as_ref().map(discriminant) {
        other_kind("average", &built.average, &new.average)?;
    }
    if built.master_weights != new.master_weights {
        bail!(
            "`master_weights` of group `{group}`: expected {:?} as it was built, got {:?}",
            built.master_weights,
            new.master_weights
        )
    }
    Ok(())
}

impl State {
    /// All zeros, and without masters: see `backend/masters.rs`.
    pub fn new(params: &ParamsSrkl, var: &Var) -> Result<Self> {
        let zeros = |name| has_state(params, name).then(|| Slot::zeros(var)).transpose();
        Ok(Self {
            master: None,
            m: zeros("m")?,
            v: zeros("v")?,
            average: zeros("average")?,
            q: zeros("q")?,
        })
    }

    /// The kinds of state that exist, by name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Slot)> {
        let Self { master, m, v, average, q } = self;
        let all = STATE.into_iter().zip([master, m, v, average, q]);
        all.filter_map(|(name, slot)| Some((name, slot.as_ref()?)))
    }

    pub fn named_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Slot)> {
        let Self { master, m, v, average, q } = self;
        let all = STATE.into_iter().zip([master, m, v, average, q]);
        all.filter_map(|(name, slot)| Some((name, slot.as_mut()?)))
    }
}

/// One kind of state of one block, on the parameter's device: for each element a number of the compute type.
///
/// The rest of the crate uses a format through the memory that it takes ([`Slot::storage`]) and the tensors that a
/// checkpoint saves it as ([`Slot::tensors`]). Its numbers are loaded and stored in `backend/cpu/rows.rs` and
/// `kernels/state.cuh`.
pub(crate) struct Slot {
    /// On a device at least one element long: 0 bytes can't be allocated there.
    storage: Storage,
    n: usize,
}

/// A tensor of a checkpoint that holds a kind of state, or a part of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SavedTensor {
    /// What is appended to the name of the state.
    pub suffix: &'static str,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl Slot {
    /// Zeros for each element of `var`, in its compute type.
    pub fn zeros(var: &Var) -> Result<Self> {
        let n = var.elem_count();
        let dtype = if var.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let storage = match var.device() {
            Device::Cpu => Storage::Cpu(match dtype {
                DType::F64 => CpuStorage::F64(vec![0.; n]),
                _ => CpuStorage::F32(vec![0.; n]),
            }),
            Device::Cuda(device) => Storage::Cuda(device.zeros_impl(&n.max(1).into(), dtype)?),
            device => bail!("no state on {:?}", device.location()),
        };
        Ok(Self { storage, n })
    }

    /// `values`, on the device of `var`.
    pub fn of_f32(var: &Var, values: Vec<f32>) -> Result<Self> {
        let mut slot = Self::zeros(var)?;
        slot.write_f32(values)?;
        Ok(slot)
    }

    /// Replaces all of its numbers.
    pub fn write_f32(&mut self, values: Vec<f32>) -> Result<()> {
        self.write(CpuStorage::F32(values))
    }

    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Its numbers, if they are on the CPU.
    pub fn cpu_mut(&mut self) -> Option<&mut CpuStorage> {
        match &mut self.storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    /// The tensors that a checkpoint saves it as, for a parameter of shape `dims`, in order.
    pub fn tensors(&self, dims: &[usize]) -> Vec<SavedTensor> {
        vec![SavedTensor { suffix: "", dtype: self.storage.dtype(), shape: dims.to_vec() }]
    }

    /// The bytes of each of [`Slot::tensors`], little-endian.
    pub fn to_bytes(&self) -> Result<Vec<Vec<u8>>> {
        Ok(vec![match &*self.to_cpu()? {
            CpuStorage::F32(values) => {
                values[..self.n].iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            CpuStorage::F64(values) => {
                values[..self.n].iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            other => bail!("no state is of {:?}", other.dtype()),
        }])
    }

    /// Replaces all of its numbers by those that [`Slot::to_bytes`] returned.
    pub fn set(&mut self, parts: &[Vec<u8>]) -> Result<()> {
        let [bytes] = parts else { bail!("expected one tensor, got {}", parts.len()) };
        let (narrow, _) = bytes.as_chunks::<4>();
        let (wide, _) = bytes.as_chunks::<8>();
        self.write(match self.storage.dtype() {
            DType::F64 => CpuStorage::F64(wide.iter().map(|b| f64::from_le_bytes(*b)).collect()),
            _ => CpuStorage::F32(narrow.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        })
    }

    /// Its numbers as f32, on the CPU.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match &*self.to_cpu()? {
            CpuStorage::F32(values) => Ok(values[..self.n].to_vec()),
            other => bail!("expected state of f32, got {:?}", other.dtype()),
        }
    }

    fn to_cpu(&self) -> Result<Cow<'_, CpuStorage>> {
        Ok(match &self.storage {
            Storage::Cpu(storage) => Cow::Borrowed(storage),
            Storage::Cuda(storage) => Cow::Owned(storage.to_cpu_storage()?),
            Storage::Metal(storage) => Cow::Owned(storage.to_cpu_storage()?),
        })
    }

    /// Replaces the numbers; on a device in place, since the kernels' table has their address.
    fn write(&mut self, values: CpuStorage) -> Result<()> {
        if self.n == 0 {
            return Ok(());
        }
        match &mut self.storage {
            Storage::Cpu(storage) => *storage = values,
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => match (&mut storage.slice, values) {
                (CudaStorageSlice::F32(slot), CpuStorage::F32(values)) => {
                    slot.stream().clone().memcpy_htod(&values, slot).w()?
                }
                (CudaStorageSlice::F64(slot), CpuStorage::F64(values)) => {
                    slot.stream().clone().memcpy_htod(&values, slot).w()?
                }
                _ => bail!("expected values of the state's dtype, f32 or f64"),
            },
            _ => bail!("no state on this device"),
        }
        Ok(())
    }
}
