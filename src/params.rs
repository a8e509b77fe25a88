//! What a user sets: [`ParamsSrkl`] and its choices.

use candle_core::{Result, bail};

/// The settings of a parameter group.
///
/// Plain data: change what differs from a preset.
///
/// ```
/// use candle_srkl::{NonFinite, ParamsSrkl};
///
/// let params = ParamsSrkl { lr: 0.3, nonfinite: NonFinite::SkipBlock, ..ParamsSrkl::reference() };
/// assert_eq!(params.beta_value(), 0.1);
/// ```
///
/// One step of a block (a parameter tensor `w` with gradient `g`) is
///
/// ```text
/// g   <- clip * g / grad_scale
/// d    = the direction, of g and the state       [`Direction`]
/// H    = the curvature                           [`Curvature`], [`Scope`]
/// phi  = s * lr / (1 + beta * H)                 s: the schedule, 1 unless set
/// w   <- (1 - phi * weight_decay) * w - phi * d
/// ```
///
/// Write settings as `ParamsSrkl { lr: 1., ..ParamsSrkl::braked_adam() }`: a new field, with a value in every preset, is
/// no breaking change. With feature `serde` a missing field has the value of [`ParamsSrkl::reference`], and an unknown one
/// is an error; ranges are checked when an optimizer takes them.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct ParamsSrkl {
    /// Learning rate, the rule's alpha ("baseline velocity"): the brake `phi` on flat ground, where
    /// `H = 0`. Finite, 0 or above; the reference's is 1e-3. A group of `lr` 0 is frozen: its gradients are
    /// ignored, and neither parameters nor state change.
    ///
    /// A schedule does not change it: see [`Srkl::set_schedule`] and [`Srkl::set_learning_rate`].
    ///
    /// [`Srkl::set_schedule`]: crate::Srkl::set_schedule
    /// [`Srkl::set_learning_rate`]: candle_nn::Optimizer::set_learning_rate
    pub lr: f64,
    /// What a step follows. The reference's is [`Direction::Gradient`].
    pub direction: Direction,
    /// Whether a step leaves out the elements whose direction is against their gradient: `d_i = 0` unless `d_i g_i > 0` (Liang
    /// and others, 2024). Default false. Without effect on [`Direction::Gradient`].
    ///
    /// The paper also divides `d` by the share of elements that are kept, which needs the whole tensor before its first element
    /// moves; here it is not divided. A measured curvature is that along the elements that move.
    pub cautious: bool,
    /// What `H` is. The reference's is [`Curvature::GradSquare`].
    pub curvature: Curvature,
    /// When curvature is measured, if it is. All groups that measure must have the same.
    pub measure: Measure,
    /// How strongly curvature brakes. The reference's is `Beta::Fixed(0.1)`.
    pub beta: Beta,
    /// Which elements share one curvature `H`. The reference's is [`Scope::Tensor`].
    pub scope: Scope,
    /// The trust clip `tau`: the step of a block of `n` elements is shortened to
    /// `||phi d||_2 = tau * max(||w||_2, 0.01 sqrt(n))` if it is longer (`w` is the parameter, not its master).
    /// Finite and above 0; the reference's is `None`, no clip.
    ///
    /// It needs the norm of every block's step before the first element moves, so a step reads
    /// parameters, gradient and state twice.
    pub trust: Option<f64>,
    /// Decoupled weight decay: a step multiplies the parameter by `1 - phi * weight_decay`, with
    /// the `phi` really used, before it subtracts `phi * d`. Finite, 0 or above; default 0.
    pub weight_decay: f64,
    /// Scales the gradients of this group by `max_grad_norm / norm` when `norm`, the 2-norm over
    /// the (unscaled) gradients of **all** parameters of the optimizer, is above it. Finite and
    /// above 0; default `None`, no clipping.
    pub max_grad_norm: Option<f64>,
    /// Keeps an average of the parameters, for [`Srkl::swap_averaged`]. Default `None`. Costs 4 bytes a parameter (8 for
    /// f64), and room for a copy of all parameters, on the CPU from the first swap on.
    ///
    /// [`Srkl::swap_averaged`]: crate::Srkl::swap_averaged
    pub average: Option<Average>,
    /// How that average is kept. Default [`AverageFormat::F32`].
    pub average_format: AverageFormat,
    /// How moments are kept. Default [`StateFormat::F32`].
    pub state: StateFormat,
    /// Whether parameters of 16 bits keep a copy of 32 bits that the steps accumulate in. Default
    /// [`MasterWeights::Auto`].
    pub master_weights: MasterWeights,
    /// How a bf16 parameter without a master is rounded. Default [`Rounding::Nearest`].
    pub rounding: Rounding,
    /// What to do about a NaN or an infinity in a gradient. Default [`NonFinite::SkipStep`].
    pub nonfinite: NonFinite,
    /// Whether [`Srkl::backward_step_with`] checks, before the first measurement, that its closure computes the same
    /// loss twice. Default [`Repeatable::Check`].
    ///
    /// [`Srkl::backward_step_with`]: crate::Srkl::backward_step_with
    pub repeatable: Repeatable,
}

