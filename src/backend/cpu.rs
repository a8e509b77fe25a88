//! The stages of a step over the elements of a block, on the CPU.
//!
//! Top to bottom: `statistics` and `update`, each with the loop that it runs; then sums over directions, and measured
//! curvature. The mathematics of an element is in [`rule`](crate::rule); which numbers are added in which order, here,
//! is part of the contract in [`numerics`](crate::numerics).

use std::marker::PhantomData;

use candle_core::{CpuStorage, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::access::{Parameter, agree, samples, with_storage_mut};
use super::gradient::{FromGradient, Gradient, RowBuffer};
use super::pool::has_helpers;
use super::simd::{Kernel, Simd};
use crate::block::{Block, Buffer, State};
use crate::estimate::{Estimate, StepSums};
use crate::numerics::{
    CHUNK, LANES, MIN_LANES, Pair, Real, STRIP, Sums, fold, pow2, scale_exponent, strip_sum, tree,
};
use crate::params::{Direction, ParamsSrkl};
use crate::rule::{Coefficients, Decision, Moments, Powers, apply_step, lerp};

/// Blocks up to this many elements are work for one thread, and a larger one is split into pieces
/// of this size: enough to outweigh the handing over, a whole number of chunks.
///
/// Pieces go to the threads of the pool that the step runs in, while the block's lock is held: see
/// [`Pool`](super::pool::Pool) for why no other work may be there.
pub(crate) const PIECE: usize = 8 * CHUNK;

/// Whether the work on a block of `n` elements is split.
pub(crate) fn splits(n: usize) -> bool {
    n > PIECE && has_helpers()
}

// ---------------------------------------------------------------------------------------------
// Stage 1: statistics

/// Working memory of one thread. (Not on the stack: threads nest.)
pub(crate) struct Scratch {
    rows: Rows,
    /// Lanes of up to three sums.
    lanes: [Vec<f64>; 3],
}

/// Rows of numbers: converted tensors, the direction, the terms of two sums.
#[derive(Default)]
pub(crate) struct Rows {
    tensors: [RowBuffer; 4],
    d: RowBuffer,
    terms: [RowBuffer; 2],
}

impl Scratch {
    pub fn new() -> Self {
        Self { rows: Rows::default(), lanes: [(); 3].map(|()| vec![0.; LANES]) }
    }
}

/// What a step asks of its gradients.
#[derive(Clone, Copy)]
pub(crate) enum Asked {
    /// Whether all elements are finite: `sum4` is 0, or a NaN.
    Finite,
    /// `sum4`
    Sum4,
    /// `sum2` and `sum4`
    Both,
}

/// The sums over a block's gradient, computed in f64 or (not `wide`) f32.
pub(crate) fn statistics(
    g: &Gradient,
    wide: bool,
    asked: Asked,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    match (wide, asked) {
        (false, Asked::Finite) => finite_sums::<f32>(g, simd, scratch),
        (false, Asked::Sum4) => block_sums::<f32, false>(g, simd, scratch),
        (false, Asked::Both) => block_sums::<f32, true>(g, simd, scratch),
        (true, Asked::Finite) => finite_sums::<f64>(g, simd, scratch),
        (true, Asked::Sum4) => block_sums::<f64, false>(g, simd, scratch),
        (true, Asked::Both) => block_sums::<f64, true>(g, simd, scratch),
    }
}

fn finite_sums<C: FromGradient>(g: &Gradient, simd: Simd, scratch: &mut Scratch) -> Sums {
    let finite = each_chunk(g.len(), scratch, |scratch, chunk| {
        let start = chunk * CHUNK;
        let len = CHUNK.min(g.len() - start);
        simd.run(ChunkFinite::<C> { g, start, len, scratch, compute: PhantomData })
    });
    let finite = finite.into_iter().all(|finite| finite);
    Sums { sum4: if finite { 0. } else { f64::NAN }, ..Sums::ZERO }
}

/// Whether elements `start..start + len` of a gradient are finite.
struct ChunkFinite<'a, C> {
    g: &'a Gradient<'a>,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
    compute: PhantomData<C>,
}

