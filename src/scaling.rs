//! The gradient scale of an optimizer, where a [`GradScaler`] sets it.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result};

use crate::engine::Counters;
use crate::loss_scale::{GradScaler, ScalerState, Scaling, refuse_unskipped};
use crate::optimizer::Srkl;

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
    /// measurement counts whatever it is. (To see this a step that measures reads the counters before it, and its measurement the
    /// second gradients once more, one at a time.)
    ///
    /// With several ranks all must set it alike.
    ///
    /// **CUDA graphs.** Replays of captured steps are not seen: call [`Srkl::update_grad_scale`]. A scale that the loss is multiplied by
    /// as a number is captured with it. So keep it in a variable on the device, which is written between replays:
    ///
    /// ```no_run
    /// # use candle_core::{Device, Tensor, Var};
    /// # use candle_nn::Optimizer;
    /// # use candle_srkl::{GradScaler, ParamsSrkl, Srkl};
    /// # let device = Device::new_cuda(0)?;
    /// # let w = Var::new(&[1f32, -2., 3.], &device)?;
    /// # let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.01))?;
    /// # let loss = || w.sqr()?.sum_all();
    /// opt.set_grad_scaler(Some(GradScaler::default()))?;
    /// let scale = Var::new(opt.grad_scale() as f32, &device)?;
    /// // What is captured:
    /// opt.step(&(loss()? * scale.as_tensor())?.backward()?)?;
    /// // After each replay, or some:
    /// opt.update_grad_scale()?;
    /// scale.set(&Tensor::new(opt.grad_scale() as f32, &device)?)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Settings out of range; micro-batches that have been [accumulated](Srkl::accumulate) by another scale; a group whose [`nonfinite`](crate::ParamsSrkl::nonfinite) is not [`SkipStep`](crate::NonFinite::SkipStep); a step that waits for its
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
        let state = ScalerState::after(steps, skipped_steps);
        self.scaling = Some(Scaling { scaler, state, skipped_before: skipped_steps });
        Ok(())
    }

    /// The settings of [`Srkl::set_grad_scaler`].
    #[must_use]
    pub fn grad_scaler(&self) -> Option<&GradScaler> {
        self.scaling.as_ref().map(|scaling| &scaling.scaler)
    }

    /// Lets the scale follow now, whatever [`GradScaler::check_every`] is: after replays of captured steps, which are counted on
    /// the device alone. Waits for it. Without a scaler it does nothing, and while micro-batches are
    /// [accumulated](Srkl::accumulate), which have the old scale.
    ///
    /// # Errors
    ///
    /// A step that waits for its measurement. (And a device can fail.)
    pub fn update_grad_scale(&mut self) -> Result<()> {
        if self.scaling.is_none() {
            return Ok(());
        }
        self.refuse_pending()?;
        if self.accumulated.count > 0 {
            return Ok(());
        }
        let counters = self.engine.counters()?;
        let Some(scaling) = &mut self.scaling else { return Ok(()) };
        let before = *scaling;
        let scale = scaling.follow(self.grad_scale, counters);
        if scale == self.grad_scale {
            return Ok(());
        }
        self.set_grad_scale(scale).inspect_err(|_| self.scaling = Some(before))
    }

    /// After each whole step: lets the scale follow if it is time, or a measurement was given up for it.
    pub(crate) fn step_is_whole(&mut self) -> Result<()> {
        let Some(Scaling { scaler, state, .. }) = &mut self.scaling else { return Ok(()) };
        state.unseen += 1;
        match state.overflowed || state.unseen >= scaler.check_every {
            true => self.update_grad_scale(),
            false => Ok(()),
        }
    }

    /// Before a step that measures afterwards: how many were skipped, for [`Srkl::blames_scale`].
    pub(crate) fn note_skipped(&mut self, measures: bool) -> Result<()> {
        let Some(scaling) = self.scaling.as_mut().filter(|_| measures) else { return Ok(()) };
        self.engine.refuse_capture("a step that measures the curvature")?;
        scaling.skipped_before = self.engine.counters()?.skipped_steps;
        Ok(())
    }

    /// Whether a measurement is given up for its second gradients, summed over ranks. They are blamed on the scale, and the next
    /// step measures again, if they are not finite and the `first` were. (Where these have been stepped by, the step tells: it was
    /// skipped if not.)
    pub(crate) fn blames_scale(
        &mut self,
        again: &GradStore,
        first: Option<&GradStore>,
    ) -> Result<bool> {
        let Some(scaling) = &self.scaling else { return Ok(false) };
        let told = || {
            let useless = match first {
                Some(first) => self.is_infinite(first)?,
                None => self.engine.counters()?.skipped_steps > scaling.skipped_before,
            };
            Ok(vec![useless, self.is_infinite(again)?])
        };
        let mut told = self.done(told())?;
        if let Some(ranks) = &self.ranks {
            told = ranks.or_abort(ranks.any(&told))?;
        }
        let Some(Scaling { state, .. }) = &mut self.scaling else { return Ok(false) };
        let (useless, infinite) = (told[0], told[1]);
        if useless {
            // Of a step that was skipped the engine takes nothing; one that will be skipped it does not know of.
            return Ok(first.is_some());
        }
        let blamed = infinite && !state.repeats;
        state.overflowed |= blamed;
        state.repeats = blamed;
        Ok(blamed)
    }

    /// Whether any of these gradients of parameters that are stepped has a NaN or an infinity.
    fn is_infinite(&self, grads: &GradStore) -> Result<bool> {
        for block in self.all.blocks.iter().filter(|block| self.all.of(block).lr != 0.) {
            if let Some(gradient) = grads.get_id(block.id).filter(|g| g.elem_count() > 0) {
                // 0 of finite numbers, and a NaN otherwise.
                let zeros = gradient.affine(0., 0.)?.sum_all()?.to_dtype(DType::F64)?;
                if zeros.to_scalar::<f64>()?.is_nan() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// A measurement that the user gives up is not repeated.
    pub(crate) fn forget_repeat(&mut self) {
        if let Some(scaling) = &mut self.scaling {
            scaling.state.repeats = false;
        }
    }

    /// Whether a measurement was given up for the scale, and is to be repeated.
    pub(crate) fn repeats_measurement(&self) -> bool {
        self.scaling.is_some_and(|scaling| scaling.state.repeats)
    }
}
