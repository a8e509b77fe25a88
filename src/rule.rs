//! The mathematics of a step: functions of their arguments alone, in the order of a step.
//!
//! | of a block | |
//! |---|---|
//! | `grad_factor` | unscale and clip |
//! | `next_powers`, `bias_correction` | bias correction of averages that start at 0 |
//! | `brake`, `limit_growth`, `decide`, `may_step` | phi by the curvature, and whether the block moves |
//! | `adjust` | the small first step, the trust clip |
//!
//! | of an element | |
//! |---|---|
//! | `first_moment`, `look_ahead`, `second_moment`, `largest`, `denom`, `sign`, `cautious` | the direction |
//! | `element_phi`, `step_coefficients`, `apply_step` | the step |
//! | `lerp` | the average of the parameter |
//!
//! | of a measurement | |
//! |---|---|
//! | `probe_size` | how far random vectors perturb |
//! | `step_metric`, `measured` | the sums of a measurement along a step |
//! | `steps_since` to `observe_rows` | how it enters the estimate |
//!
//! `kernels/rule.cuh` has the same functions in the same order (`tests/contract.rs` compares the lists). The order of
//! operations in both is part of the contract in [`numerics`](crate::numerics); what runs them, over which elements and on
//! which threads, is in `backend`.

use crate::estimate::{Averaging, ChangeSums, Estimate, Left, Measured, Probe, StepSums};
use crate::numerics::{Real, Sums, eighths, pow2};
use crate::params::{Average, Curvature, Direction, NonFinite, ParamsSrkl, Scope};

/// What a step uses that is neither a setting of a group nor a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StepScalars {
    /// The schedule's multiplier `s`.
    pub schedule: f64,
    /// Gradients are divided by it first.
    pub grad_scale: f64,
}

/// The numbers of one block's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decision {
    /// What the gradient is multiplied by, to unscale and clip it.
    pub grad_factor: f64,
    /// The curvature `H`, if `has_curvature`; for [`Scope::Element`] that of the block, used only to see whether it
    /// is finite. (An `Option` would take 8 bytes more for every tensor.)
    pub curvature: f64,
    pub has_curvature: bool,
    /// The brake `s * lr / (1 + beta * H)`; if elements have their own brakes, what these use in place of `s * lr`.
    pub phi: f64,
    /// Whether everything that this block uses is finite.
    pub finite: bool,
    /// Whether the step is a small one, shorter than it would be on flat ground.
    pub small: bool,
}

/// The measured `H`, if there is an estimate.
fn estimated_curvature(estimate: &Estimate) -> Option<f64> {
    estimate.curvature()
}

/// What a gradient is multiplied by, to unscale and clip it. A NaN norm makes it a NaN.
fn grad_factor(params: &ParamsSrkl, scalars: StepScalars, total: &Sums) -> f64 {
    let c = 1. / scalars.grad_scale;
    let Some(max_grad_norm) = params.max_grad_norm else { return c };
    let norm = total.norm(c);
    c * if norm <= max_grad_norm { 1. } else { max_grad_norm / norm }
}

/// `phi = lr / (1 + beta * H)`, with the schedule in `lr`.
#[inline(always)]
fn brake(lr: f64, beta: f64, curvature: f64) -> f64 {
    lr / (1. + beta * curvature)
}

/// The products of the decays over the steps that have moved a block: `mu^t`, and so on. 1 before the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Powers {
    /// Of `mu`, or `beta1`.
    pub first: f64,
    /// Of `beta2`.
    pub second: f64,
    /// Of the average's decay; of a polynomial average 1 more than the number of steps.
    pub average: f64,
}

impl Powers {
    pub const NONE: Self = Self { first: 1., second: 1., average: 1. };
}

