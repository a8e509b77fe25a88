//! The mathematics of a step: pure functions, in the order of a step, and nothing else.
//!
//! `kernels/rule.cuh` has the same for devices. The order of operations in these files is part of the contract in
//! [`numerics`](crate::numerics); what runs them, over which elements and on which threads, is in `backend`.

use crate::estimate::Estimate;
use crate::numerics::{Pair, Real, Sums, eighths, pow2};
use crate::params::{Curvature, Direction, NonFinite, ParamsSrkl, Scope};

/// What a step uses that is neither a setting of a group nor a gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepScalars {
    /// The schedule's multiplier `s`.
    pub schedule: f64,
    /// Gradients are divided by it first.
    pub grad_scale: f64,
}

/// The numbers of one block's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decision {
    /// The gradient enters as `c * g`: unscaled and clipped.
    pub c: f64,
    /// The curvature `H`, or [`UNKNOWN`]; for [`Scope::Element`] that of the block, for its finiteness.
    pub curvature: f64,
    /// The brake `s * lr / (1 + beta * H)`; where elements have their own, what they make it from
    /// instead of `s * lr`.
    pub phi: f64,
    /// Whether everything that this block uses is finite.
    pub finite: bool,
    /// Whether the step is a small one, shorter than it would be on flat ground.
    pub small: bool,
}

/// The curvature of a block that has not been measured.
pub(crate) const UNKNOWN: f64 = -1.;

impl Decision {
    /// Whether there is an estimate to go by, where curvature is measured.
    pub fn is_known(&self) -> bool {
        (0. ..f64::INFINITY).contains(&self.curvature)
    }
}

/// `own` are the block's sums, `total` those over all blocks, where `params` use them.
pub(crate) fn decide(
    params: &ParamsSrkl,
    scalars: StepScalars,
    own: &Sums,
    total: &Sums,
    estimate: &Estimate,
) -> Decision {
    let mut c = 1. / scalars.grad_scale;
    if let Some(max_grad_norm) = params.max_grad_norm {
        let norm = total.norm(c);
        // A NaN norm makes `c` a NaN.
        let clip = if norm <= max_grad_norm { 1. } else { max_grad_norm / norm };
        c *= clip;
    }
    let lr = scalars.schedule * params.lr;
    let mut finite = own.sum4.is_finite() && c > 0.;
    let (curvature, phi) = match params.curvature {
        Curvature::GradSquare => {
            let sums = if params.scope == Scope::Global { total } else { own };
            let curvature = sums.curvature(c);
            finite &= curvature.is_finite();
            (curvature, brake(lr, params.beta_value(), curvature))
        }
        _ => match estimate.curvature() {
            // Never a step into the blind; `adjust` may allow a small one.
            None => (UNKNOWN, 0.),
            Some(f64::INFINITY) => (f64::INFINITY, 0.),
            Some(curvature) => (curvature, brake(lr, params.beta_value(), curvature)),
        },
    };
    let phi = if params.has_element_brakes() && phi != 0. { lr } else { phi };
    Decision { c, curvature, phi, finite, small: false }
}

/// The products of the decays over the steps that have moved a block: `mu^t`, and so on. 1 before the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Powers {
    /// Of `mu`, or `beta1`.
    pub first: f64,
    /// Of `beta2`.
    pub second: f64,
    /// Of the average's decay.
    pub average: f64,
}

impl Powers {
    pub const NONE: Self = Self { first: 1., second: 1., average: 1. };

    /// After one more step.
    pub fn next(&self, params: &ParamsSrkl) -> Self {
        let (first, second) = match params.direction {
            Direction::Gradient => (1., 1.),
            Direction::Momentum { mu } => (mu, 1.),
            Direction::Adam { beta1, beta2, .. } => (beta1, beta2),
        };
        Self {
            first: self.first * first,
            second: self.second * second,
            average: self.average * params.average.unwrap_or(1.),
        }
    }
}

/// What the averages of a block need in a step.
#[derive(Clone, Copy)]
pub(crate) struct Corrections {
    /// `1 / (1 - mu^t)` of the first moment, and of the second.
    pub first: f64,
    pub second: f64,
    /// `(1 - c) / (1 - c^t)` of the parameter's average.
    pub average: f64,
}

