//! Master weights: f32 copies of parameters of 16 bits. They are made from, compared with, and updated from these.

use candle_core::{CpuStorage, DType, Device, Result, Tensor, bail};

use super::cpu::access::{Parameter, agree, cpu_storage};
use crate::block::Block;
use crate::params::MasterWeights;
use crate::state::Slot;

/// Sets masters that do not round to their parameter to its value. Returns whether there were any.
fn reconcile<P: Parameter>(w: &[P], master: &mut [P::Compute]) -> bool {
    let mut any = false;
    for (w, master) in w.iter().zip(master) {
        if !agree(*w, *master) {
            (*master, any) = (w.widen(), true);
        }
    }
    any
}

/// Updates `master` from a parameter that was written outside of the optimizer. Returns whether anything changed.
fn sync_master(var: &Tensor, master: &mut [f32]) -> Result<bool> {
    let (storage, _) = var.storage_and_layout();
    Ok(match cpu_storage(&storage)? {
        CpuStorage::BF16(w) => reconcile(w, master),
        CpuStorage::F16(w) => reconcile(w, master),
        _ => bail!("expected a parameter of bf16 or f16"),
    })
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

/// The masters of a block, if it should have some, with the values of the parameter.
pub(crate) fn of_block(block: &Block, masters: MasterWeights) -> Result<Option<Slot>> {
    let is_half = matches!(block.dtype, DType::BF16 | DType::F16);
    if !is_half || masters == MasterWeights::None {
        return Ok(None);
    }
    // A NaN agrees with nothing but a NaN, so all elements are set.
    let mut values = vec![f32::NAN; block.n];
    sync_master(&block.var.to_device(&Device::Cpu)?, &mut values)?;
    Slot::of_f32(&block.var, values).map(Some)
}

/// Updates the masters of a block whose parameter was written outside of the optimizer.
pub(crate) fn sync(block: &mut Block) -> Result<()> {
    let Some(master) = &mut block.state.master else { return Ok(()) };
    if let Some(CpuStorage::F32(values)) = master.cpu_mut() {
        return sync_master(&block.var, values).map(|_| ());
    }
    let mut values = master.to_f32()?;
    match sync_master(&block.var.to_device(&Device::Cpu)?, &mut values)? {
        true => master.write_f32(values),
        false => Ok(()),
    }
}
