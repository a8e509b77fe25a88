//! Dynamic loss scaling: [`GradScaler`].

use candle_core::{Result, bail};

use crate::engine::Counters;
use crate::params::{Above, NonFinite, ParamsSrkl, check, check_grad_scale};

/// How the factor of the loss, [`Srkl::grad_scale`](crate::Srkl::grad_scale), follows the gradients: for models that compute in f16, whose gradients
/// would underflow. [`Srkl::set_grad_scaler`](crate::Srkl::set_grad_scaler) sets it. The rule and the defaults are those of PyTorch's
/// `torch.amp.GradScaler`:
///
/// ```text
/// after a step that was skipped for a NaN or an infinity:  scale <- max(backoff_factor * scale, min_scale)
/// after growth_interval steps in a row that were not:      scale <- growth_factor * scale, unless infinite
/// ```
///
/// Scales are f32, as PyTorch's. From 65,536 with the defaults: one skipped step gives 32,768, and 2000 steps later it is 65,536
/// again.
///
/// Write settings as `GradScaler { growth_interval: 500, ..GradScaler::default() }`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct GradScaler {
    /// The first scale. Finite and above 0, in f32; default 65,536.
    pub init_scale: f64,
    /// Finite and above 1; default 2. A power of two changes no bits ([`Srkl::set_grad_scale`](crate::Srkl::set_grad_scale)).
    pub growth_factor: f64,
    /// Above 0 and below 1; default 0.5.
    pub backoff_factor: f64,
    /// After how many steps in a row that were not skipped the scale grows. 1 or above; default 2000.
    pub growth_interval: u64,
    /// The scale does not fall below. Finite and above 0, up to `init_scale`, in f32; default 2^-126, the smallest normal f32
    /// (PyTorch has no limit, and falls to 0). Gradients that are NaN whatever the scale is bring it down there.
    pub min_scale: f64,
    /// The scale follows once in so many steps. 1 or above; default 1, which on a CUDA device waits for each step, as
    /// PyTorch's does. With 100 one step in 100 is waited for: the scale falls once however many of these were skipped, and
    /// may grow up to 99 steps late.
    pub check_every: u64,
}

impl Default for GradScaler {
    fn default() -> Self {
        Self {
            init_scale: 65_536.,
            growth_factor: 2.,
            backoff_factor: 0.5,
            growth_interval: 2000,
            min_scale: f32::MIN_POSITIVE.into(),
            check_every: 1,
        }
    }
}

impl GradScaler {
    /// # Errors
    ///
    /// A setting out of range, by its name.
    pub(crate) fn validate(&self) -> Result<()> {
        let in_f32 = |x: f64| f64::from(x as f32);
        check("init_scale", in_f32(self.init_scale), Above::Zero)?;
        check_grad_scale(in_f32(self.init_scale))?;
        check("min_scale", in_f32(self.min_scale), Above::Zero)?;
        check_grad_scale(in_f32(self.min_scale))?;
        if self.min_scale > self.init_scale {
            bail!(
                "`min_scale`: expected at most `init_scale`, {}, got {}",
                self.init_scale,
                self.min_scale
            )
        }
        check("growth_factor", self.growth_factor, Above::Zero)?;
        if self.growth_factor <= 1. {
            bail!("`growth_factor`: expected a number above 1, got {}", self.growth_factor)
        }
        check("backoff_factor", self.backoff_factor, Above::Zero)?;
        if self.backoff_factor >= 1. {
            bail!("`backoff_factor`: expected a number below 1, got {}", self.backoff_factor)
        }
        for (field, value) in
            [("growth_interval", self.growth_interval), ("check_every", self.check_every)]
        {
            if value == 0 {
                bail!("`{field}`: expected 1 or above, got 0")
            }
        }
        Ok(())
    }
}

/// A scaler, and where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaling {
    pub scaler: GradScaler,
    pub state: ScalerState,
    /// How many steps had been skipped before the one whose measurement is under way.
    pub skipped_before: u64,
}

/// What a checkpoint saves of a scaler, besides the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ScalerState {
    /// Steps in a row that were not skipped.
    good: u64,
    /// Calls since the counters were looked at.
    pub unseen: u64,
    /// What the counters were then.
    steps: u64,
    skipped: u64,
    /// Whether a second gradient has been infinite since then.
    pub overflowed: bool,
    /// Whether the next measurement repeats one that was given up for that.
    pub repeats: bool,
}

impl ScalerState {
    /// Of counters that are `steps` and `skipped`.
    pub fn after(steps: u64, skipped: u64) -> Self {
        Self { steps, skipped, ..Self::default() }
    }

    /// As a checkpoint has it.
    pub fn numbers(&self) -> [u64; 6] {
        let Self { good, unseen, steps, skipped, overflowed, repeats } = *self;
        [good, unseen, steps, skipped, overflowed.into(), repeats.into()]
    }

    pub fn from_numbers([good, unseen, steps, skipped, overflowed, repeats]: [u64; 6]) -> Self {
        Self { good, unseen, steps, skipped, overflowed: overflowed != 0, repeats: repeats != 0 }
    }
}

impl Scaling {
    /// The scale after the steps that `counters` have seen.
    pub fn follow(&mut self, scale: f64, counters: Counters) -> f64 {
        let Self { scaler, state, .. } = self;
        let Counters { steps, skipped_steps, .. } = counters;
        let taken = steps.saturating_sub(state.steps);
        let failed = state.overflowed || skipped_steps > state.skipped;
        let good = if failed { 0 } else { state.good + taken };
        let grows = good >= scaler.growth_interval;
        let repeats = state.repeats;
        *state = ScalerState {
            good: if grows { 0 } else { good },
            repeats,
            ..ScalerState::after(steps, skipped_steps)
        };
        // As PyTorch: multiplied in f64, and rounded to f32.
        let times = |factor: f64| f64::from((scale * factor) as f32);
        if failed {
            times(scaler.backoff_factor).max(f64::from(scaler.min_scale as f32))
        } else if grows && times(scaler.growth_factor).is_finite() {
            times(scaler.growth_factor)
        } else {
            scale
        }
    }
}

/// An error for settings under which a scaler would not see what overflows.
pub(crate) fn refuse_unskipped(params: &ParamsSrkl) -> Result<()> {
    if params.nonfinite != NonFinite::SkipStep {
        bail!(
            "`nonfinite`: a `GradScaler` needs `NonFinite::SkipStep`, by whose skipped steps it goes, got {:?}",
            params.nonfinite
        )
    }
    Ok(())
}
