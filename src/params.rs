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
/// phi  = s * lr / (1 + beta * H)                 s: the schedule, 1 unless set
/// w   <- (1 - phi * weight_decay) * w - phi * g
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ParamsSrkl {
    /// Learning rate, the rule's alpha ("baseline velocity"): the brake `phi` on flat ground, where
    /// `H = 0`. Finite and above 0; default 1e-3.
    ///
    /// A schedule does not change it: see [`Srkl::set_learning_rate`].
    ///
    /// [`Srkl::set_learning_rate`]: candle_nn::Optimizer::set_learning_rate
    pub lr: f64,
    /// How strongly curvature brakes. Default `Beta::Fixed(0.1)`.
    pub beta: Beta,
    /// Over which elements the curvature `H` is one number. Default [`Scope::Tensor`].
    pub scope: Scope,
    /// Decoupled weight decay: a step multiplies the parameter by `1 - phi * weight_decay`, with
    /// the `phi` really used, before it subtracts `phi * g`. Finite, 0 or above; default 0.
    pub weight_decay: f64,
    /// Scales the gradients of this group by `max_grad_norm / norm` when `norm`, the 2-norm over
    /// the (unscaled) gradients of **all** parameters of the optimizer, is above it. Finite and
    /// above 0; default `None`, no clipping.
    pub max_grad_norm: Option<f64>,
    /// Whether parameters of 16 bits keep an f32 copy that the steps accumulate in. Default
    /// [`MasterWeights::Auto`].
    pub master_weights: MasterWeights,
    /// What to do about a NaN or an infinity in a gradient. Default [`NonFinite::SkipStep`].
    pub nonfinite: NonFinite,
}

/// The rule's kinetic sensitivity `beta`, in `phi = s * lr / (1 + beta * H)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Beta {
    /// `beta` itself. Finite, 0 or above; 0 is plain gradient descent.
    Fixed(f64),
    /// `beta = gamma * lr`, so that `phi = s / (1 / lr + gamma * H)`: however large `lr` is, a step
    /// is never longer than `s / (gamma * H)` times the gradient. Finite, 0 or above.
    Tied(f64),
}

/// The elements that share one curvature `H`, the 2-norm of their squared gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Scope {
    /// `H = sqrt(sum g^4)` over each parameter tensor: the original rule.
    Tensor,
    /// `H = sqrt(sum g^4)` over all parameters of the optimizer, whatever their group.
    Global,
    /// `H = g^2` of each element.
    Element,
}

/// Master weights: f32 copies of parameters of 16 bits.
///
/// A bf16 number has 8 significant bits, so a step below 1/512 of it is lost when it is rounded
/// back; an f32 master keeps it. The parameter is the master rounded to nearest even after every
/// step. Cost: 4 bytes a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum MasterWeights {
    /// f32 masters for bf16 and f16 parameters; f32 and f64 parameters are their own.
    Auto,
    /// f32 masters wherever the parameter is not f32 itself. An error for f64 parameters, which
    /// would lose bits.
    F32,
    /// No masters: the parameter is rounded to nearest after every step, and **small steps are
    /// lost**.
    None,
}

/// What a NaN or an infinity in a gradient does.
///
/// A block also counts as non-finite when its curvature is beyond f64 (elements above 1e154, in
/// f64 gradients alone), and when a sum over all blocks that it uses is non-finite (see
/// [`ParamsSrkl::max_grad_norm`], [`Scope::Global`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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

impl ParamsSrkl {
    /// The original rule: `d = g`, `H = ||g * g||_2` of each tensor, `lr = 1e-3`, `beta = 0.1`, no
    /// decay, no clipping.
    ///
    /// At these settings it stays within 1% of SGD at the same `lr` on ordinary networks, since
    /// `beta * H` is small there; the README says where it helps.
    ///
    /// For w = \[1, -2, 3\] and g = \[0.5, -1, 2\], H = 4.1306777, phi = 7.076801e-4 and
    /// w becomes \[0.9996462, -1.9992924, 2.9985847\].
    pub fn reference() -> Self {
        Self {
            lr: 1e-3,
            beta: Beta::Fixed(0.1),
            scope: Scope::Tensor,
            weight_decay: 0.,
            max_grad_norm: None,
            master_weights: MasterWeights::Auto,
            nonfinite: NonFinite::SkipStep,
        }
    }

    /// The number `beta`: as given, or `gamma * lr`.
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
        check("lr", self.lr, Above::Zero)?;
        match self.beta {
            Beta::Fixed(beta) => check("beta (Beta::Fixed)", beta, Above::OrZero)?,
            Beta::Tied(gamma) => {
                check("beta (Beta::Tied)", gamma, Above::OrZero)?;
                check("beta (Beta::Tied) times `lr`", self.beta_value(), Above::OrZero)?;
            }
        }
        check("weight_decay", self.weight_decay, Above::OrZero)?;
        match self.max_grad_norm {
            Some(norm) => check("max_grad_norm", norm, Above::Zero),
            None => Ok(()),
        }
    }
}

/// [`ParamsSrkl::reference`].
impl Default for ParamsSrkl {
    fn default() -> Self {
        Self::reference()
    }
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
    check("1 / grad_scale", 1. / grad_scale, Above::Zero)
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
    }
}
