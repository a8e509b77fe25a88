//! Stage 3, update: moves the parameters of a block. The mathematics of an element is in [`rule`](crate::rule).

use candle_core::{CpuStorage, Result, Tensor, bail};
use rayon::prelude::*;

use super::access::{Parameter, Samples, with_storage_mut};
use super::gradient::{Compute, Gradient};
use super::rows::{Exact, Keys, Packed, RowMut, StateRows};
use super::simd::{Kernel, Simd, prefetch};
use super::statistics::{InputRows, PIECE, Rows, Scratch, splits};
use crate::block::Block;
use crate::compact::UNIT;
use crate::estimate::{Estimate, StepSums};
use crate::numerics::{CHUNK, LANES, MIN_LANES, Real, STRIP, strip_sums, tree};
use crate::params::{Direction, ParamsSrkl};
use crate::rule::{Coefficients, Decision, Moments, Powers, apply_step, cautious, lerp, sign};

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
    pub samples: Samples,
    /// The number of steps before, and the block's place: by them numbers are rounded at random.
    pub steps: u64,
    pub place: u64,
}

impl BlockStep<'_> {
    pub fn coefficients<C: Real>(&self) -> Coefficients<C> {
        let Self { params, decision, powers, estimate, matrix_scale, .. } = *self;
        Coefficients::new(params, decision, powers, estimate, matrix_scale)
    }
}

/// Moves a block by its gradient, in place. If `step.sums_up`, returns the sums over chunks, for a measurement or
/// telemetry, and the sums of `D^2` over strips.
pub(crate) fn update(
    block: &mut Block,
    gradient: &Tensor,
    step: BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<(Vec<StepSums>, Vec<f64>)> {
    let mut moved = (vec![], vec![]);
    if block.n == 0 {
        return Ok(moved); // candle refuses to write to an empty tensor.
    }
    let packs = block.is_packed(step.params);
    let rounds = block.rounds(step.params);
    let Block { var, state, orthogonal, n, first, .. } = block;
    let (n, first) = (*n, *first);
    let own = first..first + n;
    let (storage, layout) = gradient.storage_and_layout();
    let orthogonal = orthogonal.as_ref().map(Tensor::storage_and_layout);
    let orthogonal = orthogonal.as_ref().map(|(storage, layout)| Gradient::new(storage, layout));
    let orthogonal = orthogonal.transpose()?;
    let gradient = Gradient::new(&storage, layout)?;
    let g = Followed { gradient: &gradient, orthogonal: orthogonal.as_ref() };
    with_storage_mut(var, |storage| {
        if packs {
            let keys = Keys::new(step.steps, step.place);
            let state = Packed::new(state, n, first, keys, rounds);
            let random = rounds.then_some((keys.parameters, first));
            moved = match storage {
                CpuStorage::F32(w) => {
                    block_update(&mut w[own], state, None, g, step, simd, scratch)
                }
                CpuStorage::BF16(w) => {
                    block_update(&mut w[own], state, random, g, step, simd, scratch)
                }
                CpuStorage::F16(w) => {
                    block_update(&mut w[own], state, None, g, step, simd, scratch)
                }
                _ => bail!("expected a parameter of f32, bf16 or f16"),
            };
            return Ok(());
        }
        moved = match storage {
            CpuStorage::F32(w) => {
                block_update(&mut w[own], Exact::new(state), None, g, step, simd, scratch)
            }
            CpuStorage::F64(w) => {
                block_update(&mut w[own], Exact::new(state), None, g, step, simd, scratch)
            }
            CpuStorage::BF16(w) => {
                block_update(&mut w[own], Exact::new(state), None, g, step, simd, scratch)
            }
            CpuStorage::F16(w) => {
                block_update(&mut w[own], Exact::new(state), None, g, step, simd, scratch)
            }
            _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
        };
        Ok(())
    })?;
    Ok(moved)
}

/// So many elements after the next row memory is asked for.
const AHEAD: usize = 2 * UNIT;

/// What a step follows.
#[derive(Clone, Copy)]
struct Followed<'a> {
    gradient: &'a Gradient<'a>,
    /// With [`Direction::Muon`] the orthogonalised momentum.
    orthogonal: Option<&'a Gradient<'a>>,
}