/// The direction `d` of a step, with `g` the gradient as the rule uses it (unscaled and clipped) and
/// `t` the number of steps that moved the block, this one included.
///
/// Its state is f32 (f64 for f64 parameters) and starts at 0.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub enum Direction {
    /// `d = g`. No state.
    Gradient,
    /// PyTorch's SGD with momentum: `b <- momentum * b + g`, `d = b`, or with `nesterov` `d = momentum * b + g`. The same
    /// path as [`Momentum`](Self::Momentum), with steps `1 / (1 - momentum)` times as long and no bias correction. State:
    /// b, 4 bytes a parameter.
    ///
    /// On a quadratic of curvature `h` it is stable for `phi h < 2 (1 + momentum)`, and with `nesterov` for
    /// `phi h < 2 (1 + momentum) / (1 + 2 momentum)`, which is 1.36 for 0.9. So with `nesterov` a brake needs
    /// `Beta::Tied(1.)`; [`Momentum`](Self::Momentum) leaves more room.
    Sgd {
        /// 0 or above and below 1. (For 0 take [`Gradient`](Self::Gradient), which has no state.)
        momentum: f64,
        /// Whether the step looks ahead by the momentum (Nesterov).
        nesterov: bool,
    },
    /// `m <- mu m + (1 - mu) g`, `d = m / (1 - mu^t)`. State: m, 4 bytes a parameter.
    Momentum {
        /// 0 or above and below 1; 0.9 in the presets.
        mu: f64,
    },
    /// `m <- beta1 m + (1 - beta1) g`, `v <- beta2 v + (1 - beta2) g^2`,
    /// `d = m / (1 - beta1^t) / P` with `P = sqrt(v / (1 - beta2^t)) + eps` (Kingma and Ba, 2015).
    /// State: m and v, 8 bytes a parameter.
    ///
    /// In f32 `v` overflows where `(1 - beta2) g^2` does, with the presets from |g| = 5.8e20 on: the element then never
    /// moves again. ([`StateFormat::Compact`] keeps no infinities: there it goes on, without its first moment.)
    Adam {
        /// 0 or above and below 1; 0.9 in the presets.
        beta1: f64,
        /// 0 or above and below 1; 0.999 in the presets.
        beta2: f64,
        /// Finite and above 0, in f32 too; 1e-8 in the presets.
        eps: f64,
    },
    /// Adam that looks ahead by its momentum (Nesterov; Dozat, 2016): [`Adam`](Self::Adam) with
    /// `d = (beta1 m / (1 - beta1^(t + 1)) + (1 - beta1) g / (1 - beta1^t)) / P`. State: m and v, 8 bytes a parameter.
    ///
    /// It is optax's `nadam`. PyTorch's `NAdam` differs: the weight of its look-ahead grows from half of `beta1` to `beta1` in the
    /// course of training (`momentum_decay`).
    NesterovAdam {
        /// 0 or above and below 1; 0.9 is usual.
        beta1: f64,
        /// 0 or above and below 1; 0.999 is usual.
        beta2: f64,
        /// Finite and above 0, in f32 too; 1e-8 is usual.
        eps: f64,
    },
    /// [`Adam`](Self::Adam) with the largest second moment so far (Reddi, Kale and Kumar, 2018), as PyTorch's
    /// `AdamW(amsgrad=True)` has it: `u <- max(u, v)`, `P = sqrt(u / (1 - beta2^t)) + eps`. State: m, v and u, 12 bytes a
    /// parameter. Nothing is packed with it: [`StateFormat`], [`AverageFormat`] and [`Rounding`] have their defaults, and
    /// masters are not split.
    AmsGrad {
        /// 0 or above and below 1; 0.9 is usual.
        beta1: f64,
        /// 0 or above and below 1; 0.999 is usual.
        beta2: f64,
        /// Finite and above 0, in f32 too; 1e-8 is usual.
        eps: f64,
    },
    /// The signs of a momentum (Chen and others, 2023): `d = sign(beta1 m + (1 - beta1) g)`, then
    /// `m <- beta2 m + (1 - beta2) g`. The sign of 0 is 0. State: m, 4 bytes a parameter.
    ///
    /// Every element steps by `phi`, so a plain `lr` is 3 to 10 times smaller than AdamW's, and `weight_decay` as many times
    /// larger. With a measured curvature ([`Curvature::Step`]) no `lr` is to be chosen, as with the others; but signs keep more of the
    /// noise between batches than Adam's direction does.
    Lion {
        /// The decay of what the sign is taken of. 0 or above and below 1; 0.9 in [`ParamsSrkl::lion`].
        beta1: f64,
        /// The decay of the momentum. 0 or above and below 1; 0.99 in [`ParamsSrkl::lion`].
        beta2: f64,
    },
    /// For the matrices of hidden layers the momentum with its singular values made equal, as far as a few matrix
    /// products can (Muon; Jordan and others, 2024):
    ///
    /// ```text
    /// m <- mu m + (1 - mu) g
    /// n  = mu m + (1 - mu) g            with `nesterov`; else n = m
    /// X  = n / ||n||_F, then `steps` times  A = X X^T,  X <- 3.4445 X + (2.0315 A^2 - 4.7750 A) X
    /// d  = 0.2 sqrt(max(rows, cols)) X
    /// ```
    ///
    /// After 5 steps the singular values of X are between 0.65 and 1.25, but for those of n that are less than a few
    /// thousandths of its norm. The factor of `d` gives it the RMS of Adam's direction (Liu and others, 2025), so that
    /// both can have the same `lr`.
    ///
    /// **Which parameters.** [`hidden_matrices`](crate::hidden_matrices) says, by name and shape, which parameters of the
    /// group are matrices of hidden layers. All others (embeddings, the head, norms, biases) take
    /// `Adam { 0.9, 0.999, 1e-8 }`, with all other settings of the group.
    /// [`SrklBuilder::matrices`](crate::SrklBuilder::matrices) sets another rule, and
    /// [`BlockTelemetry::direction`](crate::BlockTelemetry::direction) tells what became of each parameter.
    ///
    /// State: m, 4 bytes a parameter (8 for f64); and while it lives the optimizer has room for X, of the dtype of the
    /// products. These allocate for a while: on the CPU as much as the largest matrix and two squares of its shorter side,
    /// on a CUDA device as much as all matrices of one shape, and the squares of each.
    /// The time goes into the products, by candle's `matmul`, with which the contract of [`numerics`](crate::numerics)
    /// has an exception.
    Muon {
        /// 0 or above and below 1; 0.95 in the presets.
        mu: f64,
        /// Whether the step looks ahead by the momentum; it does in the presets.
        nesterov: bool,
        /// How many steps of the iteration, 1 or above; 5 in the presets.
        steps: u32,
        /// Whether a CUDA device computes the products in bf16, as it does in the presets: much faster, with an error
        /// of about 1% of X. Otherwise they are in f32, as on the CPU; for f64 parameters always in f64.
        bf16: bool,
    },
}

