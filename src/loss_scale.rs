//! Dynamic loss scaling: [`GradScaler`].

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, bail};

use crate::engine::Counters;
use crate::optimizer::Srkl;
use crate::params::{Above, NonFinite, ParamsSrkl, check, check_grad_scale};

/// How the factor of the loss, [`Srkl::grad_scale`], follows the gradients: for models that compute in f16, whose gradients
/// would underflow. [`Srkl::set_grad_scaler`] sets it. The rule and the defaults are those of PyTorch's
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
    /// Finite and above 1; default 2. A power of two changes no bits ([`Srkl::set_grad_scale`]).
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
    fn validate(&self) -> Result<()> {
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
    scaler: GradScaler,
    pub state: ScalerState,
}

/// What a checkpoint saves of a scaler, besides the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ScalerState {
    /// Steps in a row that were not skipped.
    good: u64,
    /// Calls since the counters were looked at.
    unseen: u64,
    /// What the counters were then.
    steps: u64,
    skipped: u64,
    /// Whether a second gradient has been infinite since then.
    overflowed: bool,
    /// Whether the next measurement repeats one that was given up for that.
    repeats: bool,
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
    fn follow(&mut self, scale: f64, counters: Counters) -> f64 {
        let Self { scaler, state } = self;
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

impl Srkl {
    /// Lets [`Srkl::grad_scale`] follow the gradients, from `init_scale` on. Multiply each loss by it, as without a scaler. After
    /// each whole step (its micro-batches accumulated, its curvature measured) the scale is what the next one uses. `None`
    /// stops it; the scale stays as it is then.
    ///
    /// Compute the loss in f32: the scale is beyond f16's numbers.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{GradScaler, ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let w = Var::from_tensor(&w.to_dtype(DType::F16)?)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.01))?;
    /// opt.set_grad_scaler(Some(GradScaler::default()))?;
    /// for _ in 0..3 {
    ///     let loss = (w.as_tensor() * 1e-6)?.to_dtype(DType::F32)?.sqr()?.sum_all()?;
    ///     opt.backward_step(&(loss * opt.grad_scale())?)?;
    /// }
    /// assert_eq!(opt.skipped_steps()?, 0);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// [`Srkl::save`] saves the scale and the number of steps since it has changed, and [`Srkl::load`] goes on from there if a
    /// scaler was set before (settings are not part of the file). From a file that was saved without a scaler it goes on with its
    /// own scale.
    ///
    /// A step that measures uses one scale for both gradients: in a closure read it before (`let scale = opt.grad_scale();`). A
    /// second gradient that is not finite, where the first one was, may come from the scale and not from the curvature. So the
    /// measurement is given up, as by [`Srkl::skip_measurement`], the scale falls, and the next step measures again. That
    /// measurement counts whatever it is. (To see this a measurement reads the second gradients once more, one at a time.)
    ///
    /// With several ranks all must set it alike. Replays of captured steps are not seen: call [`Srkl::update_grad_scale`].
    ///
    /// # Errors
    ///
    /// Settings out of range; a group whose [`ParamsSrkl::nonfinite`] is not [`NonFinite::SkipStep`]; a step that waits for its
    /// measurement. Nothing has changed then.
    pub fn set_grad_scaler(&mut self, scaler: Option<GradScaler>) -> Result<()> {
        let Some(scaler) = scaler else {
            self.scaling = None;
            return Ok(());
        };
        scaler.validate()?;
        self.all.groups.iter().try_for_each(|group| {
            refuse_unskipped(&group.params)
                .map_err(|e| e.context(format!("group `{}`", group.name)))
        })?;
        self.refuse_pending()?;
        let Counters { steps, skipped_steps, .. } = self.engine.counters()?;
        self.set_grad_scale(f64::from(scaler.init_scale as f32))?;
        self.scaling = Some(Scaling { scaler, state: ScalerState::after(steps, skipped_steps) });
        Ok(())
    }

    /// The settings of [`Srkl::set_grad_scaler`].
    #[must_use]
    pub fn grad_scaler(&self) -> Option<&GradScaler> {
        self.scaling.as_ref().map(|scaling| &scaling.scaler)
    }

    /// Lets the scale follow now, whatever [`GradScaler::check_every`] is: after replays of captured steps, which are counted on
    /// the device alone. Waits for it. Without a scaler it does nothing.
    ///
    /// # Errors
    ///
    /// A step that waits for its measurement. (And a device can fail.)
    pub fn update_grad_scale(&mut self) -> Result<()> {
        if self.scaling.is_none() {
            return Ok(());
        }
        self.refuse_pending()?;
        let counters = self.engine.counters()?;
        let Some(scaling) = &mut self.scaling else { return Ok(()) };
        let before = *scaling;
        let scale = scaling.follow(self.grad_scale, counters);
        if scale == self.grad_scale {
            return Ok(());
        }
        self.set_grad_scale(scale).inspect_err(|_| self.scaling = Some(before))
    }

    /// After each whole step: lets the scale follow if it is time.
    pub(crate) fn step_is_whole(&mut self) -> Result<()> {
        let Some(Scaling { scaler, state }) = &mut self.scaling else { return Ok(()) };
        state.unseen += 1;
        match state.unseen >= scaler.check_every {
            true => self.update_grad_scale(),
            false => Ok(()),
        }
    }

    /// Whether second gradients, summed over ranks, are to be blamed on the scale. The next step then measures again.
    pub(crate) fn blames_scale(&mut self, again: &GradStore) -> Result<bool> {
        let Some(scaling) = &mut self.scaling else { return Ok(false) };
        if std::mem::take(&mut scaling.state.repeats) {
            return Ok(false);
        }
        let mut infinite = false;
        for block in self.all.blocks.iter().filter(|block| self.all.of(block).lr != 0.) {
            if let Some(gradient) = again.get_id(block.id).filter(|g| g.elem_count() > 0) {
                // 0 of finite numbers, and a NaN otherwise.
                let zeros = gradient.affine(0., 0.)?.sum_all()?.to_dtype(DType::F64)?;
                infinite |= zeros.to_scalar::<f64>()?.is_nan();
            }
        }
        if let Some(ranks) = &self.ranks {
            infinite = ranks.or_abort(ranks.any(&[infinite]))?[0];
        }
        scaling.state.overflowed |= infinite;
        scaling.state.repeats = infinite;
        Ok(infinite)
    }

    /// Whether a measurement was given up for the scale, and is to be repeated.
    pub(crate) fn repeats_measurement(&self) -> bool {
        self.scaling.is_some_and(|scaling| scaling.state.repeats)
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
