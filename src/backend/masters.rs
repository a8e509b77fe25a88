//! Master weights: f32 copies of parameters of 16 bits, made, compared with their parameters and brought to them.

use candle_core::{CpuStorage, DType, Device, Result, Tensor, bail};

use super::access::{Parameter, agree, cpu_storage};
use crate::block::{Block, Buffer};
use crate::params::MasterWeights;

/// Gives masters that don't agree with their parameter its value. Returns whether there were any.
fn reconcile<P: Parameter>(w: &[P], master: &mut [P::Compute]) -> bool {
    let mut any = false;
    for (w, master) in w.iter().zip(master) {
        if !agree(*w, *master) {
            (*master, any) = (w.widen(), true);
        }
    }
    any
}

/// Brings `master` to a parameter that somebody else has written. Returns whether anything changed.
fn sync_master(var: &Tensor, master: &mut [f32]) -> Result<bool> {
    let (storage, _) = var.storage_and_layout();
    Ok(match cpu_storage(&storage)? {
        CpuStorage::BF16(w) => reconcile(w, master),
        CpuStorage::F16(w) => reconcile(w, master),
        _ => bail!("expected a parameter of bf16 or f16"),
    })
}

/// The masters of a bf16 or f16 parameter: its values.
fn new_master(var: &Tensor) -> Result<Vec<f32>> {
    // A NaN agrees with nothing but a NaN, so all elements are set.
    let mut master = vec![f32::NAN; var.elem_count()];
    sync_master(var, &mut master)?;
    Ok(master)
}

/// The first element of a parameter that is not what `master` rounds to.
pub(crate) fn first_disagreement(var: &Tensor, master: &[f32]) -> Result<Option<usize>> {
    fn first<P: Parameter<Compute = f32>>(w: &[P], master: &[f32]) -> Option<usize> {
        w.iter().zip(master).position(|(w, master)| !agree(*w, *master))
    }
    let (storage, _) = var.storage_and_layout();
    Ok(match cpu_storage(&storage)? {
        CpuStorage::BF16(w) => first(w, master),
        CpuStorage::F16(w) => first(w, master),
        _ => bail!("expected a parameter of bf16 or f16"),
    })
}

/// The masters of a block, if it should have some.
pub(crate) fn of_block(block: &Block, masters: MasterWeights) -> Result<Option<Buffer>> {
    let is_half = matches!(block.dtype, DType::BF16 | DType::F16);
    if !is_half || masters == MasterWeights::None {
        return Ok(None);
    }
    Ok(Some(match block.var.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Buffer::CudaF32(super::cuda::new_master(&block.var)?),
        _ => Buffer::F32(new_master(&block.var)?),
    }))
}

/// Brings the masters of a block to a parameter that somebody else has written.
pub(crate) fn sync(block: &mut Block) -> Result<()> {
    match &mut block.state.master {
        None => Ok(()),
        Some(Buffer::F32(values)) => sync_master(&block.var, values).map(|_| ()),
        Some(_) => {
            let mut values = block.master_values()?.unwrap_or_default();
            if !sync_master(&block.var.to_device(&Device::Cpu)?, &mut values)? {
                return Ok(());
            }
            let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            block.state.master.as_mut().map_or(Ok(()), |master| master.set(&bytes))
        }
    }
}