/// `random` is the key by which bf16 parameters are rounded at random, and the first element of `w` among all of the
/// parameter.
fn block_update<P: Parameter, S: StateRows<P::Compute>>(
    w: &mut [P],
    mut state: S,
    random: Option<(u64, usize)>,
    g: Followed,
    step: BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> (Vec<StepSums>, Vec<f64>) {
    let n = w.len();
    let coefficients = step.coefficients();
    state.reset_masters(w, step.samples);
    let noted = state.take_samples();
    let mut strips = vec![0.; if step.keeps_strips { n.div_ceil(STRIP) } else { 0 }];
    let part = Part { w: &mut *w, state, strips: &mut strips };
    let update = |scratch: &mut Scratch, start, part| {
        let sums_up = step.sums_up;
        simd.run(Update { start, part, g, coefficients, random, sums_up, scratch })
    };
    let chunks = if !splits(n) {
        update(scratch, 0, part)
    } else {
        let pieces = part.pieces(PIECE).into_par_iter().enumerate();
        let update = |scratch: &mut Scratch, (i, part)| update(scratch, i * PIECE, part);
        pieces.map_init(Scratch::new, update).collect::<Vec<_>>().concat()
    };
    step.samples.note(w, noted);
    (chunks, strips)
}

/// Neighbouring elements of a block: the parameter and its state.
struct Part<'a, P, S> {
    w: &'a mut [P],
    state: S,
    /// The sums of `D^2` over strips, to be written; empty if they are not kept.
    strips: &'a mut [f64],
}

impl<P: Parameter, S: StateRows<P::Compute>> Part<'_, P, S> {
    /// Splits off the first `len` elements.
    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        Self {
            w: self.w.split_off_mut(..len).unwrap_or_default(),
            state: self.state.take(len),
            strips: self.strips.split_off_mut(..len.div_ceil(STRIP)).unwrap_or_default(),
        }
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
    random: Option<(u64, usize)>,
    /// Whether to compute the sums over the step.
    sums_up: bool,
    scratch: &'a mut Scratch,
}

