//! Stage 3, update: moves the parameters of a block. The mathematics of an element is in [`rule`](crate::rule).

use candle_core::{CpuStorage, Result, Tensor, bail};
use rayon::prelude::*;

use super::access::{Parameter, agree, samples, with_storage_mut};
use super::gradient::{Compute, Gradient};
use super::rows::{Exact, RowMut, StateRows};
use super::simd::{Kernel, Simd};
use super::statistics::{InputRows, PIECE, Rows, Scratch, splits};
use crate::block::Block;
use crate::estimate::{Estimate, StepSums};
use crate::numerics::{CHUNK, LANES, MIN_LANES, Real, STRIP, fold, strip_sum, tree};
use crate::params::{Direction, ParamsSrkl};
use crate::rule::{Coefficients, Decision, Moments, Powers, apply_step, lerp};

/// The numbers of one block's step.
#[derive(Clone, Copy)]
pub(crate) struct BlockStep<'a> {
    pub params: &'a ParamsSrkl,
    pub decision: &'a Decision,
    /// Those before the step.
    pub powers: &'a Powers,
    pub estimate: &'a Estimate,
    /// Whether to compute the sums over the step: [`StepSums`] and strips.
    pub sums_up: bool,
    /// Whether to keep the sums over strips, which a measurement along the step needs.
    pub keeps_strips: bool,
    /// [`Block::matrix_scale`]
    pub matrix_scale: f64,
}

impl BlockStep<'_> {
    pub fn coefficients<C: Real>(&self) -> Coefficients<C> {
        let Self { params, decision, powers, estimate, matrix_scale, .. } = *self;
        Coefficients::new(params, decision, powers, estimate, matrix_scale)
    }
}

/// Moves a block by its gradient, in place. If `step.sums_up`, returns the sums over the step, for a measurement or
/// telemetry, and the sums of `D^2` over strips.
pub(crate) fn update(
    block: &mut Block,
    gradient: &Tensor,
    step: BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<(StepSums, Vec<f64>)> {
    let mut moved = (StepSums::default(), vec![]);
    if block.n == 0 {
        return Ok(moved); // candle refuses to write to an empty tensor.
    }
    let Block { var, state, orthogonal, .. } = block;
    let (storage, layout) = gradient.storage_and_layout();
    let orthogonal = orthogonal.as_ref().map(Tensor::storage_and_layout);
    let orthogonal = orthogonal.as_ref().map(|(storage, layout)| Gradient::new(storage, layout));
    let orthogonal = orthogonal.transpose()?;
    let gradient = Gradient::new(&storage, layout)?;
    let g = Followed { gradient: &gradient, orthogonal: orthogonal.as_ref() };
    with_storage_mut(var, |storage| {
        moved = match storage {
            CpuStorage::F32(w) => block_update(w, Exact::new(state), g, step, simd, scratch),
            CpuStorage::F64(w) => block_update(w, Exact::new(state), g, step, simd, scratch),
            CpuStorage::BF16(w) => block_update(w, Exact::new(state), g, step, simd, scratch),
            CpuStorage::F16(w) => block_update(w, Exact::new(state), g, step, simd, scratch),
            _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
        };
        Ok(())
    })?;
    Ok(moved)
}

/// What a step follows.
#[derive(Clone, Copy)]
struct Followed<'a> {
    gradient: &'a Gradient<'a>,
    /// With [`Direction::Muon`] the orthogonalised momentum.
    orthogonal: Option<&'a Gradient<'a>>,
}

fn block_update<P: Parameter>(
    w: &mut [P],
    mut state: Exact<P::Compute>,
    g: Followed,
    step: BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> (StepSums, Vec<f64>) {
    let n = w.len();
    let coefficients = step.coefficients();
    if let Some(master) = &mut state.master
        && samples(n).any(|i| !agree(w[i], master[i]))
    {
        // The parameter seems to have been overwritten as a whole, so all masters are reset.
        master.iter_mut().zip(w.iter()).for_each(|(master, w)| *master = w.widen());
    }
    let part = Part { w, state };
    let update = |scratch: &mut Scratch, start, part| {
        let BlockStep { sums_up, keeps_strips, .. } = step;
        simd.run(Update { start, part, g, coefficients, sums_up, keeps_strips, scratch })
    };
    let parts: Vec<Stepped> = if !splits(n) {
        vec![update(scratch, 0, part)]
    } else {
        let pieces = part.pieces(PIECE).into_par_iter().enumerate();
        let update = |scratch: &mut Scratch, (i, part)| update(scratch, i * PIECE, part);
        pieces.map_init(Scratch::new, update).collect()
    };
    let chunks: Vec<[f64; 3]> = parts.iter().flat_map(|part| part.chunks.iter().copied()).collect();
    let strips = parts.into_iter().flat_map(|part| part.strips).collect();
    let [step, direction, along] = fold(chunks.len(), |chunk| chunks[chunk]);
    let Coefficients { scale, momentum_scale, .. } = coefficients;
    let along = along * (scale * momentum_scale);
    (StepSums { step, direction: direction * (scale * scale), along }, strips)
}

/// The sums over the update of a part, if they are asked for.
#[derive(Default)]
struct Stepped {
    /// Those of [`StepSums`] for each chunk, of the direction before its `scale`.
    chunks: Vec<[f64; 3]>,
    /// The sum of `D^2` for each strip.
    strips: Vec<f64>,
}

/// Neighbouring elements of a block: the parameter and its state.
struct Part<'a, P, S> {
    w: &'a mut [P],
    state: S,
}