impl Direction {
    /// The direction of those parameters of a group of [`Direction::Muon`] that this isn't for.
    pub(crate) const BESIDE_MUON: Self = Self::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    /// Whether it divides by the root of a second moment.
    pub(crate) fn has_second_moment(self) -> bool {
        matches!(self, Self::Adam { .. } | Self::NesterovAdam { .. } | Self::AmsGrad { .. })
    }
}

/// What the curvature `H` is, and how it is computed.
///
/// [`Step`](Self::Step) and [`Hutchinson`](Self::Hutchinson) measure it with a second gradient of the same batch,
/// when [`Measure`] says so; [`Srkl::backward_step_with`](crate::Srkl::backward_step_with) computes that gradient.
/// All groups of an optimizer that measure must use the same kind.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Curvature {
    /// None, so that there is no brake: `phi = s * lr`, whatever [`ParamsSrkl::beta`] is.
    None,
    /// The reference rule's: `H = sqrt(sum g^4)`. Costs nothing, and is **not** a curvature.
    GradSquare,
    /// The curvature along the step just taken, in the metric of its direction:
    ///
    /// ```text
    /// H = sum_s ||G_s|| ||D_s|| / sum_b ||D_b||^2 <d_b, m_b> / ||d_b||^2
    /// ```
    ///
    /// - `D` is the change of the parameters, as stored in their dtype;
    /// - `G` is the change of the gradient as the rule uses it, unscaled and clipped;
    /// - `d` is the direction, and `m` the gradient or momentum that it was made of;
    /// - `b` runs over the parameter tensors that share an `H` ([`Scope`]) and have both gradients, and `s` over
    ///   their strips of 32 neighbouring elements.
    ///
    /// With `d = P^-1 m` the second sum is `<D, P D>`, so `H` is never below the curvature along the step in the
    /// metric `P`.
    ///
    /// The brake uses `sqrt(average^2 + noise * variance)`, made of two bias-corrected exponential averages: that of
    /// `x = min(H, 6 * average)`, and that of half the squared differences of neighbouring `x` (times the decay, so
    /// that with a `decay` of 0 only the last `x` counts).
    ///
    /// - The averages forget by steps: a measurement `k` steps after the one before, `k` below `every`, enters with
    ///   weight `(1 - decay) * max(k / every, 1/1024)` in place of `1 - decay`.
    /// - While the last measurement is above 6 times the average, the brake uses that measurement alone.
    ///
    /// Without an estimate, a step that measures is a small one:
    /// `phi = min(s * lr, 0.003 * max(RMS(w), 0.01) / RMS(d), 0.003 / weight_decay)`, with RMS over all parameters
    /// that move. Until 10 measurements are in the average, a step is at most 10 times as long as the last measured one:
    /// `phi <= 10 ||D|| / ||d||`.
    ///
    /// - If a step that measures has a direction but moves nothing (parameters of 16 bits may be too coarse for it),
    ///   there is no estimate afterwards. The next step then measures, and is a small one. Each small step in a row
    ///   that moves nothing doubles the length of the next, up to 256 times.
    /// - A second gradient that is not finite counts as infinite curvature: `phi` is 0 up to the next step that
    ///   measures, which is again a small one.
    /// - A step whose schedule is 0 does not measure.
    ///
    /// With momentum of 0.9 and `Beta::Tied(0.5)`, no run on quadratics of many sizes and condition numbers ended
    /// higher than it began. Without momentum choose `Beta::Tied(1.)`: see docs/curvature.md.
    ///
    /// Costs a second gradient on a step that measures.
    Step(StepCurvature),
    /// The norms of the Hessian's rows, from products with random vectors `z` of +-1 (Hutchinson):
    /// `q <- EMA((H z)_i^2)`, bias-corrected, whose expectation is the squared norm of row `i`. [`Scope`] says how
    /// the curvature is made of it. `H z`, with the Hessian `H`, is the difference `(g(w + e z) - g(w)) / e` with
    /// `e = delta * max(RMS(w), 0.01)`, RMS over all parameters that have a gradient; the others are not perturbed.
    ///
    /// If the first gradient is not finite, the measurement is ignored. If the second is not, it counts as infinite
    /// curvature: `phi` is 0 up to the next step that measures.
    ///
    /// Costs a second gradient on a step that measures, and room for a copy of the parameters. State: q,
    /// 4 bytes a parameter.
    Hutchinson(HutchinsonCurvature),
}