impl<P: Parameter, S: StateRows<P::Compute>> Kernel for Update<'_, P, S> {
    /// If the step is summed up, the sums of each chunk, before their [`SumScales`](super::super::SumScales).
    type Output = Vec<StepSums>;

    #[inline(always)]
    fn run(self) -> Vec<StepSums> {
        let Self { start, mut part, g: followed, coefficients, .. } = self;
        let Self { random, sums_up, scratch, .. } = self;
        let Scratch { rows, lanes } = scratch;
        let Rows { inputs, ahead, d, masked, terms: [squares, _] } = rows;
        let InputRows { tensors: [row, before], state: room } = inputs;
        let Coefficients { moments, phi, element, average, .. } = coefficients;
        let (step_size, decay_factor) = coefficients.step_coefficients(phi);
        let n = part.w.len();
        let mut chunks = vec![];
        // While numbers are packed or summed up nothing is loaded, so the processor would not fetch what comes next: it is
        // asked to, by short rows, since it can fetch only so many lines at a time.
        let computes = S::PACKED || sums_up;
        let row_len = if computes { UNIT } else { LANES };
        for at in (0..n).step_by(row_len) {
            let Part { w, mut state, strips } = part.take(row_len.min(n - at));
            if computes {
                prefetch(part.w.as_ptr().wrapping_add(AHEAD).addr(), row_len * size_of::<P>());
                followed.gradient.prefetch(start + at + row_len + AHEAD, row_len);
                part.state.prefetch(AHEAD, row_len);
            }
            let RowMut { mut master, m, v, v_max, average: a, q } = state.load(w, room);
            let before = &mut P::Compute::buffer(before)[..w.len()];
            if sums_up {
                before.iter_mut().zip(&*w).for_each(|(before, w)| *before = w.widen());
            }
            let g = followed.gradient.row(start + at, w.len(), row);
            let plain = element.is_none() && !sums_up && !moments.cautious;
            // The direction; and the momentum that it is made of, for the sums.
            let (direction, m): (&[P::Compute], &[P::Compute]) = match (moments.direction, m, v) {
                (Direction::Adam { .. }, Some(m), Some(v)) if plain => {
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
                    (&[], &[])
                }
                (Direction::Sgd { nesterov: true, .. }, Some(m), _) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for ((d, m), g) in d.iter_mut().zip(m).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *d = moments.look_ahead(*m, *g);
                    }
                    (d, &[])
                }
                (Direction::Lion { .. }, Some(m), _) => {
                    let ahead = &mut P::Compute::buffer(ahead)[..w.len()];
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for (((d, ahead), m), g) in d.iter_mut().zip(&mut *ahead).zip(m).zip(g) {
                        *ahead = moments.look_ahead(*m, *g);
                        *m = moments.first_moment(*m, *g);
                        *d = sign(*ahead);
                    }
                    (d, ahead)
                }
                (Direction::NesterovAdam { .. }, Some(m), Some(v)) => {
                    let ahead = &mut P::Compute::buffer(ahead)[..w.len()];
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for ((((d, ahead), m), v), g) in
                        d.iter_mut().zip(&mut *ahead).zip(m).zip(v).zip(g)
                    {
                        *m = moments.first_moment(*m, *g);
                        *v = moments.second_moment(*v, *g);
                        *ahead = moments.look_ahead(*m, *g);
                        *d = ahead.div(moments.denom(*v));
                    }
                    (d, ahead)
                }
                (Direction::AmsGrad { .. }, Some(m), Some(v)) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    let state = m.iter_mut().zip(v).zip(v_max.unwrap_or_default());
                    for ((d, ((m, v), v_max)), g) in d.iter_mut().zip(state).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *v = moments.second_moment(*v, *g);
                        *v_max = moments.largest(*v_max, *v);
                        *d = m.div(moments.denom(*v_max));
                    }
                    (d, m)
                }
                (
                    Direction::Momentum { .. } | Direction::Sgd { .. } | Direction::Muon { .. },
                    Some(m),
                    _,
                ) => {
                    m.iter_mut().zip(g).for_each(|(m, g)| *m = moments.first_moment(*m, *g));
                    match followed.orthogonal {
                        Some(orthogonal) => (orthogonal.row(start + at, w.len(), d), m),
                        None => (m, m),
                    }
                }
                (Direction::Adam { .. }, Some(m), Some(v)) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for (((d, m), v), g) in d.iter_mut().zip(&mut *m).zip(v).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *v = moments.second_moment(*v, *g);
                        *d = m.div(moments.denom(*v));
                    }
                    (d, m)
                }
                _ => (g, &[]),
            };
            let d = match moments.cautious {
                true => mask(direction, g, &mut P::Compute::buffer(masked)[..w.len()]),
                false => direction,
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
            if let (Some((key, first)), Some(x)) = (random, master.as_deref()) {
                P::round_row(w, x, key, ((first + start + at) / UNIT) as u64);
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
                let mut lanes = lanes.each_mut().map(|lanes| &mut lanes[..width]);
                if at % CHUNK == 0 {
                    lanes.iter_mut().for_each(|lanes| lanes.fill(0.));
                }
                let [step, direction, along] =
                    lanes.each_mut().map(|lanes| &mut lanes[at % LANES..]);
                let squares = &mut f64::buffer(squares)[..w.len()];
                step_squares(squares, step, before, w);
                if !strips.is_empty() {
                    strip_sums(strips, squares);
                }
                // Else the terms of `d m` are those of `d^2`: also where a mask leaves out the same elements of both.
                let apart = moments.direction.has_second_moment()
                    || matches!(moments.direction, Direction::Lion { .. });
                match followed.orthogonal {
                    Some(_) => {
                        add_squares(direction, d);
                        add_along_orthogonal(along, d, m, g, &moments);
                    }
                    None if apart => add_direction(direction, along, d, m),
                    None => add_squares(direction, d),
                }
                if at + w.len() == n || (at + w.len()) % CHUNK == 0 {
                    let [step, direction, along] = lanes;
                    let (step, direction) = (tree(step), tree(direction));
                    let apart = apart || followed.orthogonal.is_some();
                    let along = if apart { tree(along) } else { direction };
                    chunks.push(StepSums { step, direction, along });
                }
            }
            state.store(room);
        }
        chunks
    }
}