impl<C: FromGradient> Kernel for ChunkFinite<'_, C> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { g, start, len, scratch, .. } = self;
        let Rows { tensors: [row, ..], .. } = &mut scratch.rows;
        let mut finite = true;
        for at in (0..len).step_by(LANES) {
            let row = g.row::<C>(start + at, LANES.min(len - at), row);
            // To the end: without branches it is done in vectors.
            finite &= row.iter().fold(true, |finite, g| finite & g.is_finite());
        }
        finite
    }
}

fn block_sums<C: FromGradient, const NORM: bool>(
    g: &Gradient,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    let chunk_sums = |scratch: &mut Scratch, chunk: usize| {
        let start = chunk * CHUNK;
        let len = CHUNK.min(g.len() - start);
        simd.run(ChunkSums::<C, NORM> { g, start, len, scratch, compute: PhantomData })
    };
    if g.len() <= CHUNK {
        return chunk_sums(scratch, 0);
    }
    Sums::fold(&each_chunk(g.len(), scratch, chunk_sums))
}

/// What `work` makes of every chunk of `n` elements, over threads where they are worth it.
fn each_chunk<T: Send>(
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

impl<C: FromGradient, const NORM: bool> Kernel for ChunkSums<'_, C, NORM> {
    type Output = Sums;

    #[inline(always)]
    fn run(self) -> Sums {
        let Self { g, start, len, scratch, .. } = self;
        let Scratch { rows: Rows { tensors: [row, ..], .. }, lanes: [sum2, sum4, _] } = scratch;
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

// ---------------------------------------------------------------------------------------------
// Stage 3: update

/// Moves a block by its gradient, in place. If the step `measures`, the block's `step_sums` become what a
/// measurement, or telemetry, needs of it.
pub(crate) fn update(
    block: &mut Block,
    gradient: &Tensor,
    (params, decision): (&ParamsSrkl, &Decision),
    measures: bool,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<()> {
    block.step_sums = StepSums::default();
    block.strips.clear();
    if block.n == 0 {
        return Ok(()); // candle refuses to write to an empty tensor.
    }
    let (storage, layout) = gradient.storage_and_layout();
    let g = Gradient::new(&storage, layout)?;
    let numbers = &(params, decision, block.powers, block.estimate, measures);
    let Block { var, state, step_sums, strips, .. } = block;
    with_storage_mut(var, |storage| {
        (*step_sums, *strips) = match storage {
            CpuStorage::F32(w) => block_update(w, state, &g, numbers, simd, scratch),
            CpuStorage::F64(w) => block_update(w, state, &g, numbers, simd, scratch),
            CpuStorage::BF16(w) => block_update(w, state, &g, numbers, simd, scratch),
            CpuStorage::F16(w) => block_update(w, state, &g, numbers, simd, scratch),
            _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
        };
        Ok(())
    })
}

fn block_update<P: Parameter>(
    w: &mut [P],
    state: &mut State,
    g: &Gradient,
    (params, decision, powers, estimate, measures): &(
        &ParamsSrkl,
        &Decision,
        Powers,
        Estimate,
        bool,
    ),
    simd: Simd,
    scratch: &mut Scratch,
) -> (StepSums, Vec<f64>) {
    let n = w.len();
    let coefficients = Coefficients::new(params, decision, powers, estimate);
    let mut block = Part::new(w, state);
    if let Some(master) = &mut block.master
        && samples(n).any(|i| !agree(block.w[i], master[i]))
    {
        // Overwritten as a whole, it seems, and old fractions of the masters are worth nothing.
        master.iter_mut().zip(block.w.iter()).for_each(|(master, w)| *master = w.widen());
    }
    let update = |scratch: &mut Scratch, start, part| {
        simd.run(Update { start, part, g, coefficients, measures: *measures, scratch })
    };
    let parts: Vec<Stepped> = if !splits(n) {
        vec![update(scratch, 0, block)]
    } else {
        let pieces = block.pieces(PIECE).into_par_iter().enumerate();
        let update = |scratch: &mut Scratch, (i, part)| update(scratch, i * PIECE, part);
        pieces.map_init(Scratch::new, update).collect()
    };
    let chunks: Vec<[f64; 3]> = parts.iter().flat_map(|part| part.chunks.iter().copied()).collect();
    let strips = parts.into_iter().flat_map(|part| part.strips).collect();
    let [step, direction, along] = fold(chunks.len(), |chunk| chunks[chunk]);
    let scale = coefficients.scale * coefficients.scale;
    (StepSums { step, direction: direction * scale, along: along * scale }, strips)
}

/// What the update of a part leaves, if it measures.
#[derive(Default)]
struct Stepped {
    /// Of every chunk the sums of [`StepSums`], with the direction as it is before its `scale`.
    chunks: Vec<[f64; 3]>,
    /// Of every strip the sum of `D^2`.
    strips: Vec<f64>,
}

/// Neighbouring elements of a block: the parameter and its state.
struct Part<'a, P: Parameter> {
    w: &'a mut [P],
    master: Option<&'a mut [P::Compute]>,
    m: Option<&'a mut [P::Compute]>,
    v: Option<&'a mut [P::Compute]>,
    average: Option<&'a mut [P::Compute]>,
    q: Option<&'a mut [P::Compute]>,
}

impl<'a, P: Parameter> Part<'a, P> {
    fn new(w: &'a mut [P], state: &'a mut State) -> Self {
        fn numbers<C: FromGradient>(buffer: &mut Option<Buffer>) -> Option<&mut [C]> {
            buffer.as_mut().and_then(C::state_mut)
        }
        let State { master, m, v, average, q } = state;
        let [master, m, v, average, q] = [master, m, v, average, q].map(numbers);
        Self { w, master, m, v, average, q }
    }

    /// The first `len` elements, which are taken off.
    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        fn first<'a, T>(slice: &mut &'a mut [T], len: usize) -> &'a mut [T] {
            slice.split_off_mut(..len).unwrap_or_default()
        }
        Self {
            w: first(&mut self.w, len),
            master: self.master.as_mut().map(|x| first(x, len)),
            m: self.m.as_mut().map(|x| first(x, len)),
            v: self.v.as_mut().map(|x| first(x, len)),
            average: self.average.as_mut().map(|x| first(x, len)),
            q: self.q.as_mut().map(|x| first(x, len)),
        }
    }

    fn pieces(mut self, len: usize) -> Vec<Self> {
        let count = self.w.len().div_ceil(len);
        (0..count).map(|_| self.take(len.min(self.w.len()))).collect()
    }
}