/// Settings of [`Curvature::Step`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct StepCurvature {
    /// The decay of both averages. 0 or above and below 1; default 0.99.
    pub decay: f64,
    /// The weight of the variance between measurements in the brake. Finite, 0 or above; default 2, which a brake
    /// needs if it has to shrink the noise of batches by itself (see docs/curvature.md). With less, averaged weights
    /// or a schedule must do a part of that.
    pub noise: f64,
}

impl Default for StepCurvature {
    fn default() -> Self {
        Self { decay: 0.99, noise: 2. }
    }
}

/// Settings of [`Curvature::Hutchinson`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct HutchinsonCurvature {
    /// The decay of the average of squared row norms. 0 or above and below 1; default 0.95.
    pub decay: f64,
}

impl Default for HutchinsonCurvature {
    fn default() -> Self {
        Self { decay: 0.95 }
    }
}

/// When curvature is measured, and with which perturbations. It belongs to the whole optimizer: all groups that
/// measure must have the same, and [`Srkl::set_measure`](crate::Srkl::set_measure) changes it for all of them.
///
/// Each step measures until `first` steps have done so; after that each step whose number is a multiple of `every`.
/// Steps are numbered from 0, skipped ones included. If a step finds a parameter without an estimate, the next one
/// measures too.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Measure {
    /// The number of steps from one measurement to the next. 1 or above; default 20.
    pub every: u64,
    /// The number of steps at the beginning that all measure. 1 or above; default 10.
    pub first: u64,
    /// [`Curvature::Hutchinson`]: the size of the perturbation relative to the RMS of the parameters. Finite and
    /// above 0; default 3e-3, for smooth networks. Use 1e-2 with ReLU, and 1e-2 or more for networks that compute in
    /// bf16.
    pub delta: f64,
    /// [`Curvature::Hutchinson`]: the seed of the random vectors. Default 0.
    pub seed: u64,
}

impl Default for Measure {
    fn default() -> Self {
        Self { every: 20, first: 10, delta: 3e-3, seed: 0 }
    }
}

/// How the parameters are averaged, after step `t` of a parameter, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Average {
    /// `a <- a + (1 - c) / (1 - c^t) * (w - a)`: an exponential average of decay `c`, 0 or above and below 1, corrected
    /// for its start. It is about the last `1 / (1 - c)` steps.
    Exponential(f64),
    /// `a <- a + (1 + k) / (t + k) * (w - a)` (Shamir and Zhang, 2013): about the last `1 / (1 + k)` of a training,
    /// however long that is, so there is no length to choose. Finite, 0 or above; 8 is a good choice, and 0 the mean of
    /// all steps.
    Polynomial(f64),
}

/// The rule's kinetic sensitivity `beta`, in `phi = s * lr / (1 + beta * H)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Beta {
    /// `beta` itself. Finite, 0 or above; 0 is no brake: with [`Direction::Gradient`] plain gradient descent.
    Fixed(f64),
    /// `beta = gamma * lr`, so that `phi = s / (1 / lr + gamma * H)`: however large `lr` is, a step is never longer
    /// than `s / (gamma * H)` times the direction. Finite, 0 or above.
    Tied(f64),
}

/// The elements that share one curvature `H`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Scope {
    /// Each parameter tensor `b`: `sqrt(sum g^4)` over it (the original rule), the curvature along its own
    /// step, or `R_b = sqrt(sum_b q_i)`, the Frobenius norm of its rows.
    Tensor,
    /// All parameters of the optimizer, in all groups; for measured curvature, those whose group measures it.
    Global,
    /// Each element: `g^2`, or `r_i = sqrt(q_i)`, the norm of its row. Not for [`Curvature::Step`].
    Element,
    /// `r_i^(1 - p) * R_b^p` with `p` from 0 to 1, a multiple of 1/8. For [`Curvature::Hutchinson`]
    /// alone.
    Mixed(f64),
}

/// How the moments `m` and `v` of [`Direction`] are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum StateFormat {
    /// In f32 (f64 for f64 parameters): 4 bytes each.
    #[default]
    F32,
    /// In 8 bits each, and 2 bytes for 256 elements: both moments of Adam in 2.008 bytes a parameter.
    ///
    /// `v` is a float of 3 bits behind the point, over 31 binades below the largest of its 256 neighbours, and is rounded
    /// up or down at random so that its mean is right: rounded to nearest it could not follow its average. `m` is an
    /// integer of 8 bits in units of about `sqrt(v)`, so that what rounding adds to an Adam step `m / sqrt(v)` is the same
    /// for small and large gradients. Momentum and Muon, which have no `v`, keep `m` in units of 1/127 to 1/63 of the
    /// largest of the 256.
    ///
    /// A gradient that is 2^15 times smaller than its neighbours' for long gets shorter steps than it would in f32.
    ///
    /// Parameters below 4096 elements, parameters of f64, and the `q` of [`Curvature::Hutchinson`] stay as they are.
    Compact,
}