/// The powers after one more step.
pub(crate) fn next_powers(powers: &Powers, params: &ParamsSrkl) -> Powers {
    let (first, second) = match params.direction {
        Direction::Gradient | Direction::Sgd { .. } | Direction::Lion { .. } => (1., 1.),
        Direction::Momentum { mu } | Direction::Muon { mu, .. } => (mu, 1.),
        Direction::Adam { beta1, beta2, .. }
        | Direction::NesterovAdam { beta1, beta2, .. }
        | Direction::AmsGrad { beta1, beta2, .. } => (beta1, beta2),
    };
    Powers {
        first: powers.first * first,
        second: powers.second * second,
        average: match params.average {
            Some(Average::Exponential(c)) => powers.average * c,
            Some(Average::Polynomial(_)) => powers.average + 1.,
            None => powers.average,
        },
    }
}

/// The factor that corrects an average for its start at 0; 1 if there is no average.
fn bias_correction(power: f64) -> f64 {
    if power == 1. { 1. } else { 1. / (1. - power) }
}

/// The bias corrections of the averages of a block.
#[derive(Clone, Copy)]
pub(crate) struct Corrections {
    /// `1 / (1 - mu^t)` of the first moment, and of the second.
    pub scale_m: f64,
    pub scale_v: f64,
    /// `(1 - beta1^(t + 1)) / (1 - beta1^t)` of [`Direction::NesterovAdam`]: what the gradient is multiplied by beside a momentum
    /// that looks ahead. Else 1.
    pub ahead: f64,
    /// The weight of the new parameter in its average: see [`Average`].
    pub average: f64,
}

impl Corrections {
    /// `powers` are those before the step.
    pub fn new(params: &ParamsSrkl, powers: &Powers) -> Self {
        let powers = next_powers(powers, params);
        // One that looks ahead by a step more.
        let (first, ahead) = match params.direction {
            Direction::Muon { mu, nesterov: true, .. } => (powers.first * mu, 1.),
            Direction::NesterovAdam { beta1, .. } => {
                let next = powers.first * beta1;
                (next, (1. - next) / (1. - powers.first))
            }
            _ => (powers.first, 1.),
        };
        Self {
            scale_m: bias_correction(first),
            scale_v: bias_correction(powers.second),
            ahead,
            average: match params.average {
                Some(Average::Exponential(c)) => (1. - c) * bias_correction(powers.average),
                // 1 more than the number of steps, this one included.
                Some(Average::Polynomial(k)) => (1. + k) / (powers.average - 1. + k),
                None => 0.,
            },
        }
    }
}

/// How many measurements along steps an estimate has before `phi` may grow without limit, and how much longer a step may
/// be than the last measured one until then.
const FEW: u64 = 10;
const GROWTH: f64 = 10.;

/// A brake by curvature that was measured a few times only. The first measurement is along a small step, and has not
/// seen what had no gradient yet: in LoRA the half that meets a half of zeros. The step that it seems to allow may be a
/// thousand times as long, and throw the training back for good. So steps grow by a factor, and are measured as they do.
fn limit_growth(phi: f64, params: &ParamsSrkl, estimate: &Estimate) -> f64 {
    let most = GROWTH * estimate.reach;
    let few = params.measures_steps() && estimate.in_average < FEW;
    if few && most > 0. && phi > most { most } else { phi }
}

/// Decides a block's step. `total` are the sums over all blocks, if `params` use them.
pub(crate) fn decide(
    params: &ParamsSrkl,
    scalars: StepScalars,
    block_sums: &Sums,
    total: &Sums,
    estimate: &Estimate,
) -> Decision {
    let grad_factor = grad_factor(params, scalars, total);
    let lr = scalars.schedule * params.lr;
    let mut finite = block_sums.sum4.is_finite() && grad_factor > 0.;
    let (curvature, phi) = match params.curvature {
        Curvature::GradSquare => {
            let sums = if params.scope == Scope::Global { total } else { block_sums };
            let curvature = sums.curvature(grad_factor);
            finite &= curvature.is_finite();
            (Some(curvature), brake(lr, params.beta_value(), curvature))
        }
        Curvature::None => (None, lr),
        _ => {
            let curvature = estimated_curvature(estimate);
            // No step without a finite estimate; `adjust` may allow a small one.
            let known = curvature.filter(|curvature| curvature.is_finite());
            let phi = known.map_or(0., |curvature| brake(lr, params.beta_value(), curvature));
            (curvature, limit_growth(phi, params, estimate))
        }
    };
    let phi = if params.has_element_brakes() && phi != 0. { lr } else { phi };
    Decision {
        grad_factor,
        curvature: curvature.unwrap_or(0.),
        has_curvature: curvature.is_some(),
        phi,
        finite,
        small: false,
    }
}