/// The update of the elements of a part, which begins at `start`, that of a chunk.
struct Update<'a, P: Parameter> {
    start: usize,
    part: Part<'a, P>,
    g: &'a Gradient<'a>,
    coefficients: Coefficients<P::Compute>,
    /// Whether to sum up how it moves.
    measures: bool,
    scratch: &'a mut Scratch,
}

impl<P: Parameter> Kernel for Update<'_, P> {
    type Output = Stepped;

    #[inline(always)]
    fn run(self) -> Stepped {
        let Self { start, mut part, g, coefficients, measures, scratch } = self;
        let Scratch { rows: Rows { tensors: [row, before, ..], d, terms: [squares, _] }, lanes } =
            scratch;
        let Coefficients { moments, phi, element, average, .. } = coefficients;
        let (step_size, decay_factor) = coefficients.step_coefficients(phi);
        let n = part.w.len();
        let mut stepped = Stepped::default();
        for at in (0..n).step_by(LANES) {
            let Part { w, mut master, mut m, mut v, average: a, q } = part.take(LANES.min(n - at));
            let before = &mut P::Compute::buffer(before)[..w.len()];
            if measures {
                before.iter_mut().zip(&*w).for_each(|(before, w)| *before = w.widen());
            }
            let g = g.row(start + at, w.len(), row);
            let d: &[P::Compute] = match (moments.direction, m.as_deref_mut(), v.as_deref_mut()) {
                (Direction::Adam { .. }, Some(m), Some(v)) if element.is_none() => {
                    // In one loop: it has enough to compute while memory is waited for.
                    let step = |w, m: &mut P::Compute, v: &mut P::Compute, g| {
                        *m = moments.first_moment(*m, g);
                        *v = moments.second_moment(*v, g);
                        apply_step(w, m.div(moments.denom(*v)), step_size, decay_factor)
                    };
                    let state = m.iter_mut().zip(v).zip(g);
                    match &mut master {
                        Some(x) => {
                            for ((w, x), ((m, v), g)) in w.iter_mut().zip(x.iter_mut()).zip(state) {
                                *x = step(*x, m, v, *g);
                                *w = P::narrow(*x);
                            }
                        }
                        None => {
                            for (w, ((m, v), g)) in w.iter_mut().zip(state) {
                                *w = P::narrow(step(w.widen(), m, v, *g));
                            }
                        }
                    }
                    &[]
                }
                (Direction::Momentum { .. }, Some(m), _) => {
                    m.iter_mut().zip(g).for_each(|(m, g)| *m = moments.first_moment(*m, *g));
                    m
                }
                (Direction::Adam { .. }, Some(m), Some(v)) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for (((d, m), v), g) in d.iter_mut().zip(m).zip(v).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *v = moments.second_moment(*v, *g);
                        *d = m.div(moments.denom(*v));
                    }
                    d
                }
                _ => g,
            };
            match element {
                None if d.is_empty() => {}
                None => for_each(w, master.as_deref_mut(), d, |w, d| {
                    apply_step(w, d, step_size, decay_factor)
                }),
                Some(brake) => {
                    for i in 0..w.len() {
                        let q = q.as_ref().map_or(0., |q| q[i].to_f64());
                        let (step_size, decay_factor) =
                            coefficients.step_coefficients(brake.element_phi(g[i].to_f64(), q));
                        let master = master.as_deref_mut().map(|master| &mut master[i..=i]);
                        let (w, d) = (&mut w[i..=i], &d[i..=i]);
                        for_each(w, master, d, |w, d| apply_step(w, d, step_size, decay_factor));
                    }
                }
            }
            match (a, master) {
                (None, _) => {}
                (Some(a), Some(x)) => {
                    a.iter_mut().zip(x).for_each(|(a, x)| *a = lerp(*a, *x, average));
                }
                (Some(a), None) => {
                    a.iter_mut().zip(&*w).for_each(|(a, w)| *a = lerp(*a, w.widen(), average));
                }
            }
            if measures {
                let len = CHUNK.min(n - at / CHUNK * CHUNK);
                let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
                let lanes = lanes.each_mut().map(|lanes| &mut lanes[..width]);
                let [step, direction, along] = lanes;
                if at % CHUNK == 0 {
                    [&mut *step, direction, along].into_iter().for_each(|lanes| lanes.fill(0.));
                }
                let squares = &mut f64::buffer(squares)[..w.len()];
                step_squares(squares, before, w);
                step.iter_mut().zip(&*squares).for_each(|(lane, square)| *lane += square);
                stepped.strips.extend(squares.chunks(STRIP).map(strip_sum));
                let is_adam = match (m.as_deref(), v.as_deref()) {
                    (Some(m), Some(v)) => {
                        add_adam_direction(direction, along, m, v, &moments);
                        true
                    }
                    (m, _) => {
                        add_squares(direction, m.unwrap_or(g));
                        false
                    }
                };
                if at + w.len() == n || (at + w.len()) % CHUNK == 0 {
                    let (step, direction) = (tree(step), tree(direction));
                    let along = if is_adam { tree(along) } else { direction };
                    stepped.chunks.push([step, direction, along]);
                }
            }
        }
        stepped
    }
}