impl Corrections {
    /// `powers` are those before the step.
    pub fn new(params: &ParamsSrkl, powers: &Powers) -> Self {
        let powers = powers.next(params);
        Self {
            first: correction(powers.first),
            second: correction(powers.second),
            average: params.average.map_or(0., |c| (1. - c) * correction(powers.average)),
        }
    }
}

/// `phi = lr / (1 + beta * H)`, with the schedule in `lr`.
#[inline(always)]
pub(crate) fn brake(lr: f64, beta: f64, curvature: f64) -> f64 {
    lr / (1. + beta * curvature)
}

/// What corrects an average for having started at 0; 1 for one that there is not.
pub(crate) fn correction(power: f64) -> f64 {
    if power == 1. { 1. } else { 1. / (1. - power) }
}

/// Whether `policy` lets a block with this decision be stepped.
pub(crate) fn may_step(decision: &Decision, policy: NonFinite) -> bool {
    decision.finite || policy == NonFinite::Propagate
}

/// What a decision needs of the directions: sums of `d^2` (of `(phi d)^2` where elements have their own
/// brakes) and of `w^2`.
#[derive(Clone, Copy)]
pub(crate) struct Directions {
    /// Of the block, of `n` elements.
    pub own: Pair,
    pub n: f64,
    /// Of all blocks that move by [`Curvature::Step`], and how many elements these are.
    pub total: Pair,
    pub total_n: f64,
}

/// The smallest size of parameters that steps are compared with.
pub(crate) const LEAST_RMS: f64 = 0.01;

/// The length of a step that nothing is known for, beside the size of the parameters.
pub(crate) const SMALL_STEP: f64 = 0.003;

/// How often it is doubled at most, once for each in a row that was too small.
pub(crate) const MOST_DOUBLINGS: u64 = 8;

/// Stage 2 where it needs the directions: a small step where there is no estimate but a measurement to
/// come, of which `still` in a row have moved nothing, and the trust clip.
pub(crate) fn adjust(
    decision: &mut Decision,
    params: &ParamsSrkl,
    scalars: StepScalars,
    directions: &Directions,
    still: u64,
    measures: bool,
) {
    let Directions { own, n, total, total_n } = directions;
    if params.measures_steps() && measures && !decision.is_known() {
        let rms_w = (total.b / total_n).sqrt().max(LEAST_RMS);
        let rms_d = (total.a / total_n).sqrt();
        let share = SMALL_STEP * pow2(still.min(MOST_DOUBLINGS) as i32);
        let by_direction = share * rms_w / rms_d;
        // An infinity without decay.
        let by_decay = share / params.weight_decay;
        let small = if by_decay < by_direction { by_decay } else { by_direction };
        let lr = scalars.schedule * params.lr;
        decision.small = small < lr;
        decision.phi = if decision.small { small } else { lr };
    }
    if let Some(tau) = params.trust {
        let length = own.a.sqrt();
        let length = if params.has_element_brakes() { length } else { decision.phi * length };
        let most = tau * own.b.sqrt().max(LEAST_RMS * n.sqrt());
        if length > most {
            decision.phi *= most / length;
        }
    }
}

/// The numbers of one block's update.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients<C> {
    pub moments: Moments<C>,
    /// What `d` of [`Moments`] lacks of the direction.
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
        powers: &Powers,
        estimate: &Estimate,
    ) -> Self {
        let beta = params.beta_value();
        let Decision { c, phi, .. } = *decision;
        let corrections = Corrections::new(params, powers);
        let element = match (params.scope, params.curvature) {
            (Scope::Element, Curvature::GradSquare) => Some(ElementCurvature::GradSquare { c }),
            (Scope::Element, _) => Some(ElementCurvature::rows(estimate, 0)),
            (Scope::Mixed(p), _) => Some(ElementCurvature::rows(estimate, (8. * p) as u32)),
            _ => None,
        };
        Self {
            moments: Moments::new(params, c, corrections.second),
            scale: if params.direction == Direction::Gradient { c } else { corrections.first },
            phi,
            weight_decay: params.weight_decay,
            average: C::from_f64(corrections.average),
            element: element.map(|curvature| ElementBrake { lr: phi, beta, curvature }),
        }
    }

    /// `phi * scale` and `1 - phi * weight_decay`, for the elements.
    #[inline(always)]
    pub fn of_phi(&self, phi: f64) -> (C, C) {
        (C::from_f64(phi * self.scale), C::from_f64(1. - phi * self.weight_decay))
    }
}

