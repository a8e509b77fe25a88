//! Stage 1, statistics: the sums over a block's gradient; and how work on a block is split into chunks.
//!
//! Which numbers are added in which order is part of the contract in [`numerics`](crate::numerics).

use std::marker::PhantomData;

use rayon::prelude::*;

use super::super::GradSums;
use super::gradient::{Aligned, Compute, Gradient, RowBuffer};
use super::pool::has_helpers;
use super::rows::Room;
use super::simd::{Kernel, Simd};
use crate::numerics::{CHUNK, LANES, MIN_LANES, Sums, pow2, scale_exponent, tree};

/// A block of up to this many elements is work for one thread. A larger one is split into pieces of this size: large
/// enough to outweigh the cost of handing them over, and a whole number of chunks.
///
/// Pieces run on the threads of the step's pool while the block's lock is held: see [`Pool`](super::pool::Pool) for
/// why no other work may be there.
pub(crate) const PIECE: usize = 8 * CHUNK;

/// Whether the work on a block of `n` elements is split.
pub(crate) fn splits(n: usize) -> bool {
    n > PIECE && has_helpers()
}

/// Working memory of one thread. (Not on the stack: threads nest.)
pub(crate) struct Scratch {
    pub rows: Rows,
    /// Lanes of up to three sums.
    pub lanes: [Box<Aligned<f64>>; 3],
}

/// Rows of numbers: what is read, a momentum that looks ahead, the direction, what is left of it, the terms of two sums.
#[derive(Default)]
pub(crate) struct Rows {
    pub inputs: InputRows,
    pub ahead: RowBuffer,
    pub d: RowBuffer,
    pub masked: RowBuffer,
    pub terms: [RowBuffer; 2],
}

/// Converted tensors, and decoded state.
#[derive(Default)]
pub(crate) struct InputRows {
    pub tensors: [RowBuffer; 2],
    pub state: Room,
}

impl Scratch {
    pub fn new() -> Self {
        Self { rows: Rows::default(), lanes: Default::default() }
    }
}

/// The sums over a block's gradient that are asked for. `wide`: the compute type is f64, not f32.
pub(crate) fn sums(
    g: &Gradient,
    wide: bool,
    asked: GradSums,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    match asked {
        GradSums::None => Sums::ZERO,
        _ if g.len() <= CHUNK => sums_of_chunk(g, wide, asked, 0, simd, scratch),
        _ => Sums::fold(&chunk_sums(g, wide, asked, simd, scratch)),
    }
}

/// The same for each of its chunks.
pub(crate) fn chunk_sums(
    g: &Gradient,
    wide: bool,
    asked: GradSums,
    simd: Simd,
    scratch: &mut Scratch,
) -> Vec<Sums> {
    let of_chunk =
        |scratch: &mut Scratch, chunk| sums_of_chunk(g, wide, asked, chunk, simd, scratch);
    match asked {
        GradSums::None => vec![],
        _ => each_chunk(g.len(), scratch, of_chunk),
    }
}

fn sums_of_chunk(
    g: &Gradient,
    wide: bool,
    asked: GradSums,
    chunk: usize,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    match (asked, wide) {
        (GradSums::None, _) => Sums::ZERO,
        (GradSums::FiniteOnly, false) => finite_sums::<f32>(g, chunk, simd, scratch),
        (GradSums::FiniteOnly, true) => finite_sums::<f64>(g, chunk, simd, scratch),
        (GradSums::Sum4, false) => power_sums::<f32, false>(g, chunk, simd, scratch),
        (GradSums::Sum4, true) => power_sums::<f64, false>(g, chunk, simd, scratch),
        (GradSums::Sum2AndSum4, false) => power_sums::<f32, true>(g, chunk, simd, scratch),
        (GradSums::Sum2AndSum4, true) => power_sums::<f64, true>(g, chunk, simd, scratch),
    }
}