/// How the average of [`ParamsSrkl::average`] is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum AverageFormat {
    /// In f32 (f64 for f64 parameters): 4 bytes a parameter.
    #[default]
    F32,
    /// In bf16, rounded up or down at random so that its mean is right: 2 bytes a parameter. f64 parameters keep f64.
    BF16,
}

/// How a bf16 parameter without a master ([`MasterWeights::None`]) is rounded after a step. Parameters of other dtypes, and
/// those with masters, are always rounded to nearest even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Rounding {
    /// To nearest even: **small steps are lost**.
    #[default]
    Nearest,
    /// Up or down at random, by a generator that counts steps and elements: a small step takes its effect in the mean.
    Stochastic,
}

/// Master weights: copies of 32 bits of parameters of 16 bits.
///
/// A bf16 number has 8 significant bits, so a step below 1/512 of it is lost when it is rounded
/// back; an f32 master keeps it. The parameter is the master rounded to nearest even after every
/// step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum MasterWeights {
    /// f32 masters for bf16 and f16 parameters, 4 bytes each; f32 and f64 parameters need none.
    Auto,
    /// f32 masters wherever the parameter is not f32 itself. An error for f64 parameters, which
    /// would lose bits.
    F32,
    /// A bf16 parameter keeps the 16 bits that it lacks to its master: 2 bytes. The parameter is still the master rounded
    /// to nearest even; a master half-way between two bf16 numbers may be stored as its f32 neighbour. f16 parameters have
    /// f32 masters, as with [`Auto`](Self::Auto).
    Split,
    /// No masters: the parameter is rounded after every step, as [`ParamsSrkl::rounding`] says.
    None,
}

/// What a NaN or an infinity in a gradient does.
///
/// A block also counts as non-finite when its curvature is beyond f64 (elements above 1e154, in
/// f64 gradients alone), and when a sum over all blocks that it uses is non-finite (see
/// [`ParamsSrkl::max_grad_norm`], [`Scope::Global`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum NonFinite {
    /// The whole step is skipped: no parameter of any group changes, and
    /// [`Srkl::skipped_steps`](crate::Srkl::skipped_steps) counts it.
    ///
    /// This needs every gradient read before the first parameter is written, so a gradient larger
    /// than the caches is read from memory twice.
    SkipStep,
    /// Only this block is skipped, its gradient left out of sums over all blocks, and its counter
    /// in [`BlockTelemetry`](crate::BlockTelemetry) goes up.
    SkipBlock,
    /// The NaN or infinity takes its course through the formula.
    Propagate,
}

/// Whether a closure is checked before curvature is measured by calling it twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Repeatable {
    /// Before the first measurement the closure is called once more, and the two losses are compared bit for bit. It
    /// costs one forward pass in a training.
    #[default]
    Check,
    /// Not checked. For losses whose last bits differ from call to call at the same parameters, because a kernel adds
    /// in another order each time.
    Assume,
}

impl ParamsSrkl {
    /// The original rule: `d = g`, `H = ||g * g||_2` of each tensor, `lr = 1e-3`, `beta = 0.1`, no
    /// decay, no clipping.
    ///
    /// At these settings it stays within 1% of SGD at the same `lr` on ordinary networks, since
    /// `beta * H` is small there; docs/reference-rule.md says where it helps.
    ///
    /// For w = \[1, -2, 3\] and g = \[0.5, -1, 2\], H = 4.1306777, phi = 7.076801e-4 and
    /// w becomes \[0.9996462, -1.9992924, 2.9985847\].
    #[must_use]
    pub fn reference() -> Self {
        Self {
            lr: 1e-3,
            direction: Direction::Gradient,
            cautious: false,
            curvature: Curvature::GradSquare,
            measure: Measure::default(),
            beta: Beta::Fixed(0.1),
            scope: Scope::Tensor,
            trust: None,
            weight_decay: 0.,
            max_grad_norm: None,
            average: None,
            average_format: AverageFormat::F32,
            state: StateFormat::F32,
            master_weights: MasterWeights::Auto,
            rounding: Rounding::Nearest,
            nonfinite: NonFinite::SkipStep,
            repeatable: Repeatable::Check,
        }
    }

    /// The preset to start with: Adam braked by the curvature along its steps. `lr = 10`, `Adam { 0.9, 0.999, 1e-8 }`,
    /// [`Curvature::Step`] on each of the first 10 steps and every 20th, decay 0.99, noise 2, over all parameters,
    /// `beta = 0.8 lr`.
    ///
    /// An `lr` of 10 does not make long steps: with `beta` tied to it `phi = s / (0.1 + 0.8 H)`, and the curvature of
    /// a network is far above 0.2. Results hardly change from 0.3 to 1000.
    #[must_use]
    pub fn braked_adam() -> Self {
        Self {
            lr: 10.,
            direction: Direction::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            curvature: Curvature::Step(StepCurvature::default()),
            beta: Beta::Tied(0.8),
            scope: Scope::Global,
            ..Self::reference()
        }
    }