/// Whether `policy` lets a block with this decision be stepped.
pub(crate) fn may_step(decision: &Decision, policy: NonFinite) -> bool {
    decision.finite || policy == NonFinite::Propagate
}

/// Whether there is a finite estimate, where curvature is measured.
pub(crate) fn is_known(decision: &Decision) -> bool {
    decision.has_curvature && (0. ..f64::INFINITY).contains(&decision.curvature)
}

/// Sums over a block, or over several.
#[derive(Clone, Copy)]
pub(crate) struct DirectionSums {
    /// Of `d^2`, or of `(phi d)^2` if elements have their own brakes.
    pub direction_sq: f64,
    /// Of `w^2`.
    pub parameter_sq: f64,
}

/// What [`adjust`] needs of the directions.
#[derive(Clone, Copy)]
pub(crate) struct Directions {
    /// Over the block, which has `n` elements.
    pub block: DirectionSums,
    pub n: f64,
    /// Over all blocks that move and have [`Curvature::Step`], and how many elements these have.
    pub total: DirectionSums,
    pub total_n: f64,
}

/// The least RMS of parameters that the length of a step is compared with.
const LEAST_RMS: f64 = 0.01;

/// The length of a small step, relative to the RMS of the parameters.
const SMALL_STEP: f64 = 0.003;

/// How often it is doubled at most: once for each small step in a row that moved nothing.
const MOST_DOUBLINGS: u64 = 8;

/// The part of stage 2 that needs the directions: a small step, if the step measures without an estimate, and the
/// trust clip. `still` small steps in a row have moved nothing.
pub(crate) fn adjust(
    decision: &mut Decision,
    params: &ParamsSrkl,
    scalars: StepScalars,
    directions: &Directions,
    still: u64,
    measures: bool,
) {
    let Directions { block, n, total, total_n } = directions;
    if params.measures_steps() && measures && !is_known(decision) {
        let rms_w = (total.parameter_sq / total_n).sqrt().max(LEAST_RMS);
        let rms_d = (total.direction_sq / total_n).sqrt();
        let share = SMALL_STEP * pow2(still.min(MOST_DOUBLINGS) as i32);
        let by_direction = share * rms_w / rms_d;
        // Infinite without decay.
        let by_decay = share / params.weight_decay;
        let small = if by_decay < by_direction { by_decay } else { by_direction };
        let lr = scalars.schedule * params.lr;
        decision.small = small < lr;
        decision.phi = if decision.small { small } else { lr };
    }
    if let Some(tau) = params.trust {
        let length = block.direction_sq.sqrt();
        let length = if params.has_element_brakes() { length } else { decision.phi * length };
        let most = tau * block.parameter_sq.sqrt().max(LEAST_RMS * n.sqrt());
        if length > most {
            decision.phi *= most / length;
        }
    }
}

/// The numbers by which moments, and from them the direction, are computed.
#[derive(Clone, Copy)]
pub(crate) struct Moments<C> {
    pub direction: Direction,
    pub cautious: bool,
    /// Whether a NaN among new moments is made the canonical one: true, except by a caller to whom all NaNs are alike.
    pub canonical: bool,
    pub decay1: C,
    /// `gain1 * grad_factor`, where `gain1` is `1 - decay1`, or 1 for [`Direction::Sgd`].
    pub gain1_factor: C,
    /// The same of what looks ahead.
    pub ahead_decay: C,
    pub ahead_gain_factor: C,
    pub decay2: C,
    pub one_minus_decay2: C,
    pub grad_factor: C,
    pub scale_v: C,
    pub eps: C,
}