/// The elements of a direction that go with the gradient.
#[inline(always)]
fn mask<'r, C: Real>(d: &[C], g: &[C], masked: &'r mut [C]) -> &'r [C] {
    for ((masked, d), g) in masked.iter_mut().zip(d).zip(g) {
        *masked = cautious(*d, *g);
    }
    masked
}

/// The terms of `D^2` of a row, and adds them: `D` is the step as stored, rounded to the parameter's dtype.
#[inline(always)]
fn step_squares<P: Parameter>(
    squares: &mut [f64],
    lanes: &mut [f64],
    before: &[P::Compute],
    w: &[P],
) {
    for (((square, lane), before), w) in squares.iter_mut().zip(lanes).zip(before).zip(w) {
        let step = w.widen().to_f64() - before.to_f64();
        *square = step * step;
        *lane += *square;
    }
}

/// Adds the terms of `d^2` and `d m` of a row.
#[inline(always)]
fn add_direction<C: Real>(direction: &mut [f64], along: &mut [f64], d: &[C], m: &[C]) {
    for (((direction, along), d), m) in direction.iter_mut().zip(along).zip(d).zip(m) {
        let d = d.to_f64();
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
        let m = if ahead { moments.look_ahead(*m, *g) } else { *m };
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
    use candle_core::backprop::GradStore;
    use candle_core::{Device, Result, Tensor, Var};
    use candle_nn::Optimizer;
    use half::bf16;

    use crate::compact::{self, Offsets, UNIT};
    use crate::state::{Beside, Format};
    use crate::{Average, AverageFormat, MasterWeights, ParamsSrkl, Rounding, Srkl, StateFormat};

    fn numbers(n: usize, salt: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + salt) as f32 * 0.61).sin()).collect()
    }

    /// Rounds a block at random.
    fn rounded(xs: &[f32], seed: u64, step: u64, place: u64) -> Vec<bf16> {
        let mut rounded = vec![bf16::ZERO; xs.len()];
        compact::round_row(&mut rounded, xs, compact::offset_key(seed, step, place), 0);
        rounded
    }

    /// Steps of bf16 parameters and of f32 ones with packed state give what the formula gives on decoded numbers,
    /// encoded again, in all of the state.
    #[test]
    fn packed_steps_are_those_of_decoded_numbers() -> Result<()> {
        // Steps before this one of another size, in pieces and units that end anywhere.
        for (n, splits, averages) in
            [(4096, true, true), (4097, false, true), (9001, true, false), (70_001, false, false)]
        {
            let params = ParamsSrkl {
                state: StateFormat::Compact,
                master_weights: if splits { MasterWeights::Split } else { MasterWeights::None },
                rounding: Rounding::Stochastic,
                average: averages.then_some(Average::Polynomial(8.)),
                average_format: AverageFormat::BF16,
                ..ParamsSrkl::adamw(0.01)
            };
            let start: Vec<bf16> = numbers(n, 5).into_iter().map(bf16::from_f32).collect();
            let before = Var::from_tensor(&Tensor::new(&[1f32], &Device::Cpu)?)?;
            let var = Var::from_tensor(&Tensor::new(&start[..], &Device::Cpu)?)?;
            let mut opt = Srkl::new(vec![before, var.clone()], params)?;

            let mut x: Vec<f32> = start.iter().map(|w| w.to_f32()).collect();
            let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
            let mut average = vec![0f32; n];
            for step in 0..6u64 {
                let g = numbers(n, 100 + step as usize);
                let mut grads = GradStore::default();
                grads.insert(&var, Tensor::new(&g[..], &Device::Cpu)?);
                opt.step(&grads)?;

                let t = step as i32 + 1;
                let [c1, c2] = [0.9f64, 0.999].map(|beta: f64| {
                    // A product, as the optimizer keeps it.
                    1. / (1. - (0..t).fold(1., |power, _| power * beta))
                });
                let (beta1, beta2) = (0.9f32, 0.999f32);
                let (gain1, gain2) = ((1. - 0.9f64) as f32, (1. - 0.999f64) as f32);
                let (size, decay) = ((0.01 * c1) as f32, (1. - 0.01 * 0.01f64) as f32);
                let weight = (9. / (f64::from(t) + 8.)) as f32;
                for i in 0..n {
                    m[i] = g[i].mul_add(gain1, beta1 * m[i]);
                    v[i] = (gain2 * g[i]).mul_add(g[i], beta2 * v[i]);
                    let d = m[i] / ((c2 as f32 * v[i]).sqrt() + 1e-8);
                    x[i] = d.mul_add(-size, decay * x[i]);
                    average[i] = (x[i] - average[i]).mul_add(weight, average[i]);
                }
                let key = compact::offset_key(compact::MOMENTS, step, 1);
                let mut codes = [0; UNIT];
                for (u, (m, v)) in m.chunks_mut(UNIT).zip(v.chunks_mut(UNIT)).enumerate() {
                    let base = compact::offset_base(key, u as u64);
                    let exponent = compact::encode_v_unit(v, Offsets::Random(base), &mut codes);
                    compact::decode_v_unit(&codes, exponent, v);
                    let exponent = compact::encode_m_unit(m, Some(v), &mut codes);
                    compact::decode_m_unit(&codes, exponent, Some(v), m);
                }
                let w: Vec<bf16> = if splits {
                    x.iter_mut().for_each(|x| {
                        let (parameter, rest) = compact::split(*x);
                        *x = compact::join(parameter, rest);
                    });
                    x.iter().map(|x| bf16::from_f32(*x)).collect()
                } else {
                    rounded(&x, compact::PARAMETERS, step, 1)
                };
                if !splits {
                    x = w.iter().map(|w| w.to_f32()).collect();
                }
                let kept = rounded(&average, compact::AVERAGES, step, 1);
                average = kept.iter().map(|a| a.to_f32()).collect();

                assert_eq!(var.to_vec1::<bf16>()?, w, "{n} {step}");
                let state = &opt.all.blocks[1].state;
                let mut beside = Beside { v: None, parameter: &w };
                for (name, format, expected) in [
                    ("v", Format::Compact, &v),
                    ("m", Format::Compact, &m),
                    ("master", Format::Split, &x),
                    ("average", Format::BF16, &average),
                ] {
                    let has = match name {
                        "master" => splits,
                        "average" => averages,
                        _ => true,
                    };
                    let slot = state.named().find(|(other, _)| *other == name);
                    assert_eq!(slot.is_some(), has, "{name}");
                    let Some((_, slot)) = slot else { continue };
                    let saved = slot.save()?;
                    assert_eq!(saved.format, format);
                    let kept: Vec<u32> =
                        saved.to_f32(name, beside)?.into_iter().map(f32::to_bits).collect();
                    let expected: Vec<u32> = expected.iter().map(|x| x.to_bits()).collect();
                    assert_eq!(kept, expected, "{n} {step} {name}");
                    beside.v = Some(&v);
                }
                if splits {
                    let master = opt.master("1")?.unwrap();
                    assert_eq!(master, x);
                }
            }
        }
        Ok(())
    }
}
