//! Stage 3, update: moves the parameters of a block. The mathematics of an element is in [`rule`](crate::rule).

use candle_core::{CpuStorage, Result, Tensor, bail};
use rayon::prelude::*;

use super::super::BlockGradient;
use super::access::{Parameter, Samples, with_storage_mut};
use super::gradient::{Compute, Gradient};
use super::moments::{UNITS, bases};
use super::row_step::{Adam, Followed, Known, NoSums, RowStep, RowSums, StepSizes};
use super::rows::{Exact, Keys, Packed, RowMut, StateRows};
use super::simd::{AHEAD, Kernel, Simd, Stream, first};
use super::statistics::{InputRows, PIECE, Rows, Scratch, splits};
use crate::block::Block;
use crate::compact::UNIT;
use crate::estimate::{Estimate, StepSums};
use crate::numerics::{CHUNK, LANES, MIN_LANES, Real, STRIP, strip_sums, tree};
use crate::params::{Direction, ParamsSrkl};
use crate::rule::{Coefficients, Corrections, Decision, Moments, cautious, lerp, sign};

/// The numbers of one block's step.
#[derive(Clone, Copy)]
pub(crate) struct BlockStep<'a> {
    pub params: &'a ParamsSrkl,
    pub decision: &'a Decision,
    pub corrections: Corrections,
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
        let Self { params, decision, corrections, estimate, matrix_scale, .. } = self;
        Coefficients::new(params, decision, corrections, estimate, *matrix_scale)
    }
}

/// The sums over a step, for a measurement or telemetry.
#[derive(Default)]
pub(crate) struct Summed {
    /// Over chunks, before their [`SumScales`](super::super::SumScales).
    pub chunks: Vec<StepSums>,
    /// Of `D^2` over strips; empty if they are not kept.
    pub strips: Vec<f64>,
}

/// Moves a block by its gradient, in place, and returns the sums over the step if `step.sums_up`.
pub(crate) fn update(
    block: &mut Block,
    found: &BlockGradient,
    step: &BlockStep,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<Option<Summed>> {
    let mut summed = None;
    if block.n == 0 {
        return Ok(summed); // candle refuses to write to an empty tensor.
    }
    let packs = block.is_packed(step.params);
    let rounds = block.rounds(step.params);
    let Block { memory, state, orthogonal, n, first, .. } = block;
    let (n, first) = (*n, *first);
    let own = first..first + n;
    let (storage, layout) = found.gradient.storage_and_layout();
    let orthogonal = orthogonal.as_ref().map(Tensor::storage_and_layout);
    let orthogonal = orthogonal.as_ref().map(|(storage, layout)| Gradient::new(storage, layout));
    let orthogonal = orthogonal.transpose()?;
    let gradient = Gradient::of(&storage, layout, found.elements != 0)?;
    let given = &Given { gradient: &gradient, orthogonal: orthogonal.as_ref(), step, simd };
    with_storage_mut(memory, |storage| {
        if packs {
            let keys = Keys::new(step.steps, step.place);
            let state = Packed::new(state, n, first, keys, rounds);
            let random = rounds.then_some((keys.parameters, first));
            summed = match storage {
                CpuStorage::F32(w) => block_update(&mut w[own], state, None, given, scratch),
                CpuStorage::BF16(w) => block_update(&mut w[own], state, random, given, scratch),
                CpuStorage::F16(w) => block_update(&mut w[own], state, None, given, scratch),
                _ => bail!("expected a parameter of f32, bf16 or f16"),
            };
            return Ok(());
        }
        summed = match storage {
            CpuStorage::F32(w) => {
                block_update(&mut w[own], Exact::new(state), None, given, scratch)
            }
            CpuStorage::F64(w) => {
                block_update(&mut w[own], Exact::new(state), None, given, scratch)
            }
            CpuStorage::BF16(w) => {
                block_update(&mut w[own], Exact::new(state), None, given, scratch)
            }
            CpuStorage::F16(w) => {
                block_update(&mut w[own], Exact::new(state), None, given, scratch)
            }
            _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
        };
        Ok(())
    })?;
    Ok(summed)
}

/// What a step is computed from, besides parameter and state.
struct Given<'a> {
    gradient: &'a Gradient<'a>,
    /// With [`Direction::Muon`] the orthogonalised momentum.
    orthogonal: Option<&'a Gradient<'a>>,
    step: &'a BlockStep<'a>,
    simd: Simd,
}