/// The terms of `D^2` of a row: `D` is the step as the parameter took it, rounded to its dtype.
#[inline(always)]
fn step_squares<P: Parameter>(squares: &mut [f64], before: &[P::Compute], w: &[P]) {
    for ((square, before), w) in squares.iter_mut().zip(before).zip(w) {
        let step = w.widen().to_f64() - before.to_f64();
        *square = step * step;
    }
}

/// Adds the terms of `d^2` and `d m` of a row, of Adam's direction `d = m / P`.
#[inline(always)]
fn add_adam_direction<C: Real>(
    direction: &mut [f64],
    along: &mut [f64],
    m: &[C],
    v: &[C],
    moments: &Moments<C>,
) {
    for (((direction, along), m), v) in direction.iter_mut().zip(along).zip(m).zip(v) {
        let d = m.div(moments.denom(*v)).to_f64();
        *direction += d * d;
        *along += d * m.to_f64();
    }
}

/// Adds the terms of `d^2` of a row: of any other direction `d m` is the same.
#[inline(always)]
fn add_squares<C: Real>(lanes: &mut [f64], d: &[C]) {
    for (lane, d) in lanes.iter_mut().zip(d) {
        *lane += d.to_f64() * d.to_f64();
    }
}

/// Steps every element of a row in the compute type, and stores it as the parameter's.
#[inline(always)]
fn for_each<P: Parameter>(
    w: &mut [P],
    master: Option<&mut [P::Compute]>,
    g: &[P::Compute],
    step: impl Fn(P::Compute, P::Compute) -> P::Compute,
) {
    match master {
        Some(master) => {
            for ((w, master), g) in w.iter_mut().zip(master).zip(g) {
                *master = step(*master, *g);
                *w = P::narrow(*master);
            }
        }
        None => {
            for (w, g) in w.iter_mut().zip(g) {
                *w = P::narrow(step(w.widen(), *g));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Sums of two terms, for what a step needs to know beside its gradient

/// The terms of two sums over a block, or of `a` alone.
trait Terms: Sync {
    const BOTH: bool = true;

    /// Writes the terms of elements `start..start + a.len()`.
    fn row(&self, start: usize, tensors: &mut [RowBuffer; 4], a: &mut [f64], b: &mut [f64]);
}

fn pair_sums(n: usize, terms: &impl Terms, simd: Simd, scratch: &mut Scratch) -> Pair {
    Pair::fold(&each_chunk(n, scratch, |scratch, chunk| {
        let start = chunk * CHUNK;
        simd.run(ChunkPair { terms, start, len: CHUNK.min(n - start), scratch })
    }))
}

struct ChunkPair<'a, T> {
    terms: &'a T,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
}

impl<T: Terms> Kernel for ChunkPair<'_, T> {
    type Output = Pair;

    #[inline(always)]
    fn run(self) -> Pair {
        let Self { terms, start, len, scratch } = self;
        let Scratch { rows: Rows { tensors, terms: [a, b], .. }, lanes: [sum_a, sum_b, _] } =
            scratch;
        let (a, b) = (f64::buffer(a), f64::buffer(b));
        let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
        let (sum_a, sum_b) = (&mut sum_a[..width], &mut sum_b[..width]);
        sum_a.fill(0.);
        if T::BOTH {
            sum_b.fill(0.);
        }
        for at in (0..len).step_by(LANES) {
            let row = LANES.min(len - at);
            terms.row(start + at, tensors, &mut a[..row], &mut b[..row]);
            sum_a.iter_mut().zip(&a[..row]).for_each(|(sum, a)| *sum += a);
            if T::BOTH {
                sum_b.iter_mut().zip(&b[..row]).for_each(|(sum, b)| *sum += b);
            }
        }
        Pair { a: tree(sum_a), b: if T::BOTH { tree(sum_b) } else { 0. } }
    }
}

/// A block's sums of `d^2`, or `(phi d)^2` where elements have their own brakes, and `w^2`: what
/// [`Directions`] has of it.
pub(crate) fn directions(
    block: &Block,
    gradient: &Tensor,
    params: &ParamsSrkl,
    decision: &Decision,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Pair> {
    fn sums<C: FromGradient>(
        (w, g): (&Gradient, &Gradient),
        block: &Block,
        (params, decision): (&ParamsSrkl, &Decision),
        simd: Simd,
        scratch: &mut Scratch,
    ) -> Pair {
        let Block { powers, estimate, .. } = block;
        let coefficients = Coefficients::<C>::new(params, decision, powers, estimate);
        let [m, v, q] = [&block.state.m, &block.state.v, &block.state.q]
            .map(|buffer| buffer.as_ref().and_then(C::state).unwrap_or_default());
        let terms = DirectionTerms { w, g, m, v, q, coefficients };
        let Pair { a, b } = pair_sums(block.n, &terms, simd, scratch);
        let scale = coefficients.scale;
        Pair { a: a * (scale * scale), b }
    }
    let (w, w_layout) = block.var.storage_and_layout();
    let (g, g_layout) = gradient.storage_and_layout();
    let tensors = (&Gradient::new(&w, w_layout)?, &Gradient::new(&g, g_layout)?);
    let numbers = (params, decision);
    Ok(match block.dtype {
        DType::F64 => sums::<f64>(tensors, block, numbers, simd, scratch),
        _ => sums::<f32>(tensors, block, numbers, simd, scratch),
    })
}

struct DirectionTerms<'a, C> {
    w: &'a Gradient<'a>,
    g: &'a Gradient<'a>,
    m: &'a [C],
    v: &'a [C],
    q: &'a [C],
    coefficients: Coefficients<C>,
}

impl<C: FromGradient> Terms for DirectionTerms<'_, C> {
    #[inline(always)]
    fn row(&self, start: usize, tensors: &mut [RowBuffer; 4], a: &mut [f64], b: &mut [f64]) {
        let [w, g, ..] = tensors;
        let w = self.w.row::<C>(start, a.len(), w);
        let g = self.g.row::<C>(start, a.len(), g);
        let moments = self.coefficients.moments;
        let range = start..start + a.len();
        match moments.direction {
            Direction::Gradient => a.iter_mut().zip(g).for_each(|(a, g)| *a = g.to_f64()),
            Direction::Momentum { .. } => {
                for ((a, m), g) in a.iter_mut().zip(&self.m[range.clone()]).zip(g) {
                    *a = moments.first_moment(*m, *g).to_f64();
                }
            }
            Direction::Adam { .. } => {
                let (m, v) = (&self.m[range.clone()], &self.v[range.clone()]);
                for (((a, m), v), g) in a.iter_mut().zip(m).zip(v).zip(g) {
                    let denom = moments.denom(moments.second_moment(*v, *g));
                    *a = moments.first_moment(*m, *g).div(denom).to_f64();
                }
            }
        }
        if let Some(brake) = self.coefficients.element {
            for (i, (a, g)) in a.iter_mut().zip(g).enumerate() {
                let q = self.q.get(start + i).map_or(0., |q| q.to_f64());
                *a *= brake.element_phi(g.to_f64(), q);
            }
        }
        for ((a, b), w) in a.iter_mut().zip(b).zip(w) {
            *a *= *a;
            let w = w.to_f64();
            *b = w * w;
        }
    }
}

/// What a measurement reads of a block: both gradients, of one batch, times `c`.
pub(crate) struct Measured<'a> {
    pub first: &'a Tensor,
    pub again: &'a Tensor,
    pub c: f64,
}