impl<C: Real> Moments<C> {
    pub fn new(params: &ParamsSrkl, grad_factor: f64, corrections: &Corrections) -> Self {
        let (decay1, gain1, decay2, eps) = match params.direction {
            Direction::Gradient => (0., 1., 0., 0.),
            Direction::Sgd { momentum, .. } => (momentum, 1., 0., 0.),
            Direction::Momentum { mu } | Direction::Muon { mu, .. } => (mu, 1. - mu, 0., 0.),
            Direction::Adam { beta1, beta2, eps }
            | Direction::NesterovAdam { beta1, beta2, eps }
            | Direction::AmsGrad { beta1, beta2, eps } => (beta1, 1. - beta1, beta2, eps),
            Direction::Lion { beta2, .. } => (beta2, 1. - beta2, 0., 0.),
        };
        let (ahead_decay, ahead_gain) = match params.direction {
            Direction::Lion { beta1, .. } => (beta1, 1. - beta1),
            _ => (decay1, gain1 * corrections.ahead),
        };
        Self {
            direction: params.direction,
            cautious: params.cautious,
            canonical: true,
            decay1: C::from_f64(decay1),
            gain1_factor: C::from_f64(gain1 * grad_factor),
            ahead_decay: C::from_f64(ahead_decay),
            ahead_gain_factor: C::from_f64(ahead_gain * grad_factor),
            decay2: C::from_f64(decay2),
            one_minus_decay2: C::from_f64(1. - decay2),
            grad_factor: C::from_f64(grad_factor),
            scale_v: C::from_f64(corrections.scale_v),
            eps: C::from_f64(eps),
        }
    }

    /// `m <- mu m + (1 - mu) grad_factor g`; of [`Direction::Sgd`] `m <- mu m + grad_factor g`
    #[inline(always)]
    pub fn first_moment(&self, m: C, g: C) -> C {
        g.mul_add(self.gain1_factor, self.decay1.mul(m)).canonical_if(self.canonical)
    }

    /// `mu m + grad_factor g`, or for [`Direction::Muon`] and [`Direction::NesterovAdam`] `mu m + (1 - mu) grad_factor g`, with
    /// the new `m`; of [`Direction::Lion`] `beta1 m + (1 - beta1) grad_factor g`, with the old one.
    #[inline(always)]
    pub fn look_ahead(&self, m: C, g: C) -> C {
        g.mul_add(self.ahead_gain_factor, self.ahead_decay.mul(m)).canonical()
    }

    /// `v <- beta2 v + (1 - beta2) (grad_factor g)^2`
    #[inline(always)]
    pub fn second_moment(&self, v: C, g: C) -> C {
        let g = self.grad_factor.mul(g);
        let v = self.one_minus_decay2.mul(g).mul_add(g, self.decay2.mul(v));
        v.canonical_if(self.canonical)
    }

    /// `u <- max(u, v)`
    #[inline(always)]
    pub fn largest(&self, v_max: C, v: C) -> C {
        if v > v_max { v } else { v_max }
    }

    /// `P = sqrt(v / (1 - beta2^t)) + eps`
    #[inline(always)]
    pub fn denom(&self, v: C) -> C {
        self.scale_v.mul(v).sqrt().add(self.eps)
    }
}

/// -1, 0 or 1; a NaN stays one.
#[inline(always)]
pub(crate) fn sign<C: Real>(x: C) -> C {
    let [zero, one] = [0., 1.].map(C::from_f64);
    if x > zero {
        one
    } else if x < zero {
        one.neg()
    } else {
        x
    }
}

/// `d`, or 0 where it is against the gradient; a NaN stays one. (Not by the sign of a product, which may be too small for C.)
#[inline(always)]
pub(crate) fn cautious<C: Real>(d: C, g: C) -> C {
    let zero = C::from_f64(0.);
    let against = d > zero && g <= zero || d < zero && g >= zero;
    if against { zero } else { d }
}