/// `random` is the key by which bf16 parameters are rounded at random, and the first element of `w` among all of the
/// parameter.
fn block_update<P: Parameter, S: StateRows<P::Compute>>(
    w: &mut [P],
    mut state: S,
    random: Option<(u64, usize)>,
    given: &Given,
    scratch: &mut Scratch,
) -> Option<Summed> {
    let Given { step, simd, .. } = given;
    let n = w.len();
    let coefficients = &step.coefficients();
    state.reset_masters(w, step.samples);
    let noted = state.take_samples();
    let mut strips = vec![0.; if step.keeps_strips { n.div_ceil(STRIP) } else { 0 }];
    let part = Part { w: &mut *w, state, strips: &mut strips };
    let update = |scratch: &mut Scratch, start, part| {
        simd.run(Update { start, part, given, coefficients, random, scratch })
    };
    let chunks = if !splits(n) {
        update(scratch, 0, part)
    } else {
        let pieces = part.pieces(PIECE).into_par_iter().enumerate();
        let update = |scratch: &mut Scratch, (i, part)| update(scratch, i * PIECE, part);
        pieces.map_init(Scratch::new, update).collect::<Vec<_>>().concat()
    };
    step.samples.note(w, noted);
    step.sums_up.then_some(Summed { chunks, strips })
}

/// Neighbouring elements of a block: the parameter and its state.
struct Part<'a, P, S> {
    w: &'a mut [P],
    state: S,
    /// The sums of `D^2` over strips, to be written; empty if they are not kept.
    strips: &'a mut [f64],
}

impl<P: Parameter, S: StateRows<P::Compute>> Part<'_, P, S> {
    /// Where its arrays, from element `start` on, and the gradient are in memory; and how many of these there are.
    #[inline(always)]
    fn streams(&self, start: usize, gradient: Option<Stream>) -> ([Stream; 6], usize) {
        let mut streams = [Stream::of(self.w, start); 6];
        let mut count = 1;
        let [a, b, c, d] = self.state.streams(start);
        for stream in [gradient, a, b, c, d].into_iter().flatten() {
            streams[count] = stream;
            count += 1;
        }
        (streams, count)
    }

    /// Splits off the first `len` elements.
    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        Self {
            w: first(&mut self.w, len),
            state: self.state.take(len),
            strips: first(&mut self.strips, len.div_ceil(STRIP)),
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
    given: &'a Given<'a>,
    coefficients: &'a Coefficients<P::Compute>,
    random: Option<(u64, usize)>,
    scratch: &'a mut Scratch,
}