fn finite_sums<C: Compute>(g: &Gradient, chunk: usize, simd: Simd, scratch: &mut Scratch) -> Sums {
    let (start, len) = elements_of(chunk, g.len());
    let finite = simd.run(ChunkFinite::<C> { g, start, len, scratch, compute: PhantomData });
    Sums { sum4: if finite { 0. } else { f64::NAN }, ..Sums::ZERO }
}

fn power_sums<C: Compute, const NORM: bool>(
    g: &Gradient,
    chunk: usize,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    let (start, len) = elements_of(chunk, g.len());
    simd.run(ChunkSums::<C, NORM> { g, start, len, scratch, compute: PhantomData })
}

/// The first element of a chunk of `n` elements, and their number.
fn elements_of(chunk: usize, n: usize) -> (usize, usize) {
    let start = chunk * CHUNK;
    (start, CHUNK.min(n - start))
}

/// Whether elements `start..start + len` of a gradient are finite.
struct ChunkFinite<'a, C> {
    g: &'a Gradient<'a>,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
    compute: PhantomData<C>,
}

impl<C: Compute> Kernel for ChunkFinite<'_, C> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { g, start, len, scratch, .. } = self;
        let InputRows { tensors: [row, _], .. } = &mut scratch.rows.inputs;
        let mut finite = true;
        for at in (0..len).step_by(LANES) {
            let row = g.row::<C>(start + at, LANES.min(len - at), row);
            // No early exit: without branches this is vectorized.
            finite &= row.iter().fold(true, |finite, g| finite & g.is_finite());
        }
        finite
    }
}

/// The results of `work` on every chunk of `n` elements, on several threads if the block is split.
pub(crate) fn each_chunk<T: Send>(
    n: usize,
    scratch: &mut Scratch,
    work: impl Fn(&mut Scratch, usize) -> T + Sync,
) -> Vec<T> {
    let chunks = 0..n.div_ceil(CHUNK);
    if !splits(n) {
        return chunks.map(|chunk| work(scratch, chunk)).collect();
    }
    let chunks = chunks.into_par_iter().with_min_len(PIECE / CHUNK);
    chunks.map_init(Scratch::new, |scratch, chunk| work(scratch, chunk)).collect()
}

/// The sums over elements `start..start + len` of a gradient, one chunk.
struct ChunkSums<'a, C, const NORM: bool> {
    g: &'a Gradient<'a>,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
    compute: PhantomData<C>,
}

impl<C: Compute, const NORM: bool> Kernel for ChunkSums<'_, C, NORM> {
    type Output = Sums;

    #[inline(always)]
    fn run(self) -> Sums {
        let Self { g, start, len, scratch, .. } = self;
        let Scratch { rows, lanes: [sum2, sum4, _] } = scratch;
        let InputRows { tensors: [row, _], .. } = &mut rows.inputs;
        let rows = || (0..len).step_by(LANES).map(|at| (start + at, LANES.min(len - at)));

        let mut exponent = 0;
        if C::SCALED {
            let mut max = 0f64;
            for (at, len) in rows() {
                for g in g.row::<C>(at, len, row) {
                    let magnitude = g.to_f64().abs();
                    if magnitude > max && magnitude < f64::INFINITY {
                        max = magnitude;
                    }
                }
            }
            exponent = scale_exponent(max);
        }
        let scale = pow2(-exponent);

        let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
        let (sum2, sum4) = (&mut sum2[..width], &mut sum4[..width]);
        sum4.fill(0.);
        if NORM {
            sum2.fill(0.);
        }
        for (at, len) in rows() {
            let row = g.row::<C>(at, len, row);
            for ((g, sum2), sum4) in row.iter().zip(sum2.iter_mut()).zip(sum4.iter_mut()) {
                let g = if C::SCALED { g.to_f64() * scale } else { g.to_f64() };
                let q = g * g;
                if NORM {
                    *sum2 += q;
                }
                *sum4 = q.mul_add(q, *sum4);
            }
        }
        let sum2 = if NORM { tree(sum2) } else { 0. };
        Sums { sum2, sum4: tree(sum4), exponent }
    }
}
