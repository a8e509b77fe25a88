//! Master weights: copies of 32 bits of parameters of 16 bits. They are made from, compared with, and updated from
//! these.

use candle_core::{CpuStorage, DType, Device, Result, Tensor, bail};
use half::bf16;

use super::cpu::access::{self, Parameter, agree, cpu_storage, differs};
use crate::block::Block;
use crate::compact::join;
use crate::params::MasterWeights;
use crate::state::{Beside, Format, Slot, master_format};

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
    match master_format(masters, block.dtype) {
        None => Ok(None),
        Some(Format::Split) => {
            let mut master = Slot::zeros(&block.var, Format::Split)?;
            note(&mut master, block)?;
            Ok(Some(master))
        }
        Some(_) => {
            // A NaN agrees with nothing but a NaN, so all elements are set.
            let mut values = vec![f32::NAN; block.n];
            sync_master(&block.var.to_device(&Device::Cpu)?, &mut values)?;
            Slot::of_f32(&block.var, values).map(Some)
        }
    }
}

/// Updates the masters of a block whose parameter was written outside of the optimizer.
pub(crate) fn sync(block: &mut Block) -> Result<()> {
    with_master(block, sync_slot)
}

/// Notes the samples of a parameter in its split master, whose remainders have been loaded.
pub(crate) fn after_loading(block: &mut Block) -> Result<()> {
    with_master(block, |master, block| match master.format() {
        Format::Split => note(master, block),
        _ => Ok(()),
    })
}

/// Runs `f` on the masters of a block, if there are any, beside the block.
fn with_master(block: &mut Block, f: fn(&mut Slot, &Block) -> Result<()>) -> Result<()> {
    let Some(mut master) = block.state.master.take() else { return Ok(()) };
    let done = f(&mut master, block);
    block.state.master = Some(master);
    done
}

fn sync_slot(master: &mut Slot, block: &Block) -> Result<()> {
    if master.format() == Format::Split {
        let CpuStorage::I16(mut numbers) = master.to_cpu()?.into_owned() else { return Ok(()) };
        let (rests, noted) = Format::split_parts(&mut numbers, block.n);
        let w = bf16s(block)?;
        let overwritten = differs(&w, noted);
        let mut any = overwritten;
        for (w, rest) in w.iter().zip(rests) {
            // A remainder of another parameter is a number of this one's precision, which must round to it.
            if *rest != 0 && (overwritten || !agree(*w, join(w.to_bits(), *rest))) {
                (*rest, any) = (0, true);
            }
        }
        if any {
            access::note(&w, noted);
            master.write(CpuStorage::I16(numbers))?;
        }
        return Ok(());
    }
    if let Some(CpuStorage::F32(values)) = master.cpu_mut() {
        return sync_master(&block.var, values).map(|_| ());
    }
    let mut values = master.to_f32()?;
    match sync_master(&block.var.to_device(&Device::Cpu)?, &mut values)? {
        true => master.write(CpuStorage::F32(values)),
        false => Ok(()),
    }
}

/// Notes the samples of the parameter in its split master, by which it is noticed that the parameter was overwritten.
fn note(master: &mut Slot, block: &Block) -> Result<()> {
    let CpuStorage::I16(mut numbers) = master.to_cpu()?.into_owned() else { return Ok(()) };
    access::note(&bf16s(block)?, Format::split_parts(&mut numbers, block.n).1);
    master.write(CpuStorage::I16(numbers))
}

/// The masters of a block, on the host.
pub(crate) fn values(block: &Block) -> Result<Option<Vec<f32>>> {
    let Some(master) = &block.state.master else { return Ok(None) };
    if master.format() == Format::F32 {
        return master.to_f32().map(Some);
    }
    let beside = Beside { v: None, parameter: &bf16s(block)? };
    master.save()?.to_f32("master", beside).map(Some)
}

/// A bf16 parameter, on the host; nothing if it is of another dtype.
pub(crate) fn bf16s(block: &Block) -> Result<Vec<bf16>> {
    if block.dtype != DType::BF16 {
        return Ok(vec![]);
    }
    let parameter = block.var.to_device(&Device::Cpu)?;
    let (storage, _) = parameter.storage_and_layout();
    Ok(match cpu_storage(&storage)? {
        CpuStorage::BF16(w) => w[..block.n].to_vec(),
        _ => bail!("expected a parameter of bf16"),
    })
}
