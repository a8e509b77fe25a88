//! Sums over a block of directions and of changes of gradients: for small steps, the trust clip, and measured
//! curvature.

use std::marker::PhantomData;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::super::GradientPair;
use super::gradient::{Compute, Gradient};
use super::rows::{Exact, Packed, Row, StateRows, row_norms};
use super::simd::{AHEAD, Kernel, LINE, Simd, each, load};
use super::statistics::{InputRows, PIECE, Rows, Scratch, each_chunk, splits};
use super::update::BlockStep;
use crate::block::Block;
use crate::numerics::{CHUNK, LANES, MIN_LANES, Pair, STRIP, strip_sum, tree};
use crate::params::Direction;
use crate::rule::{Coefficients, cautious, sign};
use crate::state::State;

/// The terms of two sums over a block, or of `a` alone.
trait Terms: Sync {
    const BOTH: bool = true;

    /// Writes the terms of elements `start..start + a.len()`.
    fn row(&self, start: usize, room: &mut InputRows, a: &mut [f64], b: &mut [f64]);
}

/// The sums of each chunk.
fn pair_sums(n: usize, terms: &impl Terms, simd: Simd, scratch: &mut Scratch) -> Vec<Pair> {
    each_chunk(n, scratch, |scratch, chunk| {
        let start = chunk * CHUNK;
        simd.run(ChunkPair { terms, start, len: CHUNK.min(n - start), scratch })
    })
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
        let Scratch { rows: Rows { inputs, terms: [a, b], .. }, lanes: [sum_a, sum_b, _] } =
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
            terms.row(start + at, inputs, &mut a[..row], &mut b[..row]);
            sum_a.iter_mut().zip(&a[..row]).for_each(|(sum, a)| *sum += a);
            if T::BOTH {
                sum_b.iter_mut().zip(&b[..row]).for_each(|(sum, b)| *sum += b);
            }
        }
        Pair { a: tree(sum_a), b: if T::BOTH { tree(sum_b) } else { 0. } }
    }
}

/// The sums over a block's chunks of `d^2`, or `(phi d)^2` if elements have their own brakes, and of `w^2`: its part of
/// [`Directions`](crate::rule::Directions), before the [`SumScales`](super::super::SumScales).
pub(crate) fn directions(
    block: &mut Block,
    gradient: &Tensor,
    step: BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Vec<Pair>> {
    fn sums<C: Compute>(
        w: &Gradient,
        g: &Gradient,
        state: impl StateRows<C>,
        step: BlockStep,
        simd: Simd,
        scratch: &mut Scratch,
    ) -> Vec<Pair> {
        let terms = DirectionTerms { w, g, state, coefficients: step.coefficients() };
        pair_sums(g.len(), &terms, simd, scratch)
    }
    let (w, _) = block.var.storage_and_layout();
    // A direction that is orthogonalised is there already.
    let g = block.orthogonal.as_ref().unwrap_or(gradient);
    let (g, g_layout) = g.storage_and_layout();
    let (w, g) = (&Gradient::new(&w, &block.layout)?, &Gradient::new(&g, g_layout)?);
    let state = &mut block.state;
    Ok(match block.dtype {
        DType::F64 => sums(w, g, Exact::<f64>::new(state), step, simd, scratch),
        _ if state.is_packed() => sums(w, g, Packed::to_read(state, block.n), step, simd, scratch),
        _ => sums(w, g, Exact::<f32>::new(state), step, simd, scratch),
    })
}

struct DirectionTerms<'a, C, S> {
    w: &'a Gradient<'a>,
    g: &'a Gradient<'a>,
    state: S,
    coefficients: Coefficients<C>,
}

