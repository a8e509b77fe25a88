//! Replaces parameters by perturbed ones or averages for a while, and restores them.

use candle_core::{CpuStorage, Result, Tensor, Var, bail};
use rayon::prelude::*;

use super::access::{Parameter, cpu_storage, with_storage_mut};
use super::rows::{Exact, Packed, StateRows};
use super::statistics::{PIECE, splits};
use crate::block::{Backup, Block};
use crate::numerics::{LANES, Real, random_bits};

/// `w <- w + size * z`, with the random signs `z` of the block at `place` in the measurement of number `draw`: of the
/// elements that are stepped here.
pub(crate) fn perturb(block: &Block, place: u64, size: f64, seed: u64, draw: u64) -> Result<()> {
    fn add<P: Parameter>(w: &mut [P], size: f64, bits: impl Fn(u64) -> u64 + Sync) {
        let size = P::Compute::from_f64(size);
        let add = |(piece, w): (usize, &mut [P])| {
            for (word, w) in w.chunks_mut(64).enumerate() {
                let bits = bits((piece * PIECE / 64 + word) as u64);
                for (i, w) in w.iter_mut().enumerate() {
                    let by = if bits >> i & 1 == 0 { size } else { size.neg() };
                    *w = P::narrow(w.widen().add(by).canonical());
                }
            }
        };
        match splits(w.len()) {
            true => w.par_chunks_mut(PIECE).enumerate().for_each(add),
            false => w.chunks_mut(PIECE).enumerate().for_each(add),
        }
    }
    if block.n == 0 {
        return Ok(());
    }
    let own = block.first..block.first + block.n;
    // A part begins with a chunk, and so with a word.
    let bits = |word| random_bits(seed, draw, place, (block.first / 64) as u64 + word);
    with_storage_mut(&block.var, |storage| {
        match storage {
            CpuStorage::F32(w) => add(&mut w[own], size, bits),
            CpuStorage::F64(w) => add(&mut w[own], size, bits),
            CpuStorage::BF16(w) => add(&mut w[own], size, bits),
            CpuStorage::F16(w) => add(&mut w[own], size, bits),
            _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
        }
        Ok(())
    })
}

/// Copies a parameter to a variable of the same dtype and size.
fn copy(from: &Tensor, to: &Var) -> Result<()> {
    fn pieces<P: Parameter>(from: &[P], to: &mut [P]) {
        let copy = |(to, from): (&mut [P], &[P])| to.copy_from_slice(from);
        match splits(to.len()) {
            true => to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(copy),
            false => copy((to, from)),
        }
    }
    if from.elem_count() == 0 {
        return Ok(());
    }
    let (storage, _) = from.storage_and_layout();
    let from = cpu_storage(&storage)?;
    with_storage_mut(to, |to| {
        match (from, to) {
            (CpuStorage::F32(from), CpuStorage::F32(to)) => pieces(from, to),
            (CpuStorage::F64(from), CpuStorage::F64(to)) => pieces(from, to),
            (CpuStorage::BF16(from), CpuStorage::BF16(to)) => pieces(from, to),
            (CpuStorage::F16(from), CpuStorage::F16(to)) => pieces(from, to),
            _ => bail!("expected two parameters of f32, f64, bf16 or f16"),
        }
        Ok(())
    })
}

/// Replaces the elements that are stepped here by their average.
pub(crate) fn swap_average(block: &mut Block) -> Result<()> {
    fn put<P: Parameter>(w: &mut [P], state: impl StateRows<P::Compute>) {
        let put = |(piece, w): (usize, &mut [P])| {
            let mut room = Default::default();
            for (row, w) in w.chunks_mut(LANES).enumerate() {
                let start = piece * PIECE + row * LANES;
                let average = state.read_average(start, w.len(), &mut room).unwrap_or_default();
                w.iter_mut().zip(average).for_each(|(w, average)| *w = P::narrow(*average));
            }
        };
        match splits(w.len()) {
            true => w.par_chunks_mut(PIECE).enumerate().for_each(put),
            false => w.chunks_mut(PIECE).enumerate().for_each(put),
        }
    }
    if block.n == 0 {
        return Ok(());
    }
    let Block { var, state, n, first, .. } = block;
    let (n, own) = (*n, *first..*first + *n);
    with_storage_mut(var, |storage| {
        if state.is_packed() {
            let state = Packed::to_read(state, n);
            match storage {
                CpuStorage::F32(w) => put(&mut w[own], state),
                CpuStorage::BF16(w) => put(&mut w[own], state),
                CpuStorage::F16(w) => put(&mut w[own], state),
                _ => bail!("expected a parameter of f32, bf16 or f16"),
            }
            return Ok(());
        }
        match storage {
            CpuStorage::F32(w) => put(&mut w[own], Exact::new(state)),
            CpuStorage::F64(w) => put(&mut w[own], Exact::new(state)),
            CpuStorage::BF16(w) => put(&mut w[own], Exact::new(state)),
            CpuStorage::F16(w) => put(&mut w[own], Exact::new(state)),
            _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
        }
        Ok(())
    })
}

/// Backs up the whole parameter.
pub(crate) fn back_up(block: &mut Block) -> Result<()> {
    let Backup { memory, valid } = &mut block.backup;
    match memory {
        Some(memory) => copy(&block.var, memory)?,
        None => *memory = Some(Var::from_tensor(&block.var.detach())?),
    }
    *valid = true;
    Ok(())
}

/// Restores the parameter from its backup, bit for bit.
pub(crate) fn restore(block: &mut Block) -> Result<()> {
    let restored = match block.backup() {
        Some(old) => copy(old, &block.var),
        None => Ok(()),
    };
    block.backup.valid = false;
    restored
}