impl<P: Parameter, S: StateRows<P::Compute>> Part<'_, P, S> {
    /// Splits off the first `len` elements.
    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        Self { w: self.w.split_off_mut(..len).unwrap_or_default(), state: self.state.take(len) }
    }

    fn pieces(mut self, len: usize) -> Vec<Self> {
        let count = self.w.len().div_ceil(len);
        (0..count).map(|_| self.take(len.min(self.w.len()))).collect()
    }
}

/// The update of a part that begins at element `start` of the block, which is the start of a chunk.
struct Update<'a, P: Parameter, S> {
    start: usize,
    part: Part<'a, P, S>,
    g: Followed<'a>,
    coefficients: Coefficients<P::Compute>,
    /// Whether to compute the sums over the step.
    sums_up: bool,
    keeps_strips: bool,
    scratch: &'a mut Scratch,
}

impl<P: Parameter, S: StateRows<P::Compute>> Kernel for Update<'_, P, S> {
    type Output = Stepped;

    #[inline(always)]
    fn run(self) -> Stepped {
        let Self { start, mut part, g: followed, coefficients, sums_up, keeps_strips, scratch } =
            self;
        let Scratch { rows, lanes } = scratch;
        let Rows { inputs, d, terms: [squares, d_again] } = rows;
        let InputRows { tensors: [row, before], state: room } = inputs;
        let Coefficients { moments, phi, element, average, .. } = coefficients;
        let (step_size, decay_factor) = coefficients.step_coefficients(phi);
        let n = part.w.len();
        let mut stepped = Stepped::default();
        for at in (0..n).step_by(LANES) {
            let Part { w, mut state } = part.take(LANES.min(n - at));
            let RowMut { mut master, mut m, mut v, average: a, q } = state.load(room);
            let before = &mut P::Compute::buffer(before)[..w.len()];
            if sums_up {
                before.iter_mut().zip(&*w).for_each(|(before, w)| *before = w.widen());
            }
            let g = followed.gradient.row(start + at, w.len(), row);
            let d: &[P::Compute] = match (moments.direction, m.as_deref_mut(), v.as_deref_mut()) {
                (Direction::Adam { .. }, Some(m), Some(v)) if element.is_none() => {
                    // One loop: arithmetic hides the latency of memory.
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
                (Direction::Sgd { nesterov: true, .. }, Some(m), _) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for ((d, m), g) in d.iter_mut().zip(m).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *d = moments.nesterov(*m, *g);
                    }
                    d
                }
                (
                    Direction::Momentum { .. } | Direction::Sgd { .. } | Direction::Muon { .. },
                    Some(m),
                    _,
                ) => {
                    m.iter_mut().zip(g).for_each(|(m, g)| *m = moments.first_moment(*m, *g));
                    match followed.orthogonal {
                        Some(orthogonal) => orthogonal.row(start + at, w.len(), d),
                        None => m,
                    }
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
            if sums_up {
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
                if keeps_strips {
                    stepped.strips.extend(squares.chunks(STRIP).map(strip_sum));
                }
                let is_adam = matches!(moments.direction, Direction::Adam { .. });
                if !is_adam {
                    add_squares(direction, d);
                }
                match (m.as_deref(), v.as_deref(), followed.orthogonal) {
                    (Some(m), Some(v), _) if is_adam => {
                        add_adam_direction(direction, along, m, v, &moments);
                    }
                    (Some(m), _, Some(orthogonal)) => {
                        let d = orthogonal.row(start + at, m.len(), d_again);
                        add_along_orthogonal(along, d, m, g, &moments);
                    }
                    _ => {}
                }
                if at + w.len() == n || (at + w.len()) % CHUNK == 0 {
                    let (step, direction) = (tree(step), tree(direction));
                    // Else the terms of `d m` are those of `d^2`.
                    let apart = is_adam || followed.orthogonal.is_some();
                    let along = if apart { tree(along) } else { direction };
                    stepped.chunks.push([step, direction, along]);
                }
            }
            state.store(room);
        }
        stepped
    }
}

/// The terms of `D^2` of a row: `D` is the step as stored, rounded to the parameter's dtype.
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