/// Computes the brake of each element.
#[derive(Clone, Copy)]
pub(crate) struct ElementBrake {
    pub lr: f64,
    pub beta: f64,
    pub curvature: ElementCurvature,
}

#[derive(Clone, Copy)]
pub(crate) enum ElementCurvature {
    /// `(grad_factor g)^2`
    GradSquare { grad_factor: f64 },
    /// `r^(own / 8) * shared` with `r = sqrt(correction * q)`
    Rows { correction: f64, own: u32, shared: f64 },
}

/// `r^(1 - p) * R^p` with `p = shared / 8`
fn row_curvature(estimate: &Estimate, shared: u32) -> ElementCurvature {
    ElementCurvature::Rows {
        correction: bias_correction(estimate.power),
        own: 8 - shared,
        shared: eighths(estimate.row_sum_sq.sqrt(), shared),
    }
}

impl ElementBrake {
    /// The brake of an element of gradient `g`.
    #[inline(always)]
    pub fn element_phi(&self, g: f64, q: f64) -> f64 {
        if self.lr == 0. {
            return 0.;
        }
        let curvature = match self.curvature {
            ElementCurvature::GradSquare { grad_factor } => {
                let d = grad_factor * g;
                d * d
            }
            ElementCurvature::Rows { correction, own, shared } => {
                eighths((correction * q).sqrt(), own) * shared
            }
        };
        brake(self.lr, self.beta, curvature)
    }
}

/// What the gradient or momentum of [`Moments`] is multiplied by: a gradient by the factor that unscales and clips it,
/// a momentum by its bias correction.
pub(crate) fn momentum_scale(
    params: &ParamsSrkl,
    decision: &Decision,
    corrections: &Corrections,
) -> f64 {
    if params.direction == Direction::Gradient { decision.grad_factor } else { corrections.scale_m }
}

/// What the result of [`Moments`] is multiplied by to give the direction: the same, but for an orthogonal matrix, whose
/// scale is `matrix_scale`.
pub(crate) fn direction_scale(
    params: &ParamsSrkl,
    decision: &Decision,
    corrections: &Corrections,
    matrix_scale: f64,
) -> f64 {
    if params.is_muon() { matrix_scale } else { momentum_scale(params, decision, corrections) }
}

/// The numbers of one block's update.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients<C> {
    pub moments: Moments<C>,
    /// See [`direction_scale`].
    pub scale: f64,
    pub phi: f64,
    pub weight_decay: f64,
    pub average: C,
    pub element: Option<ElementBrake>,
}

impl<C: Real> Coefficients<C> {
    pub fn new(
        params: &ParamsSrkl,
        decision: &Decision,
        corrections: &Corrections,
        estimate: &Estimate,
        matrix_scale: f64,
    ) -> Self {
        let beta = params.beta_value();
        let Decision { grad_factor, phi, .. } = *decision;
        let element = match (params.scope, params.curvature) {
            (Scope::Element, Curvature::GradSquare) => {
                Some(ElementCurvature::GradSquare { grad_factor })
            }
            (Scope::Element, _) => Some(row_curvature(estimate, 0)),
            (Scope::Mixed(p), _) => Some(row_curvature(estimate, (8. * p) as u32)),
            _ => None,
        };
        Self {
            moments: Moments::new(params, grad_factor, corrections),
            scale: direction_scale(params, decision, corrections, matrix_scale),
            phi,
            weight_decay: params.weight_decay,
            average: C::from_f64(corrections.average),
            element: element.map(|curvature| ElementBrake { lr: phi, beta, curvature }),
        }
    }

    /// `step_size` and `decay_factor` of [`apply_step`]: `phi * scale` and `1 - phi * weight_decay`.
    #[inline(always)]
    pub fn step_coefficients(&self, phi: f64) -> (C, C) {
        (C::from_f64(phi * self.scale), C::from_f64(1. - phi * self.weight_decay))
    }
}

/// `w <- decay_factor * w - step_size * d`
#[inline(always)]
pub(crate) fn apply_step<C: Real>(w: C, d: C, step_size: C, decay_factor: C) -> C {
    d.mul_add(step_size.neg(), decay_factor.mul(w)).canonical()
}