    /// [`braked_adam`](Self::braked_adam) for evaluation on averaged weights
    /// ([`Srkl::swap_averaged`](crate::Srkl::swap_averaged)), with `average` 0.98. Averages remove the noise of steps
    /// that are a little too long, so `beta = lr / 2`, and curvature is measured on the first 10 and every 50th step,
    /// decay 0.95, noise 1.
    #[must_use]
    pub fn braked_adam_averaged() -> Self {
        Self {
            curvature: Curvature::Step(StepCurvature { decay: 0.95, noise: 1. }),
            measure: Measure { every: 50, ..Measure::default() },
            beta: Beta::Tied(0.5),
            average: Some(Average::Exponential(0.98)),
            ..Self::braked_adam()
        }
    }

    /// Muon for the matrices of hidden layers and Adam for all other parameters, braked by the curvature along the steps
    /// of both together: [`braked_adam`](Self::braked_adam) with `Muon { 0.95, nesterov, 5 steps }`, `beta = lr / 2`
    /// and trust clip 0.1.
    #[must_use]
    pub fn braked_muon() -> Self {
        let trust = Some(0.1);
        Self { direction: Self::MUON, beta: Beta::Tied(0.5), trust, ..Self::braked_adam() }
    }

    /// [`braked_muon`](Self::braked_muon) for evaluation on averaged weights
    /// ([`Srkl::swap_averaged`](crate::Srkl::swap_averaged)): the one to recommend for transformers. `beta = 0.4 lr`,
    /// trust clip 0.1, `Average::Polynomial(8)`, and curvature as in [`braked_adam_averaged`](Self::braked_adam_averaged).
    #[must_use]
    pub fn braked_muon_averaged() -> Self {
        Self {
            direction: Self::MUON,
            beta: Beta::Tied(0.4),
            trust: Some(0.1),
            average: Some(Average::Polynomial(8.)),
            ..Self::braked_adam_averaged()
        }
    }

    /// Momentum braked by the curvature along its steps. `Momentum { 0.9 }`, `beta = lr / 2`, trust clip 0.1; `lr`
    /// and [`Curvature::Step`] as [`braked_adam`](Self::braked_adam).
    #[must_use]
    pub fn kinetic() -> Self {
        Self {
            direction: Direction::Momentum { mu: 0.9 },
            beta: Beta::Tied(0.5),
            trust: Some(0.1),
            ..Self::braked_adam()
        }
    }

    /// Momentum braked by the row norms of the Hessian. `lr = 1`, `Momentum { 0.9 }`,
    /// [`Curvature::Hutchinson`] on each of the first 10 steps and every 10th, decay 0.95, delta 3e-3,
    /// [`Scope::Mixed`] of 1/2, `beta = lr`, trust clip 0.1.
    #[must_use]
    pub fn hessian() -> Self {
        Self {
            lr: 1.,
            curvature: Curvature::Hutchinson(HutchinsonCurvature::default()),
            measure: Measure { every: 10, ..Measure::default() },
            beta: Beta::Tied(1.),
            scope: Scope::Mixed(0.5),
            ..Self::kinetic()
        }
    }

    /// Plain gradient descent, `w <- w - lr * g`, as candle's `SGD`: no brake, no state. For momentum, as PyTorch has it:
    ///
    /// ```
    /// use candle_srkl::{Direction, ParamsSrkl};
    ///
    /// let direction = Direction::Sgd { momentum: 0.9, nesterov: true };
    /// let params = ParamsSrkl { direction, ..ParamsSrkl::sgd(0.1) };
    /// # params.validate()?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// (Weight decay is decoupled here, and added to the gradient in PyTorch's SGD.)
    #[must_use]
    pub fn sgd(lr: f64) -> Self {
        Self { lr, curvature: Curvature::None, ..Self::reference() }
    }

    /// AdamW (Loshchilov and Hutter, 2019) with the defaults of candle's and PyTorch's but for `lr`:
    /// `Adam { 0.9, 0.999, 1e-8 }`, weight decay 0.01, no brake.
    #[must_use]
    pub fn adamw(lr: f64) -> Self {
        Self {
            lr,
            direction: Direction::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            curvature: Curvature::None,
            weight_decay: 0.01,
            ..Self::reference()
        }
    }

    /// Lion (Chen and others, 2023): [`Direction::Lion`] of 0.9 and 0.99, weight decay 0.1, no brake.
    #[must_use]
    pub fn lion(lr: f64) -> Self {
        let direction = Direction::Lion { beta1: 0.9, beta2: 0.99 };
        Self { direction, weight_decay: 0.1, ..Self::adamw(lr) }
    }

    /// [`Direction::Muon`] for the matrices of hidden layers, and Adam for all other parameters, with one `lr` for both
    /// and no brake: `Muon { 0.95, nesterov, 5 steps }`, weight decay 0.1 as PyTorch's `Muon` has it. (Its
    /// `adjust_lr_fn="match_rms_adamw"` is the factor of this one.)
    #[must_use]
    pub fn muon(lr: f64) -> Self {
        Self { direction: Self::MUON, weight_decay: 0.1, ..Self::adamw(lr) }
    }

    const MUON: Direction = Direction::Muon { mu: 0.95, nesterov: true, steps: 5, bf16: true };