/// [`Curvature::Step`]: with `G = c * (again - first)` a block's sum of `G^2`, and that of `||G|| ||D||` over its
/// strips, of which the update has left the sums of `D^2`.
pub(crate) fn change_of_gradient(
    block: &Block,
    measured: &Measured,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Pair> {
    fn sums<C: FromGradient>(
        [first, again]: [&Gradient; 2],
        (strips, c): (&[f64], f64),
        simd: Simd,
        scratch: &mut Scratch,
    ) -> Pair {
        let n = first.len();
        Pair::fold(&each_chunk(n, scratch, |scratch, chunk| {
            let start = chunk * CHUNK;
            let len = CHUNK.min(n - start);
            let strips = strips.get(start / STRIP..).unwrap_or_default();
            simd.run(ChunkChange::<C> {
                first,
                again,
                strips,
                c,
                start,
                len,
                scratch,
                compute: PhantomData,
            })
        }))
    }
    let (first, first_layout) = measured.first.storage_and_layout();
    let (again, again_layout) = measured.again.storage_and_layout();
    let gradients = [&Gradient::new(&first, first_layout)?, &Gradient::new(&again, again_layout)?];
    let numbers = (&block.strips[..], measured.c);
    Ok(match block.dtype {
        DType::F64 => sums::<f64>(gradients, numbers, simd, scratch),
        _ => sums::<f32>(gradients, numbers, simd, scratch),
    })
}

/// The sums over elements `start..start + len`, one chunk.
struct ChunkChange<'a, C> {
    first: &'a Gradient<'a>,
    again: &'a Gradient<'a>,
    /// Of the chunk's strips and those behind.
    strips: &'a [f64],
    c: f64,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
    compute: PhantomData<C>,
}