impl<P: Parameter, S: StateRows<P::Compute>> Kernel for Update<'_, P, S> {
    /// If the step is summed up, the sums of each chunk, before their [`SumScales`](super::super::SumScales).
    type Output = Vec<StepSums>;

    #[inline(always)]
    fn run(self) -> Vec<StepSums> {
        let Self { start, mut part, given, coefficients, .. } = self;
        let Self { random, scratch, .. } = self;
        let sums_up = given.step.sums_up;
        let Scratch { rows, lanes } = scratch;
        let Rows { inputs, ahead, d, masked, terms: [squares, _] } = rows;
        let InputRows { tensors: [row, _], state: room } = inputs;
        let Coefficients { moments, phi, element, average, .. } = *coefficients;
        let (step_size, decay_factor) = coefficients.step_coefficients(phi);
        let n = part.w.len();
        let mut chunks = vec![];
        // While numbers are packed or summed up little is loaded, so the processor would not fetch what comes next: it is
        // asked to, from so many elements beyond a row's end on. Rows are short then, since the first cache has to hold that too.
        let (row_len, beyond) = match (S::PACKED, sums_up) {
            (true, _) => (UNITS * UNIT, 0),
            (false, true) => (UNIT, AHEAD),
            (false, false) => (LANES, AHEAD),
        };
        let mut next = 0;
        while next < n {
            // Not `step_by`, which divides: that would be a part of the step of a small tensor.
            let at = next;
            next = n.min(at + row_len);
            let Part { w, mut state, strips } = part.take(next - at);
            let RowMut { mut master, m, v, v_max, average: a, q, compact } = state.load(w, room);
            let g = given.gradient.row(start + at, w.len(), row);
            let known = |d, m| Followed::Known(Known { d, m });
            let follows = match (moments.direction, m, v) {
                (Direction::Adam { .. }, Some(m), Some(v))
                    if element.is_none() && !moments.cautious =>
                {
                    let moments = Moments { canonical: !compact, ..moments };
                    Followed::Adam(Adam { m, v, g, moments })
                }
                (Direction::Sgd { nesterov: true, .. }, Some(m), _) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for ((d, m), g) in d.iter_mut().zip(m).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *d = moments.look_ahead(*m, *g);
                    }
                    known(d, &[])
                }
                (Direction::Lion { .. }, Some(m), _) => {
                    let ahead = &mut P::Compute::buffer(ahead)[..w.len()];
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for (((d, ahead), m), g) in d.iter_mut().zip(&mut *ahead).zip(m).zip(g) {
                        *ahead = moments.look_ahead(*m, *g);
                        *m = moments.first_moment(*m, *g);
                        *d = sign(*ahead);
                    }
                    known(d, ahead)
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
                    known(d, ahead)
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
                    known(d, m)
                }
                (
                    Direction::Momentum { .. } | Direction::Sgd { .. } | Direction::Muon { .. },
                    Some(m),
                    _,
                ) => {
                    m.iter_mut().zip(g).for_each(|(m, g)| *m = moments.first_moment(*m, *g));
                    match (given.orthogonal, moments.direction) {
                        (None, _) => known(m, &[]),
                        (Some(orthogonal), Direction::Muon { nesterov: true, .. }) if sums_up => {
                            let ahead = &mut P::Compute::buffer(ahead)[..w.len()];
                            for ((ahead, m), g) in ahead.iter_mut().zip(m).zip(g) {
                                *ahead = moments.look_ahead(*m, *g);
                            }
                            known(orthogonal.row(start + at, w.len(), d), ahead)
                        }
                        (Some(orthogonal), _) => known(orthogonal.row(start + at, w.len(), d), m),
                    }
                }
                (Direction::Adam { .. }, Some(m), Some(v)) => {
                    let d = &mut P::Compute::buffer(d)[..w.len()];
                    for (((d, m), v), g) in d.iter_mut().zip(&mut *m).zip(v).zip(g) {
                        *m = moments.first_moment(*m, *g);
                        *v = moments.second_moment(*v, *g);
                        *d = m.div(moments.denom(*v));
                    }
                    known(d, m)
                }
                _ => known(g, &[]),
            };
            let follows = match follows {
                Followed::Known(Known { d, m }) if moments.cautious => {
                    known(mask(d, g, &mut P::Compute::buffer(masked)[..w.len()]), m)
                }
                follows => follows,
            };
            let bases = |(key, first)| bases(key, ((first + start + at) / UNIT) as u64);
            let random = random.map(bases);
            let len = w.len();
            let row = RowStep { w: &mut *w, master: master.as_deref_mut(), random };
            let sizes = match &element {
                None => StepSizes::All((step_size, decay_factor)),
                Some(brake) => StepSizes::Each(|i: usize| {
                    let q = q.as_ref().map_or(0., |q| q[i].to_f64());
                    coefficients.step_coefficients(brake.element_phi(g[i].to_f64(), q))
                }),
            };
            let streams = || part.streams(beyond, given.gradient.stream(start + next + beyond));
            if !sums_up {
                let (streams, count) = if S::PACKED { streams() } else { ([Stream::NONE; 6], 0) };
                row.follow(follows, &mut NoSums, sizes, &streams[..count]);
            } else {
                let (streams, count) = streams();
                let streams = &streams[..count];
                let in_chunk = CHUNK.min(n - at / CHUNK * CHUNK);
                let width = in_chunk.clamp(MIN_LANES, LANES).next_power_of_two();
                let mut lanes = lanes.each_mut().map(|lanes| &mut lanes[..width]);
                if at % CHUNK == 0 {
                    lanes.iter_mut().for_each(|lanes| lanes.fill(0.));
                }
                let has_momentum = follows.has_momentum();
                let mut sums = RowSums {
                    lanes: lanes.each_mut().map(|lanes| &mut lanes[at % LANES..][..len]),
                    squares: &mut f64::buffer(squares)[..len],
                    has_momentum,
                };
                row.follow(follows, &mut sums, sizes, streams);
                if !strips.is_empty() {
                    strip_sums(strips, sums.squares);
                }
                if at + len == n || (at + len) % CHUNK == 0 {
                    let [step, direction, along] = lanes;
                    let (step, direction) = (tree(step), tree(direction));
                    let along = if has_momentum { tree(along) } else { direction };
                    chunks.push(StepSums { step, direction, along });
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
            state.store(w, room);
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