/// `a <- a + weight * (w - a)`
#[inline(always)]
pub(crate) fn lerp<C: Real>(a: C, w: C, weight: C) -> C {
    w.sub(a).mul_add(weight, a).canonical()
}

/// The size of a perturbation by random vectors, from the sum of `w^2` over all `n` elements.
pub(crate) fn probe_size(delta: f64, squares: f64, n: f64) -> f64 {
    delta * (squares / n).sqrt().max(LEAST_RMS)
}

/// `<D, P D>` of a block, from the sums of its step: `||D||^2 <d, m> / ||d||^2`.
fn step_metric(sums: &StepSums) -> f64 {
    if sums.direction == 0. { 0. } else { sums.step * (sums.along / sums.direction) }
}

/// The sums of a measurement of a block: over the change of its gradient, and over its step.
pub(crate) fn measured(change: ChangeSums, sums: &StepSums) -> Measured {
    Measured {
        change: change.change_sq,
        step: sums.step,
        direction: sums.direction,
        bound: change.bound,
        metric: step_metric(sums),
    }
}

/// A measurement along a step above this many times the average is a spike: it enters the average as that multiple.
const BOUND: f64 = 6.;

/// The least share of its full weight with which a measurement enters the average, however soon after the one before.
/// With less it would be lost in rounding if `every` is large.
const LEAST_SHARE: f64 = 1. / 1024.;

/// 1 less this is still below 1.
const LEAST_GAIN: f64 = f64::EPSILON / 2.;

/// How many steps a measurement after `now` steps stands for: those since the last one in the average.
fn steps_since(estimate: &Estimate, now: u64) -> u64 {
    if estimate.in_average == 0 { 1 } else { now.saturating_sub(estimate.measured_at).max(1) }
}

/// The decay of the average at a measurement that stands for this many `steps`. Steps of the same age have the same
/// weight: otherwise the first measurements, one a step, would long outweigh later ones, which are `every` steps
/// apart.
fn decay_after(averaging: Averaging, steps: u64) -> f64 {
    let Averaging { every, decay, .. } = averaging;
    let (steps, every) = (steps as f64, every as f64);
    if steps >= every || decay == 0. {
        return decay;
    }
    let share = if steps / every < LEAST_SHARE { LEAST_SHARE } else { steps / every };
    let gain = (1. - decay) * share;
    1. - if gain < LEAST_GAIN { LEAST_GAIN } else { gain }
}

/// The average of H along steps, corrected for having started at 0.
fn average_of(estimate: &Estimate) -> f64 {
    estimate.mean / (1. - estimate.power)
}

/// `sqrt(average^2 + noise * variance)`. Where the curvature of a batch is random, a constant `phi` shrinks `w^2` in the
/// mean only if `phi < 2 E[h] / E[h^2]`, so the spread of what is measured must brake as well: while it is small,
/// `E[h^2] / E[h] = average + variance / average` is this root with a `noise` of 2. Variance is taken between neighbours
/// (von Neumann, 1941), since a curvature that changes slowly is not a noisy one.
fn noisy_average_of(estimate: &Estimate, noise: f64) -> f64 {
    let (average, variance) = (average_of(estimate), estimate.variance / (1. - estimate.power));
    // Not `0 * variance`: the variance may be beyond f64.
    let spread = if noise == 0. { 0. } else { noise * variance };
    (average * average + spread).sqrt()
}

/// Records a measurement, and when it was made.
fn record(estimate: &mut Estimate, curvature: f64, now: u64) {
    estimate.last = curvature;
    estimate.lowest = if curvature < estimate.lowest { curvature } else { estimate.lowest };
    estimate.highest = if curvature > estimate.highest { curvature } else { estimate.highest };
    estimate.in_average += 1;
    estimate.infinite = false;
    estimate.still = 0;
    estimate.measured_at = now;
    estimate.counts.taken += 1;
}