/// The direction of an element, and its state.
#[derive(Clone, Copy)]
pub(crate) struct Moments<C> {
    pub direction: Direction,
    pub decay1: C,
    /// `(1 - decay1) * c`
    pub gain1: C,
    pub decay2: C,
    pub gain2: C,
    pub c: C,
    pub correction2: C,
    pub eps: C,
}

impl<C: Real> Moments<C> {
    pub fn new(params: &ParamsSrkl, c: f64, correction2: f64) -> Self {
        let (decay1, decay2, eps) = match params.direction {
            Direction::Gradient => (0., 0., 0.),
            Direction::Momentum { mu } => (mu, 0., 0.),
            Direction::Adam { beta1, beta2, eps } => (beta1, beta2, eps),
        };
        Self {
            direction: params.direction,
            decay1: C::from_f64(decay1),
            gain1: C::from_f64((1. - decay1) * c),
            decay2: C::from_f64(decay2),
            gain2: C::from_f64(1. - decay2),
            c: C::from_f64(c),
            correction2: C::from_f64(correction2),
            eps: C::from_f64(eps),
        }
    }

    /// `m <- mu m + (1 - mu) c g`
    #[inline(always)]
    pub fn first(&self, m: C, g: C) -> C {
        g.mul_add(self.gain1, self.decay1.mul(m)).canonical()
    }

    /// `v <- beta2 v + (1 - beta2) (c g)^2`
    #[inline(always)]
    pub fn second(&self, v: C, g: C) -> C {
        let g = self.c.mul(g);
        self.gain2.mul(g).mul_add(g, self.decay2.mul(v)).canonical()
    }

    /// `P = sqrt(v / (1 - beta2^t)) + eps`
    #[inline(always)]
    pub fn metric(&self, v: C) -> C {
        self.correction2.mul(v).sqrt().add(self.eps)
    }
}

/// Makes the brake of an element.
#[derive(Clone, Copy)]
pub(crate) struct ElementBrake {
    pub lr: f64,
    pub beta: f64,
    pub curvature: ElementCurvature,
}

#[derive(Clone, Copy)]
pub(crate) enum ElementCurvature {
    /// `(c g)^2`
    GradSquare { c: f64 },
    /// `r^(own / 8) * shared` with `r = sqrt(correction * q)`
    Rows { correction: f64, own: u32, shared: f64 },
}

impl ElementCurvature {
    /// `r^(1 - p) * R^p` with `p = shared / 8`
    pub fn rows(estimate: &Estimate, shared: u32) -> Self {
        Self::Rows {
            correction: correction(estimate.power),
            own: 8 - shared,
            shared: eighths(estimate.own.sqrt(), shared),
        }
    }
}

impl ElementBrake {
    #[inline(always)]
    pub fn phi(&self, g: f64, q: f64) -> f64 {
        if self.lr == 0. {
            return 0.;
        }
        let curvature = match self.curvature {
            ElementCurvature::GradSquare { c } => {
                let d = c * g;
                d * d
            }
            ElementCurvature::Rows { correction, own, shared } => {
                eighths((correction * q).sqrt(), own) * shared
            }
        };
        brake(self.lr, self.beta, curvature)
    }
}

/// `w <- keep * w - phi_d * d`
#[inline(always)]
pub(crate) fn descend<C: Real>(w: C, d: C, phi_d: C, keep: C) -> C {
    d.mul_add(phi_d.neg(), keep.mul(w)).canonical()
}

/// `a <- a + by * (w - a)`
#[inline(always)]
pub(crate) fn approach<C: Real>(a: C, w: C, by: C) -> C {
    w.sub(a).mul_add(by, a).canonical()
}
