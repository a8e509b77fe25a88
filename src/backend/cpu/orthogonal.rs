//! [`Direction::Muon`]: the momentum of matrices, orthogonalised.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::super::GradSums;
use super::super::newton_schulz::newton_schulz;
use super::access::with_storage_mut;
use super::gradient::{Compute, Gradient};
use super::rows::{Exact, Packed, StateRows};
use super::simd::{Kernel, Simd};
use super::statistics::{self, InputRows, PIECE, Scratch, splits};
use super::update::BlockStep;
use crate::block::Block;
use crate::numerics::LANES;
use crate::params::Direction;
use crate::rule::Moments;

const OTHER_TYPE: &str = "expected room of the compute type";

/// Room for the matrices of a block that is stepped here. Those of f64 parameters are in f64, all others in f32.
pub(crate) fn make_room(block: &mut Block) -> Result<()> {
    if let Some(matrices) = block.matrices.filter(|_| block.n > 0) {
        let dtype = if block.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let shape = (matrices.count, matrices.rows, matrices.cols);
        block.orthogonal = Some(Tensor::zeros(shape, dtype, block.var.device())?);
    }
    Ok(())
}

/// Writes to a block's room the momentum that the step follows, each matrix divided by its Frobenius norm. The block's
/// state stays as it is.
pub(crate) fn write_momentum(
    block: &mut Block,
    gradient: &Tensor,
    step: BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<()> {
    fn write<C: Compute>(
        state: impl StateRows<C>,
        room: &Tensor,
        g: &Gradient,
        step: BlockStep,
        simd: Simd,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let moments = step.coefficients::<C>().moments;
        with_storage_mut(room, |storage| {
            let Some(x) = C::numbers_mut(storage) else { bail!("{OTHER_TYPE}") };
            let write = |scratch: &mut Scratch, (piece, x): (usize, &mut [C])| {
                let (state, start) = (&state, piece * PIECE);
                simd.run(Momentum { start, x, g, state, moments, scratch })
            };
            match splits(x.len()) {
                true => x.par_chunks_mut(PIECE).enumerate().for_each_init(Scratch::new, write),
                false => write(scratch, (0, x)),
            }
            Ok(())
        })?;
        let is_f64 = room.dtype() == DType::F64;
        let norms = (0..room.dim(0)?).map(|i| {
            let matrix = room.narrow(0, i, 1)?;
            let (storage, layout) = matrix.storage_and_layout();
            let matrix = Gradient::new(&storage, layout)?;
            Ok(statistics::sums(&matrix, is_f64, GradSums::Sum2AndSum4, simd, scratch).norm(1.))
        });
        let norms = norms.collect::<Result<Vec<f64>>>()?;
        with_storage_mut(room, |storage| {
            let Some(x) = C::numbers_mut(storage) else { bail!("{OTHER_TYPE}") };
            let n = x.len() / norms.len();
            for (x, norm) in x.chunks_mut(n).zip(norms) {
                let divide = |x: &mut [C]| simd.run(Divide { x, norm });
                match splits(n) {
                    true => x.par_chunks_mut(PIECE).for_each(divide),
                    false => divide(x),
                }
            }
            Ok(())
        })
    }
    let Some(room) = block.orthogonal.clone() else { return Ok(()) };
    let (storage, layout) = gradient.storage_and_layout();
    let g = &Gradient::new(&storage, layout)?;
    let state = &mut block.state;
    match block.dtype {
        DType::F64 => write(Exact::<f64>::new(state), &room, g, step, simd, scratch),
        _ if state.is_packed() => {
            let state = Packed::to_read(state, block.n);
            write(state, &room, g, step, simd, scratch)
        }
        _ => write(Exact::<f32>::new(state), &room, g, step, simd, scratch),
    }
}

/// The momentum of elements from `start` on.
struct Momentum<'a, C, S> {
    start: usize,
    x: &'a mut [C],
    g: &'a Gradient<'a>,
    state: &'a S,
    moments: Moments<C>,
    scratch: &'a mut Scratch,
}

impl<C: Compute, S: StateRows<C>> Kernel for Momentum<'_, C, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { start, x, g, state, moments, scratch } = self;
        let InputRows { tensors: [row, _], state: room } = &mut scratch.rows.inputs;
        let ahead = matches!(moments.direction, Direction::Muon { nesterov: true, .. });
        for (i, x) in x.chunks_mut(LANES).enumerate() {
            let at = start + i * LANES;
            let g = g.row::<C>(at, x.len(), row);
            let m = state.read(at, x.len(), room).m.unwrap_or_default();
            for ((x, m), g) in x.iter_mut().zip(m).zip(g) {
                *x = moments.first_moment(*m, *g);
                if ahead {
                    *x = moments.look_ahead(*x, *g);
                }
            }
        }
    }
}

/// `x <- x / norm`; 0 if the norm is 0.
struct Divide<'a, C> {
    x: &'a mut [C],
    norm: f64,
}

impl<C: Compute> Kernel for Divide<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { x, norm } = self;
        if norm != 0. {
            x.iter_mut().for_each(|x| *x = C::from_f64(x.to_f64() / norm));
        }
    }
}

/// Orthogonalises the matrices that [`write_momentum`] has left in the room of a block.
pub(crate) fn orthogonalize(block: &Block, steps: u32, simd: Simd) -> Result<()> {
    let Some(room) = &block.orthogonal else { return Ok(()) };
    newton_schulz(room, steps, |y, a, x, b| y.inplace_op2(x, &Combine { a, b, simd }))
}

/// `y <- a y + b x`
struct Combine {
    a: f64,
    b: f64,
    simd: Simd,
}

impl InplaceOp2 for Combine {
    fn name(&self) -> &'static str {
        "srkl-combine"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, _: &Layout, x: &CpuStorage, _: &Layout) -> Result<()> {
        let Self { a, b, simd } = *self;
        match (y, x) {
            (CpuStorage::F32(y), CpuStorage::F32(x)) => simd.run(CombineRows { y, x, a, b }),
            (CpuStorage::F64(y), CpuStorage::F64(x)) => simd.run(CombineRows { y, x, a, b }),
            _ => bail!("expected two tensors of f32 or f64"),
        }
        Ok(())
    }
}

struct CombineRows<'a, C> {
    y: &'a mut [C],
    x: &'a [C],
    a: f64,
    b: f64,
}

impl<C: Compute> Kernel for CombineRows<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (a, b) = (C::from_f64(self.a), C::from_f64(self.b));
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = x.mul_add(b, a.mul(*y));
        }
    }
}