impl<C: FromGradient> Kernel for ChunkChange<'_, C> {
    type Output = Pair;

    #[inline(always)]
    fn run(self) -> Pair {
        let Self { first, again, strips, c, start, len, scratch, .. } = self;
        let Scratch { rows: Rows { tensors: [one, two, ..], terms: [squares, _], .. }, lanes } =
            scratch;
        let [change, bound, _] = lanes;
        let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
        let change = &mut change[..width];
        let bound = &mut bound[..CHUNK / STRIP];
        change.fill(0.);
        bound.fill(0.);
        for at in (0..len).step_by(LANES) {
            let len = LANES.min(len - at);
            let squares = &mut f64::buffer(squares)[..len];
            let (one, two) =
                (first.row::<C>(start + at, len, one), again.row::<C>(start + at, len, two));
            for ((square, first), again) in squares.iter_mut().zip(one).zip(two) {
                let difference = c * (again.to_f64() - first.to_f64());
                *square = difference * difference;
            }
            change.iter_mut().zip(&*squares).for_each(|(lane, square)| *lane += square);
            let strip = at / STRIP;
            let sums = squares.chunks(STRIP).zip(&strips[strip..]);
            for (lane, (squares, step)) in bound[strip..].iter_mut().zip(sums) {
                *lane = strip_sum(squares).sqrt() * step.sqrt();
            }
        }
        Pair { a: tree(change), b: tree(bound) }
    }
}