/// `H` enters the average as at most [`BOUND`] times the average. Above that it is a spike: the brake uses it in full
/// up to the next measurement. So a sudden rise of curvature counts at once, one bad measurement is forgotten at the
/// next, and a lasting rise enters the average. The first measurement has no average to compare with, so the second
/// one bounds it.
fn enter_average(estimate: &mut Estimate, curvature: f64, decay: f64, noise: f64) {
    let average = if estimate.in_average > 0 { average_of(estimate) } else { 0. };
    let too_large = average > 0. && curvature > BOUND * average;
    let entering = if too_large { BOUND * average } else { curvature };
    if estimate.in_average == 1 && curvature > 0. && average > BOUND * curvature {
        estimate.entered = BOUND * curvature;
        estimate.mean = (1. - estimate.power) * estimate.entered;
    }
    let difference = if estimate.in_average > 0 { entering - estimate.entered } else { 0. };
    estimate.mean = decay * estimate.mean + (1. - decay) * entering;
    // With a decay of 0 there is no variance.
    estimate.variance =
        decay * (estimate.variance + (1. - decay) * (0.5 * difference * difference));
    estimate.power *= decay;
    estimate.entered = entering;
    estimate.curvature = if too_large { curvature } else { noisy_average_of(estimate, noise) };
}

/// Updates the estimate by a measurement along a step, made after `now` steps:
///
/// ```text
/// H = sum_s ||G_s|| ||D_s|| / sum_b ||D_b||^2 <d_b, m_b> / ||d_b||^2
/// ```
///
/// over the strips `s`, of 32 neighbours, of all blocks `b` that share it. With `D = -phi d` and `d = P^-1 m`, for
/// any `P`, the second sum is `<D, P D>`. The first is never below `<D, G>`, by the inequality of Cauchy and Schwarz
/// in each strip. So `H` is never below the curvature along the step in the metric `P`. (One inequality over all
/// elements, `(||G|| / ||D||) (||d||^2 / <d, m>)`, is far above it where elements differ much in curvature, ever more
/// so in a long training.)
///
/// A step that moved nothing leaves no estimate. Neither does a first, `small` step after which the gradient is the
/// same to the last bit: it was too small to measure any curvature.
pub(crate) fn observe_step(
    estimate: &mut Estimate,
    measured: &Measured,
    averaging: Averaging,
    small: bool,
    now: u64,
) -> Left {
    let Measured { change, step, direction, bound, metric } = *measured;
    let curvature = bound / metric;
    let finite = [change, step, direction, bound, metric].iter().all(|sum| sum.is_finite());
    if direction == 0. {
        estimate.counts.uninformative += 1;
        return Left::Unchanged;
    }
    if finite && (step == 0. || change == 0. && estimate.in_average == 0 && small) {
        let Estimate { last, lowest, highest, measured_at, counts, still, .. } = *estimate;
        *estimate = Estimate { last, lowest, highest, measured_at, counts, ..Estimate::NONE };
        estimate.still = still + small as u64;
        estimate.counts.unmoved += 1;
        return Left::Lost;
    }
    if finite && curvature.is_finite() {
        let decay = decay_after(averaging, steps_since(estimate, now));
        enter_average(estimate, curvature, decay, averaging.noise);
        estimate.reach = (step / direction).sqrt();
        record(estimate, curvature, now);
    } else {
        estimate.infinite = true;
        estimate.counts.nonfinite += 1;
    }
    Left::Known
}

/// Updates the estimate by a measurement with random vectors; `squared` is `H` squared.
pub(crate) fn observe_rows(estimate: &mut Estimate, probe: Probe, squared: f64, now: u64) -> Left {
    match probe {
        Probe::Nothing => {
            estimate.counts.uninformative += 1;
            return Left::Unchanged;
        }
        Probe::Finite if squared.is_finite() => {
            estimate.mean = squared;
            estimate.curvature = squared.sqrt();
            record(estimate, estimate.curvature, now);
        }
        _ => {
            estimate.infinite = true;
            estimate.counts.nonfinite += 1;
        }
    }
    Left::Known
}