impl<C: Compute, S: StateRows<C>> Terms for DirectionTerms<'_, C, S> {
    #[inline(always)]
    fn row(&self, start: usize, room: &mut InputRows, a: &mut [f64], b: &mut [f64]) {
        let InputRows { tensors: [w, g], state } = room;
        let w = self.w.row::<C>(start, a.len(), w);
        let g = self.g.row::<C>(start, a.len(), g);
        let Row { m, v, v_max, q } = self.state.read(start, a.len(), state);
        let moments = self.coefficients.moments;
        match (moments.direction, m, v) {
            (Direction::Sgd { nesterov: true, .. }, Some(m), _) => {
                for ((a, m), g) in a.iter_mut().zip(m).zip(g) {
                    *a = moments.look_ahead(moments.first_moment(*m, *g), *g).to_f64();
                }
            }
            (Direction::Momentum { .. } | Direction::Sgd { .. }, Some(m), _) => {
                for ((a, m), g) in a.iter_mut().zip(m).zip(g) {
                    *a = moments.first_moment(*m, *g).to_f64();
                }
            }
            (Direction::Lion { .. }, Some(m), _) => {
                for ((a, m), g) in a.iter_mut().zip(m).zip(g) {
                    *a = sign(moments.look_ahead(*m, *g)).to_f64();
                }
            }
            (Direction::Adam { .. }, Some(m), Some(v)) => {
                for (((a, m), v), g) in a.iter_mut().zip(m).zip(v).zip(g) {
                    let denom = moments.denom(moments.second_moment(*v, *g));
                    *a = moments.first_moment(*m, *g).div(denom).to_f64();
                }
            }
            (Direction::NesterovAdam { .. }, Some(m), Some(v)) => {
                for (((a, m), v), g) in a.iter_mut().zip(m).zip(v).zip(g) {
                    let denom = moments.denom(moments.second_moment(*v, *g));
                    let ahead = moments.look_ahead(moments.first_moment(*m, *g), *g);
                    *a = ahead.div(denom).to_f64();
                }
            }
            (Direction::AmsGrad { .. }, Some(m), Some(v)) => {
                let state = m.iter().zip(v).zip(v_max.unwrap_or_default());
                for ((a, ((m, v), v_max)), g) in a.iter_mut().zip(state).zip(g) {
                    let v = moments.largest(*v_max, moments.second_moment(*v, *g));
                    *a = moments.first_moment(*m, *g).div(moments.denom(v)).to_f64();
                }
            }
            _ => a.iter_mut().zip(g).for_each(|(a, g)| *a = g.to_f64()),
        }
        if moments.cautious {
            a.iter_mut().zip(g).for_each(|(a, g)| *a = cautious(*a, g.to_f64()));
        }
        if let Some(brake) = self.coefficients.element {
            for (i, (a, g)) in a.iter_mut().zip(g).enumerate() {
                let q = q.map_or(0., |q| q[i].to_f64());
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

/// [`Curvature::Step`](crate::Curvature::Step): the sums over a block's chunks of `G^2`, with `G = factor * (again - first)`, and of
/// `||G|| ||D||` over its strips. `strips` are the sums of `D^2`, from the update.
pub(crate) fn change_of_gradient(
    block: &Block,
    strips: &[f64],
    pair: GradientPair,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Vec<Pair>> {
    fn sums<C: Compute>(
        [first, again]: [&Gradient; 2],
        (strips, factor): (&[f64], f64),
        simd: Simd,
        scratch: &mut Scratch,
    ) -> Vec<Pair> {
        let n = first.len();
        each_chunk(n, scratch, |scratch, chunk| {
            let start = chunk * CHUNK;
            let len = CHUNK.min(n - start);
            let strips = strips.get(start / STRIP..).unwrap_or_default();
            simd.run(ChunkChange::<C> {
                first,
                again,
                strips,
                factor,
                start,
                len,
                scratch,
                compute: PhantomData,
            })
        })
    }
    let (first, first_layout) = pair.first.storage_and_layout();
    let (again, again_layout) = pair.again.storage_and_layout();
    let gradients = [&Gradient::new(&first, first_layout)?, &Gradient::new(&again, again_layout)?];
    let numbers = (strips, pair.factor);
    Ok(match block.dtype {
        DType::F64 => sums::<f64>(gradients, numbers, simd, scratch),
        _ => sums::<f32>(gradients, numbers, simd, scratch),
    })
}

const _: () = assert!(LINE.is_multiple_of(STRIP));

/// The sums over elements `start..start + len`, one chunk.
struct ChunkChange<'a, C> {
    first: &'a Gradient<'a>,
    again: &'a Gradient<'a>,
    /// The sums of `D^2` over the strips from `start` on.
    strips: &'a [f64],
    factor: f64,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
    compute: PhantomData<C>,
}

impl<C: Compute> Kernel for ChunkChange<'_, C> {
    type Output = Pair;

    #[inline(always)]
    fn run(self) -> Pair {
        let Self { first, again, strips, factor, start, len, scratch, .. } = self;
        let Scratch { rows, lanes } = scratch;
        let Rows { inputs: InputRows { tensors: [one, two], .. }, .. } = rows;
        let [change, bound, _] = lanes;
        let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
        let change = &mut change[..width];
        let bound = &mut bound[..CHUNK / STRIP];
        change.fill(0.);
        bound.fill(0.);
        for at in (0..len).step_by(LANES) {
            let len = LANES.min(len - at);
            let (one, two) =
                (first.row::<C>(start + at, len, one), again.row::<C>(start + at, len, two));
            let streams = [first, again].map(|g| g.stream(start + at + AHEAD));
            let strip = at / STRIP;
            let (lanes, bound) = (&mut change[..len], &mut bound[strip..][..len.div_ceil(STRIP)]);
            let term = |first: C, again: C| {
                let difference = factor * (again.to_f64() - first.to_f64());
                difference * difference
            };
            let whole = len - len % STRIP;
            for i in (0..whole).step_by(STRIP) {
                if i % LINE == 0 {
                    streams.iter().flatten().for_each(|stream| stream.prefetch(i));
                }
                let (one, two): ([C; STRIP], [C; STRIP]) = (load(&one[i..]), load(&two[i..]));
                let terms = each::<_, STRIP>(|i| term(one[i], two[i]));
                let lanes = &mut lanes[i..i + STRIP];
                lanes.copy_from_slice(&each::<_, STRIP>(|i| lanes[i] + terms[i]));
                bound[i / STRIP] = strip_sum(terms);
            }
            if whole < len {
                let mut terms = [0.; STRIP];
                for (i, of_strip) in (whole..len).zip(&mut terms) {
                    *of_strip = term(one[i], two[i]);
                    lanes[i] += *of_strip;
                }
                bound[whole / STRIP] = strip_sum(terms);
            }
            for (lane, step) in bound.iter_mut().zip(&strips[strip..]) {
                *lane = lane.sqrt() * step.sqrt();
            }
        }
        Pair { a: tree(change), b: tree(bound) }
    }
}

/// [`Curvature::Hutchinson`](crate::Curvature::Hutchinson): the sums over a block's chunks of `(H z)^2`, with
/// `H z = factor * (again - first) / size`, and of the squares of its first gradient.
pub(crate) fn probe_sums(
    block: &Block,
    pair: GradientPair,
    size: f64,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Vec<Pair>> {
    let (first, first_layout) = pair.first.storage_and_layout();
    let (again, again_layout) = pair.again.storage_and_layout();
    let first = Gradient::new(&first, first_layout)?;
    let again = Gradient::new(&again, again_layout)?;
    let (factor, n) = (pair.factor, block.n);
    Ok(match block.dtype {
        DType::F64 => {
            pair_sums(n, &ProbeTerms::<f64>::new(&first, &again, factor, size), simd, scratch)
        }
        _ => pair_sums(n, &ProbeTerms::<f32>::new(&first, &again, factor, size), simd, scratch),
    })
}

struct ProbeTerms<'a, C> {
    first: &'a Gradient<'a>,
    again: &'a Gradient<'a>,
    factor: f64,
    size: f64,
    compute: PhantomData<fn() -> C>,
}

impl<'a, C: Compute> ProbeTerms<'a, C> {
    fn new(first: &'a Gradient<'a>, again: &'a Gradient<'a>, factor: f64, size: f64) -> Self {
        Self { first, again, factor, size, compute: PhantomData }
    }
}

impl<C: Compute> Terms for ProbeTerms<'_, C> {
    #[inline(always)]
    fn row(&self, start: usize, room: &mut InputRows, a: &mut [f64], b: &mut [f64]) {
        let [first, again] = &mut room.tensors;
        let first = self.first.row::<C>(start, a.len(), first);
        let again = self.again.row::<C>(start, a.len(), again);
        for ((a, first), again) in a.iter_mut().zip(first).zip(again) {
            let product = self.factor * (again.to_f64() - first.to_f64()) / self.size;
            // Rounded to the type of `q`.
            *a = C::from_f64(product * product).to_f64();
        }
        // Not finite where the first gradient isn't.
        b.iter_mut().zip(first).for_each(|(b, first)| *b = first.to_f64() * first.to_f64());
    }
}

/// `q <- decay q + (1 - decay) (H z)^2`; returns the sums of q over the block's chunks.
pub(crate) fn average_probe(
    block: &mut Block,
    pair: GradientPair,
    size: f64,
    decay: f64,
    scratch: &mut Scratch,
) -> Result<Vec<Pair>> {
    fn average<C: Compute>(
        state: &mut State,
        terms: &ProbeTerms<C>,
        n: usize,
        decay: f64,
        scratch: &mut Scratch,
    ) -> Vec<Pair> {
        let chunk_sum = |scratch: &mut Scratch, (chunk, q): (usize, &mut [C])| {
            let Scratch { rows, lanes: [lanes, ..] } = scratch;
            let Rows { inputs, terms: [a, b], .. } = rows;
            let (a, b) = (f64::buffer(a), f64::buffer(b));
            let len = CHUNK.min(n - chunk * CHUNK);
            let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
            lanes[..width].fill(0.);
            for (at, q) in (0..len).step_by(LANES).zip(q.chunks_mut(LANES)) {
                let row = q.len();
                terms.row(chunk * CHUNK + at, inputs, &mut a[..row], &mut b[..row]);
                for ((lane, q), square) in lanes.iter_mut().zip(q).zip(&*a) {
                    *q = C::from_f64(decay * q.to_f64() + (1. - decay) * square);
                    *lane += q.to_f64();
                }
            }
            Pair { a: tree(&mut lanes[..width]), b: 0. }
        };
        let q = row_norms(state).unwrap_or_default();
        let chunks: Vec<_> = q.chunks_mut(CHUNK).enumerate().collect();
        if !splits(n) {
            chunks.into_iter().map(|item| chunk_sum(scratch, item)).collect()
        } else {
            let chunks = chunks.into_par_iter().with_min_len(PIECE / CHUNK);
            chunks.map_init(Scratch::new, chunk_sum).collect()
        }
    }
    let (first, first_layout) = pair.first.storage_and_layout();
    let (again, again_layout) = pair.again.storage_and_layout();
    let first = Gradient::new(&first, first_layout)?;
    let again = Gradient::new(&again, again_layout)?;
    let (factor, n) = (pair.factor, block.n);
    let state = &mut block.state;
    Ok(match block.dtype {
        DType::F64 => {
            let terms = ProbeTerms::<f64>::new(&first, &again, factor, size);
            average(state, &terms, n, decay, scratch)
        }
        _ => {
            let terms = ProbeTerms::<f32>::new(&first, &again, factor, size);
            average(state, &terms, n, decay, scratch)
        }
    })
}

/// The sums over a block's chunks of `w^2`.
pub(crate) fn squares(block: &Block, simd: Simd, scratch: &mut Scratch) -> Result<Vec<Pair>> {
    struct Squares<'a, C>(&'a Gradient<'a>, PhantomData<fn() -> C>);
    impl<C: Compute> Terms for Squares<'_, C> {
        const BOTH: bool = false;

        #[inline(always)]
        fn row(&self, start: usize, room: &mut InputRows, a: &mut [f64], _: &mut [f64]) {
            let w = self.0.row::<C>(start, a.len(), &mut room.tensors[0]);
            a.iter_mut().zip(w).for_each(|(a, w)| *a = w.to_f64() * w.to_f64());
        }
    }
    let (storage, _) = block.var.storage_and_layout();
    let w = Gradient::new(&storage, &block.layout)?;
    Ok(match block.dtype {
        DType::F64 => pair_sums(block.n, &Squares::<f64>(&w, PhantomData), simd, scratch),
        _ => pair_sums(block.n, &Squares::<f32>(&w, PhantomData), simd, scratch),
    })
}