    /// The number `beta`: as given, or `gamma * lr`.
    #[must_use]
    pub fn beta_value(&self) -> f64 {
        match self.beta {
            Beta::Fixed(beta) => beta,
            Beta::Tied(gamma) => gamma * self.lr,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range, by name, with what was expected and what came.
    pub fn validate(&self) -> Result<()> {
        check("lr", self.lr, Above::OrZero)?;
        match self.beta {
            Beta::Fixed(beta) => check("beta (Beta::Fixed)", beta, Above::OrZero)?,
            Beta::Tied(gamma) => {
                check("beta (Beta::Tied)", gamma, Above::OrZero)?;
                check("beta (Beta::Tied) times `lr`", self.beta_value(), Above::OrZero)?;
            }
        }
        match self.direction {
            Direction::Gradient => {}
            Direction::Sgd { momentum, .. } => check_decay("momentum", momentum)?,
            Direction::Momentum { mu } => check_decay("mu", mu)?,
            Direction::Lion { beta1, beta2 } => {
                check_decay("beta1", beta1)?;
                check_decay("beta2", beta2)?;
            }
            Direction::Adam { beta1, beta2, eps }
            | Direction::NesterovAdam { beta1, beta2, eps }
            | Direction::AmsGrad { beta1, beta2, eps } => {
                check_decay("beta1", beta1)?;
                check_decay("beta2", beta2)?;
                // The denominator is `eps` alone while `v` is 0, in f32.
                check("eps (in f32)", f64::from(eps as f32), Above::Zero)?;
            }
            Direction::Muon { mu, steps, .. } => {
                check_decay("mu", mu)?;
                if steps == 0 {
                    bail!("`steps` (Direction::Muon): expected 1 or above, got 0")
                }
                if self.has_element_brakes() {
                    bail!(
                        "`scope`: `Direction::Muon` has `Scope::Tensor` or `Global`, got {:?}",
                        self.scope
                    )
                }
            }
        }
        if matches!(self.direction, Direction::AmsGrad { .. }) {
            let packs = [
                ("state", self.state == StateFormat::Compact),
                ("master_weights", self.master_weights == MasterWeights::Split),
                ("rounding", self.rounding == Rounding::Stochastic),
                ("average_format", self.average_format == AverageFormat::BF16),
            ];
            if let Some((field, _)) = packs.iter().find(|(_, packs)| *packs) {
                bail!("`{field}`: `Direction::AmsGrad` packs nothing: expected the default")
            }
        }
        self.measure.validate()?;
        match self.curvature {
            Curvature::None | Curvature::GradSquare => {}
            Curvature::Step(StepCurvature { decay, noise }) => {
                check_decay("decay", decay)?;
                check("noise", noise, Above::OrZero)?;
            }
            Curvature::Hutchinson(HutchinsonCurvature { decay }) => check_decay("decay", decay)?,
        }
        match (self.scope, self.curvature) {
            (Scope::Element, Curvature::Step(_)) => {
                bail!("`scope`: `Curvature::Step` has `Scope::Tensor` or `Global`, got `Element`")
            }
            (Scope::Element, Curvature::None) => {
                bail!("`scope`: `Curvature::None` has `Scope::Tensor` or `Global`, got `Element`")
            }
            (Scope::Mixed(p), Curvature::Hutchinson(_))
                if !(0. ..=1.).contains(&p) || (8. * p).fract() != 0. =>
            {
                bail!("`scope` (Scope::Mixed): expected a multiple of 1/8 from 0 to 1, got {p}")
            }
            (Scope::Mixed(_), Curvature::Hutchinson(_)) => {}
            (Scope::Mixed(_), curvature) => {
                bail!("`scope`: `Scope::Mixed` is for `Curvature::Hutchinson`, got {curvature:?}")
            }
            _ => {}
        }
        check("weight_decay", self.weight_decay, Above::OrZero)?;
        self.trust.map_or(Ok(()), |tau| check("trust", tau, Above::Zero))?;
        match self.average {
            Some(Average::Exponential(c)) => check_decay("average", c)?,
            Some(Average::Polynomial(k)) => {
                check("average (Average::Polynomial)", k, Above::OrZero)?
            }
            None => {}
        }
        self.max_grad_norm.map_or(Ok(()), |norm| check("max_grad_norm", norm, Above::Zero))
    }
}

impl Measure {
    pub(crate) fn validate(&self) -> Result<()> {
        for (field, value) in [("every", self.every), ("first", self.first)] {
            if value == 0 {
                bail!("`{field}`: expected 1 or above, got 0")
            }
        }
        check("delta", self.delta, Above::Zero)
    }
}

/// What a step needs, by its settings.
impl ParamsSrkl {
    /// Whether matrices are orthogonalised.
    pub(crate) fn is_muon(&self) -> bool {
        matches!(self.direction, Direction::Muon { .. })
    }

    /// Whether curvature is measured along the step.
    pub(crate) fn measures_steps(&self) -> bool {
        matches!(self.curvature, Curvature::Step(_))
    }

    /// Whether every element has its own brake.
    pub(crate) fn has_element_brakes(&self) -> bool {
        matches!(self.scope, Scope::Element | Scope::Mixed(_))
    }

    /// Whether parameters are backed up while they are perturbed or replaced.
    #[cfg(feature = "cuda")]
    pub(crate) fn keeps_parameters(&self) -> bool {
        self.average.is_some() || matches!(self.curvature, Curvature::Hutchinson(_))
    }

    /// Whether a step needs sums over its gradients.
    pub(crate) fn uses_sums(&self) -> bool {
        self.nonfinite != NonFinite::Propagate || self.uses_norm() || self.uses_sum4()
    }

    /// Whether the curvature is made of sums over the gradient.
    pub(crate) fn uses_sum4(&self) -> bool {
        self.curvature == Curvature::GradSquare
    }

    /// Whether a step needs the norm over all gradients.
    pub(crate) fn uses_norm(&self) -> bool {
        self.max_grad_norm.is_some()
    }

    /// Whether a step needs sums over all blocks.
    pub(crate) fn uses_total(&self) -> bool {
        self.uses_norm() || self.uses_sum4() && self.scope == Scope::Global
    }

    /// Whether no parameter may move before the statistics of all gradients are known.
    pub(crate) fn waits_for_all(&self) -> bool {
        self.nonfinite == NonFinite::SkipStep || self.uses_total()
    }
}

/// A parameter group, or a part of one: in a group of [`Direction::Muon`] the matrices are one part, and what takes Adam
/// beside them another, of the same name.
///
/// Each part has a twin behind all of them, of `lr` 0: that of the parameters that are [frozen](crate::Srkl::freeze).
#[derive(Clone)]
pub(crate) struct Group {
    pub name: String,
    pub params: ParamsSrkl,
    pub beside_muon: bool,
    pub frozen: bool,
}

impl Group {
    pub fn new(name: String, params: ParamsSrkl) -> Self {
        Self { name, params, beside_muon: false, frozen: false }
    }

    /// The part beside this one, of parameters that Muon isn't for.
    pub fn beside(&self) -> Self {
        let params = self.params.clone();
        let mut part = Self { name: self.name.clone(), params, beside_muon: true, frozen: false };
        part.set(self.params.clone());
        part
    }

    /// The part of this one's parameters that are frozen.
    pub fn twin(&self) -> Self {
        let mut part = Self { frozen: true, ..self.clone() };
        part.set(self.params.clone());
        part
    }

    /// Replaces the settings by those of the whole group.
    pub fn set(&mut self, params: ParamsSrkl) {
        self.params = params;
        if self.beside_muon {
            self.params.direction = Direction::BESIDE_MUON;
        }
        if self.frozen {
            self.params.lr = 0.;
        }
    }
}

/// [`ParamsSrkl::reference`].
impl Default for ParamsSrkl {
    fn default() -> Self {
        Self::reference()
    }
}

fn check_decay(field: &str, value: f64) -> Result<()> {
    if !(0. ..1.).contains(&value) {
        bail!("`{field}`: expected a number from 0 to below 1, got {value}")
    }
    Ok(())
}

/// The lower end of a setting's range.
pub(crate) enum Above {
    Zero,
    OrZero,
}

/// An error that names the field unless `value` is finite and in range.
pub(crate) fn check(field: &str, value: f64, above: Above) -> Result<()> {
    let (fits, range) = match above {
        Above::Zero => (value > 0., "above 0"),
        Above::OrZero => (value >= 0., "0 or above"),
    };
    if !fits || !value.is_finite() {
        bail!("`{field}`: expected a finite number {range}, got {value}")
    }
    Ok(())
}

pub(crate) fn check_grad_scale(grad_scale: f64) -> Result<()> {
    check("grad_scale", grad_scale, Above::Zero)?;
    // Moments of f32 take it in f32.
    check("1 / grad_scale", f64::from((1. / grad_scale) as f32), Above::Zero)
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_json() {
        let params = ParamsSrkl {
            beta: Beta::Tied(0.5),
            scope: Scope::Global,
            max_grad_norm: Some(1.),
            master_weights: MasterWeights::F32,
            nonfinite: NonFinite::SkipBlock,
            ..ParamsSrkl::reference()
        };
        let json = serde_json::to_string(&params).unwrap();
        assert!(json.contains(r#""beta":{"Tied":0.5}"#), "{json}");
        assert_eq!(serde_json::from_str::<ParamsSrkl>(&json).unwrap(), params);
        for preset in [
            ParamsSrkl::braked_adam_averaged(),
            ParamsSrkl::braked_muon_averaged(),
            ParamsSrkl::hessian(),
            ParamsSrkl::muon(0.1),
            ParamsSrkl::sgd(0.1),
        ] {
            let json = serde_json::to_string(&preset).unwrap();
            assert_eq!(serde_json::from_str::<ParamsSrkl>(&json).unwrap(), preset);
        }
    }

    /// Fields that come later have a value in older files, and a misspelled one is no default in disguise.
    #[test]
    fn missing_fields_are_the_references_and_unknown_ones_errors() {
        let read = serde_json::from_str::<ParamsSrkl>;
        let json = r#"{"lr": 3.0, "curvature": {"Step": {"decay": 0.5}}, "measure": {"every": 7}}"#;
        let expected = ParamsSrkl {
            lr: 3.,
            curvature: Curvature::Step(StepCurvature { decay: 0.5, ..Default::default() }),
            measure: Measure { every: 7, ..Measure::default() },
            ..ParamsSrkl::reference()
        };
        assert_eq!(read(json).unwrap(), expected);
        let momentum = r#"{"direction": {"Momentum": {"mu": 0.5, "beta": 0.1}}}"#;
        for json in [r#"{"learning_rate": 3.0}"#, r#"{"measure": {"evry": 7}}"#, momentum] {
            assert!(read(json).unwrap_err().to_string().contains("unknown field"), "{json}");
        }
    }
}
