//! Master weights: copies of 32 bits of parameters of 16 bits. They are made from, compared with, and updated from
//! these.

use candle_core::{CpuStorage, DType, Device, Result, Tensor, bail};
use half::bf16;

use super::cpu::access::{Parameter, Samples, agree, cpu_storage};
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

/// Runs `$f` on the elements of a parameter of 16 bits that are stepped here.
macro_rules! with_elements {
    ($block:expr, $w:ident => $f:expr) => {{
        let own = $block.own()?.to_device(&Device::Cpu)?;
        let (storage, layout) = own.storage_and_layout();
        let range = layout.start_offset()..layout.start_offset() + $block.n;
        match cpu_storage(&storage)? {
            CpuStorage::BF16(w) => {
                let $w = &w[range];
                $f
            }
            CpuStorage::F16(w) => {
                let $w = &w[range];
                $f
            }
            _ => bail!("expected a parameter of bf16 or f16"),
        }
    }};
}

/// Updates `master` from a parameter that was written outside of the optimizer. Returns whether anything changed.
fn sync_master(block: &Block, master: &mut [f32]) -> Result<bool> {
    Ok(with_elements!(block, w => reconcile(w, master)))
}

/// The first element of a parameter that is not what `master`, of the whole parameter, rounds to.
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
            let mut master = Slot::zeros(&block.var, block.n, Format::Split)?;
            note(&mut master, block)?;
            Ok(Some(master))
        }
        Some(_) => {
            // A NaN agrees with nothing but a NaN, so all elements are set.
            let mut values = vec![f32::NAN; block.n];
            sync_master(block, &mut values)?;
            Slot::of_f32(&block.var, values).map(Some)
        }
    }
}

/// Updates the masters of a block whose parameter was written outside of the optimizer: `overwritten` as a whole, if that is
/// known, or in some elements.
pub(crate) fn sync(block: &mut Block, overwritten: Option<bool>) -> Result<()> {
    with_master(block, |master, block| sync_slot(master, block, overwritten))
}

/// Whether a parameter seems to have been overwritten as a whole, by the samples of it that are stepped here.
pub(crate) fn is_overwritten(block: &Block) -> Result<bool> {
    let Some(master) = &block.state.master else { return Ok(false) };
    let samples = Samples::of(block);
    Ok(match &*master.to_cpu()? {
        CpuStorage::F32(master) => {
            with_elements!(block, w => samples.each().any(|(_, i)| !agree(w[i], master[i])))
        }
        CpuStorage::I16(numbers) => {
            let noted = Format::samples(numbers, block.n);
            with_elements!(block, w => samples.differ(w, noted))
        }
        _ => false,
    })
}

/// Takes the masters of a block from its parameter, which was overwritten.
pub(crate) fn reset(block: &mut Block) -> Result<()> {
    with_master(block, |master, block| {
        if master.format() == Format::Split {
            let CpuStorage::I16(mut numbers) = master.to_cpu()?.into_owned() else { return Ok(()) };
            Format::split_parts(&mut numbers, block.n).0.fill(0);
            master.write(CpuStorage::I16(numbers))?;
            return note(master, block);
        }
        let values = with_elements!(block, w => w.iter().map(|w| w.widen()).collect());
        master.write(CpuStorage::F32(values))
    })
}

/// Notes the samples of a parameter in its split master, whose remainders have been loaded.
pub(crate) fn after_loading(block: &mut Block) -> Result<()> {
    with_master(block, |master, block| match master.format() {
        Format::Split => note(master, block),
        _ => Ok(()),
    })
}

/// Runs `f` on the masters of a block, if there are any, beside the block.
fn with_master(block: &mut Block, f: impl FnOnce(&mut Slot, &Block) -> Result<()>) -> Result<()> {
    let Some(mut master) = block.state.master.take() else { return Ok(()) };
    let done = f(&mut master, block);
    block.state.master = Some(master);
    done
}

fn sync_slot(master: &mut Slot, block: &Block, overwritten: Option<bool>) -> Result<()> {
    if master.format() == Format::Split {
        let CpuStorage::I16(mut numbers) = master.to_cpu()?.into_owned() else { return Ok(()) };
        let (rests, noted) = Format::split_parts(&mut numbers, block.n);
        let w = bf16s(block)?;
        let overwritten = overwritten.unwrap_or_else(|| Samples::of(block).differ(&w, noted));
        let mut any = overwritten;
        for (w, rest) in w.iter().zip(rests) {
            // A remainder of another parameter is a number of this one's precision, which must round to it.
            if *rest != 0 && (overwritten || !agree(*w, join(w.to_bits(), *rest))) {
                (*rest, any) = (0, true);
            }
        }
        if any {
            Samples::of(block).note(&w, noted);
            master.write(CpuStorage::I16(numbers))?;
        }
        return Ok(());
    }
    if let Some(CpuStorage::F32(values)) = master.cpu_mut() {
        return sync_master(block, values).map(|_| ());
    }
    let mut values = master.to_f32()?;
    match sync_master(block, &mut values)? {
        true => master.write(CpuStorage::F32(values)),
        false => Ok(()),
    }
}

/// Notes the samples of the parameter in its split master, by which it is noticed that the parameter was overwritten.
fn note(master: &mut Slot, block: &Block) -> Result<()> {
    let CpuStorage::I16(mut numbers) = master.to_cpu()?.into_owned() else { return Ok(()) };
    let noted = Format::split_parts(&mut numbers, block.n).1;
    Samples::of(block).note(&bf16s(block)?, noted);
    master.write(CpuStorage::I16(numbers))
}

/// The masters of the elements of a block that are stepped here, on the host.
pub(crate) fn values(block: &Block) -> Result<Option<Vec<f32>>> {
    let Some(master) = &block.state.master else { return Ok(None) };
    if master.format() == Format::F32 {
        return master.to_f32().map(Some);
    }
    let beside = Beside { v: None, parameter: &bf16s(block)? };
    master.save()?.to_f32("master", beside).map(Some)
}

/// The elements of a bf16 parameter that are stepped here, on the host; nothing if it is of another dtype.
pub(crate) fn bf16s(block: &Block) -> Result<Vec<bf16>> {
    match block.dtype {
        DType::BF16 => block.own()?.to_vec1(),
        _ => Ok(vec![]),
    }
}