/// [`Curvature::Hutchinson`]: a block's sums of `(H z)^2`, with `H z = c * (again - first) / size`, and of the
/// squares of its first gradient.
pub(crate) fn probe_sums(
    block: &Block,
    measured: &Measured,
    size: f64,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Pair> {
    let (first, first_layout) = measured.first.storage_and_layout();
    let (again, again_layout) = measured.again.storage_and_layout();
    let first = Gradient::new(&first, first_layout)?;
    let again = Gradient::new(&again, again_layout)?;
    let (c, n) = (measured.c, block.n);
    Ok(match block.dtype {
        DType::F64 => pair_sums(n, &ProbeTerms::<f64>::new(&first, &again, c, size), simd, scratch),
        _ => pair_sums(n, &ProbeTerms::<f32>::new(&first, &again, c, size), simd, scratch),
    })
}

struct ProbeTerms<'a, C> {
    first: &'a Gradient<'a>,
    again: &'a Gradient<'a>,
    c: f64,
    size: f64,
    compute: PhantomData<fn() -> C>,
}

impl<'a, C: FromGradient> ProbeTerms<'a, C> {
    fn new(first: &'a Gradient<'a>, again: &'a Gradient<'a>, c: f64, size: f64) -> Self {
        Self { first, again, c, size, compute: PhantomData }
    }
}