/// Adds the terms of `d m` of a row, of an orthogonal direction `d` of the momentum `m`, which may look ahead.
#[inline(always)]
fn add_along_orthogonal<C: Real>(
    along: &mut [f64],
    d: &[C],
    m: &[C],
    g: &[C],
    moments: &Moments<C>,
) {
    let ahead = matches!(moments.direction, Direction::Muon { nesterov: true, .. });
    for (((along, d), m), g) in along.iter_mut().zip(d).zip(m).zip(g) {
        let m = if ahead { moments.nesterov(*m, *g) } else { *m };
        *along += d.to_f64() * m.to_f64();
    }
}

/// Adds the terms of `d^2` of a row.
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

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::gradient::RowBuffer;
    use super::super::rows::{Room, Row};
    use super::*;
    use crate::numerics::{Sums, bf16_to_f32, f32_to_bf16};
    use crate::rule::{self, StepScalars};

    /// A format that packs its numbers: moments in bf16.
    struct Halves<'a> {
        m: &'a mut [u16],
        v: &'a mut [u16],
    }

    fn decode<'r>(packed: &[u16], room: &'r mut RowBuffer) -> &'r mut [f32] {
        let row = &mut f32::buffer(room)[..packed.len()];
        row.iter_mut().zip(packed).for_each(|(x, packed)| *x = bf16_to_f32(*packed));
        row
    }

    impl StateRows<f32> for Halves<'_> {
        fn take(&mut self, len: usize) -> Self {
            let m = self.m.split_off_mut(..len).unwrap();
            Self { m, v: self.v.split_off_mut(..len).unwrap() }
        }
        fn read<'r>(&'r self, _: usize, _: usize, _: &'r mut Room) -> Row<'r, f32> {
            unreachable!("an update changes what it reads")
        }
        fn load<'r>(&'r mut self, [m, v, ..]: &'r mut Room) -> RowMut<'r, f32> {
            let (m, v) = (decode(self.m, m), decode(self.v, v));
            RowMut { master: None, m: Some(m), v: Some(v), average: None, q: None }
        }
        fn store(&mut self, room: &mut Room) {
            let [m, v, ..] = room;
            for (packed, row) in [(&mut *self.m, m), (&mut *self.v, v)] {
                let row = &f32::buffer(row)[..packed.len()];
                packed.iter_mut().zip(row).for_each(|(packed, x)| *packed = f32_to_bf16(*x));
            }
        }
    }

    /// The update takes any format of state: what is loaded is computed with in f32, and stored.
    #[test]
    fn state_may_be_packed() {
        let n = 2 * LANES + 17;
        let numbers = |salt: u64| -> Vec<f32> {
            (0..n as u64).map(|i| ((i * 37 + salt) as f32 * 0.61).sin()).collect()
        };
        let params = ParamsSrkl::braked_adam();
        let scalars = StepScalars { schedule: 1., grad_scale: 1. };
        let mut decision =
            rule::decide(&params, scalars, &Sums::ZERO, &Sums::ZERO, &Estimate::NONE);
        decision.phi = 0.25;
        let step = BlockStep {
            params: &params,
            decision: &decision,
            powers: &Powers { first: 0.81, second: 0.998, average: 1. },
            estimate: &Estimate::NONE,
            sums_up: false,
            keeps_strips: false,
            matrix_scale: 1.,
        };
        let coefficients = step.coefficients::<f32>();
        let (g, w) = (numbers(3), numbers(5));
        let pack = |xs: Vec<f32>| xs.into_iter().map(f32_to_bf16).collect::<Vec<u16>>();
        let m = pack(numbers(7));
        let v = pack(numbers(11).into_iter().map(|x| x * x).collect());

        let (mut new_w, mut new_m, mut new_v) = (w.clone(), m.clone(), v.clone());
        let gradient = Tensor::new(&g[..], &candle_core::Device::Cpu).unwrap();
        let (storage, layout) = gradient.storage_and_layout();
        let row = Gradient::new(&storage, layout).unwrap();
        let part = Part { w: &mut new_w[..], state: Halves { m: &mut new_m, v: &mut new_v } };
        Simd::detect().run(Update {
            start: 0,
            part,
            g: Followed { gradient: &row, orthogonal: None },
            coefficients,
            sums_up: false,
            keeps_strips: false,
            scratch: &mut Scratch::new(),
        });

        let moments = coefficients.moments;
        let (step_size, decay_factor) = coefficients.step_coefficients(0.25);
        for i in 0..n {
            let m = moments.first_moment(bf16::from_bits(m[i]).to_f32(), g[i]);
            let v = moments.second_moment(bf16::from_bits(v[i]).to_f32(), g[i]);
            let w = apply_step(w[i], m.div(moments.denom(v)), step_size, decay_factor);
            assert_eq!(new_w[i].to_bits(), w.to_bits(), "w[{i}]");
            assert_eq!(new_m[i], bf16::from_f32(m).to_bits(), "m[{i}]");
            assert_eq!(new_v[i], bf16::from_f32(v).to_bits(), "v[{i}]");
        }
    }
}