impl<C: FromGradient> Terms for ProbeTerms<'_, C> {
    #[inline(always)]
    fn row(&self, start: usize, tensors: &mut [RowBuffer; 4], a: &mut [f64], b: &mut [f64]) {
        let [first, again, ..] = tensors;
        let first = self.first.row::<C>(start, a.len(), first);
        let again = self.again.row::<C>(start, a.len(), again);
        for ((a, first), again) in a.iter_mut().zip(first).zip(again) {
            let product = self.c * (again.to_f64() - first.to_f64()) / self.size;
            // As q can hold it.
            *a = C::from_f64(product * product).to_f64();
        }
        // Not finite where the first gradient isn't.
        b.iter_mut().zip(first).for_each(|(b, first)| *b = first.to_f64() * first.to_f64());
    }
}

/// `q <- decay q + (1 - decay) (H z)^2`; returns the sum of q over the block.
pub(crate) fn average_probe(
    block: &mut Block,
    measured: &Measured,
    size: f64,
    decay: f64,
    scratch: &mut Scratch,
) -> Result<f64> {
    fn average<C: FromGradient>(
        q: &mut [C],
        terms: &ProbeTerms<C>,
        decay: f64,
        scratch: &mut Scratch,
    ) -> f64 {
        let chunk_sum = |scratch: &mut Scratch, (chunk, q): (usize, &mut [C])| {
            let Scratch { rows: Rows { tensors, terms: [a, b], .. }, lanes: [lanes, ..] } = scratch;
            let (a, b) = (f64::buffer(a), f64::buffer(b));
            let width = q.len().clamp(MIN_LANES, LANES).next_power_of_two();
            lanes[..width].fill(0.);
            for (row, q) in q.chunks_mut(LANES).enumerate() {
                let start = chunk * CHUNK + row * LANES;
                terms.row(start, tensors, &mut a[..q.len()], &mut b[..q.len()]);
                for ((lane, q), square) in lanes.iter_mut().zip(q).zip(&*a) {
                    *q = C::from_f64(decay * q.to_f64() + (1. - decay) * square);
                    *lane += q.to_f64();
                }
            }
            Pair { a: tree(&mut lanes[..width]), b: 0. }
        };
        let sums: Vec<Pair> = if !splits(q.len()) {
            q.chunks_mut(CHUNK).enumerate().map(|item| chunk_sum(scratch, item)).collect()
        } else {
            let chunks = q.par_chunks_mut(CHUNK).enumerate().with_min_len(PIECE / CHUNK);
            chunks.map_init(Scratch::new, chunk_sum).collect()
        };
        Pair::fold(&sums).a
    }
    let (first, first_layout) = measured.first.storage_and_layout();
    let (again, again_layout) = measured.again.storage_and_layout();
    let first = Gradient::new(&first, first_layout)?;
    let again = Gradient::new(&again, again_layout)?;
    let c = measured.c;
    Ok(match &mut block.state.q {
        Some(Buffer::F32(q)) => {
            average(q, &ProbeTerms::new(&first, &again, c, size), decay, scratch)
        }
        Some(Buffer::F64(q)) => {
            average(q, &ProbeTerms::new(&first, &again, c, size), decay, scratch)
        }
        _ => 0.,
    })
}

// ---------------------------------------------------------------------------------------------
// Perturbations

/// A block's sum of `w^2`.
pub(crate) fn squares(block: &Block, simd: Simd, scratch: &mut Scratch) -> Result<f64> {
    struct Squares<'a, C>(&'a Gradient<'a>, PhantomData<fn() -> C>);
    impl<C: FromGradient> Terms for Squares<'_, C> {
        const BOTH: bool = false;

        #[inline(always)]
        fn row(&self, start: usize, tensors: &mut [RowBuffer; 4], a: &mut [f64], _: &mut [f64]) {
            let w = self.0.row::<C>(start, a.len(), &mut tensors[0]);
            a.iter_mut().zip(w).for_each(|(a, w)| *a = w.to_f64() * w.to_f64());
        }
    }
    let (storage, layout) = block.var.storage_and_layout();
    let w = Gradient::new(&storage, layout)?;
    Ok(match block.dtype {
        DType::F64 => pair_sums(block.n, &Squares::<f64>(&w, PhantomData), simd, scratch).a,
        _ => pair_sums(block.n, &Squares::<f32>(&w, PhantomData), simd, scratch).a,
    })
}
