//! Measured curvature: when it is measured, and with which gradients.
//!
//! [`Curvature::Step`](crate::Curvature::Step) is measured after a step,
//! [`Curvature::Hutchinson`](crate::Curvature::Hutchinson) before it, while the parameters are perturbed. How a
//! measurement changes the estimate is in `rule.rs`, the order of its stages in `engine/`.

use candle_core::backprop::GradStore;
use candle_core::{DType, Error, Result, Tensor, bail};
use candle_nn::Optimizer;

use crate::backend::Step;
use crate::block::Block;
use crate::engine::{Perturbation, Remaining};
use crate::estimate::{Left, Measurements};
use crate::numerics::random_bits;
use crate::optimizer::Srkl;
use crate::params::{Measure, ParamsSrkl, Repeatable};
use crate::random;
use crate::schedule::{MeasureSchedule, MeasureState};

/// The stream of the step seeds, which no other random numbers use.
const STEP_SEEDS: u64 = u64::MAX;

const ADVICE: &str = ". A step that measures calls the closure twice, and needs the same function of the parameters each \
    time: draw the batch outside of the closure; use `candle_srkl::Dropout`, which has the same masks in both calls, \
    in place of `candle_nn::Dropout`, or seed random layers of your own by `candle_srkl::random::current_seed()`. If only \
    last bits differ, since a kernel adds in another order each time, set `repeatable: Repeatable::Assume`";

/// The values of a tensor of any dtype, exactly, but for integers beyond 2^53.
fn exact_values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

fn same_bits(first: Option<&[f64]>, second: Option<&[f64]>) -> bool {
    let bits =
        |values: Option<&[f64]>| values.map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    bits(first) == bits(second)
}

/// An error if two losses at the same parameters differ.
fn refuse_different(first: &[f64], second: &[f64]) -> Result<()> {
    if !same_bits(Some(first), Some(second)) {
        let shown = |values: &[f64]| match values {
            [value] => format!("{value}"),
            values => format!("{values:?}"),
        };
        bail!(
            "the loss is not repeatable: {}, and {} at the same parameters{ADVICE}",
            shown(first),
            shown(second)
        )
    }
    Ok(())
}

impl Srkl {
    /// One step. Calls `loss` once and, if the step measures the curvature, a second time: after the step
    /// ([`Curvature::Step`](crate::Curvature::Step)), or before it at perturbed parameters
    /// ([`Curvature::Hutchinson`](crate::Curvature::Hutchinson)). Returns the first loss, detached from its graph.
    ///
    /// `loss` must compute the same function of the parameters each time: the same batch, the same random numbers.
    /// Draw the batch outside of it, and use [`Dropout`](crate::Dropout), which has the same masks in both calls
    /// (seed random layers of your own by [`random::current_seed`]). Before the first measurement `loss` is called
    /// once more; if the two losses differ, it is an error ([`ParamsSrkl::repeatable`]).
    ///
    /// `loss` must include the factor [`Srkl::grad_scale`]. The first graph is dropped before the second call.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    /// for _ in 0..300 {
    ///     opt.backward_step_with(|| w.sqr()?.sum_all())?;
    /// }
    /// assert!(w.sqr()?.sum_all()?.to_scalar::<f32>()? < 1e-3);
    /// # use candle_nn::Optimizer;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// The closure may have an error type of its own, if candle's converts into it (as into `anyhow::Error`).
    ///
    /// # Errors
    ///
    /// Those of `loss`, of its gradient and of [`step`](Optimizer::step); losses that differ at the same
    /// parameters; a loss that reaches none of the parameters. If the first call fails nothing has changed. If the
    /// second one fails, or panics, there is no measurement: with `Step` the step has been taken; with
    /// `Hutchinson` it has not, and the parameters are as they were, bit for bit.
    pub fn backward_step_with<E: From<Error>>(
        &mut self,
        mut loss: impl FnMut() -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Tensor, E> {
        self.refuse_pending()?;
        let seed = self.step_seed();
        let mut loss = || random::with_seed(seed, &mut loss);
        let measures = self.measuring();
        let expected = match measures && self.checks_closures() {
            // Its graph is dropped here.
            true => Some(exact_values(&loss()?)?),
            false => None,
        };
        let (first, grads) = {
            let first = loss()?;
            if let Some(expected) = expected {
                refuse_different(&expected, &exact_values(&first)?)?;
                self.measure_state.checked = true;
            }
            let grads = first.backward()?;
            self.refuse_unreached(&grads)?;
            (first.detach(), if measures { self.detached(&grads) } else { grads })
        };
        if measures && self.probes() {
            let perturbed = self.perturb(&grads)?;
            let again = loss()?.backward()?;
            perturbed.observe(&again)?;
        }
        self.step(&grads)?;
        if self.measure_state.awaiting_observe {
            drop(grads);
            let awaited = Awaited(self);
            let again = loss()?.backward()?;
            awaited.0.observe(&again)?;
        }
        Ok(first)
    }

    /// The gradients of the parameters, without their graphs: a graph keeps alive what candle computed them from.
    fn detached(&self, grads: &GradStore) -> GradStore {
        let mut detached = GradStore::default();
        for block in &self.all.blocks {
            if let Some(gradient) = grads.get_id(block.id) {
                detached.insert_id(block.id, gradient.detach());
            }
        }
        detached
    }

    /// An error if a loss has reached no parameter.
    pub(crate) fn refuse_unreached(&self, grads: &GradStore) -> Result<()> {
        if !self.all.blocks.is_empty()
            && self.all.blocks.iter().all(|b| grads.get_id(b.id).is_none())
        {
            bail!(
                "the loss reaches none of the {} parameters: it is a constant, times 0, of an \
                 integer dtype, detached, or computed from other variables; or each way to them leads through an \
                 operation that has no backward pass in candle (the fused `layer_norm`, `rms_norm`, \
                 `softmax_last_dim` and `rope`)",
                self.all.blocks.len()
            )
        }
        Ok(())
    }

    /// The seed of the next step; while a step waits for `observe`, the seed of that step.
    /// [`Srkl::backward_step_with`] runs both calls of its closure inside [`random::with_seed`] with it. In a loop of
    /// your own compute both losses of a step that measures inside `with_seed(seed, ..)`, with the seed as it was
    /// before `step`.
    ///
    /// It depends only on [`Srkl::set_seed`], the number of the step, and the seed of an enclosing
    /// [`random::with_seed`], if there is one. A checkpoint restores it.
    #[must_use]
    pub fn step_seed(&self) -> u64 {
        let waits = self.measure_state.awaiting_observe as u64;
        let outer = random::current_seed().unwrap_or(0);
        random_bits(self.seed, self.measure_state.step_calls - waits, STEP_SEEDS, outer)
    }

    /// Sets the base of the step seeds. Default 0; saved in checkpoints.
    pub fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// The names of the parameters that have had no gradient in any step so far. Captured steps and their replays do
    /// not count.
    ///
    /// A parameter stays in this list if the loss does not depend on it, or only through an operation that has no
    /// backward pass in candle: the fused `layer_norm`, `rms_norm`, `softmax_last_dim` and `rope` cut the graph
    /// silently, and so do `candle_nn::LayerNorm` and `RmsNorm` on contiguous input, which use them.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let (a, b) = (Var::new(1f32, &Device::Cpu)?, Var::new(2f32, &Device::Cpu)?);
    /// let mut opt = Srkl::new(vec![a.clone(), b], ParamsSrkl::reference())?;
    /// opt.backward_step(&a.sqr()?)?;
    /// assert_eq!(opt.untrained(), ["1"]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn untrained(&self) -> Vec<&str> {
        let mut untrained: Vec<&Block> = self.all.blocks.iter().filter(|b| !b.trained).collect();
        untrained.sort_by_key(|block| block.place);
        untrained.into_iter().map(|block| block.name.as_str()).collect()
    }

    /// Whether the next step measures the curvature. It does
    ///
    /// - until `first` steps have measured, and after that if its number is a multiple of `every` ([`Measure`]);
    /// - after [`Srkl::request_measurement`];
    /// - if there is no estimate to use.
    ///
    /// With [`Curvature::Step`](crate::Curvature::Step) a step whose schedule is 0 never measures.
    ///
    /// In a loop of your own, with [`Curvature::Step`](crate::Curvature::Step):
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_nn::Optimizer;
    /// # use candle_srkl::{ParamsSrkl, Srkl};
    /// # let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// # let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    /// # let loss = || w.sqr()?.sum_all();
    /// let measures = opt.measuring();
    /// opt.step(&loss()?.backward()?)?;
    /// if measures {
    ///     opt.observe(&loss()?.backward()?)?;
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// and with [`Curvature::Hutchinson`](crate::Curvature::Hutchinson):
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_nn::Optimizer;
    /// # use candle_srkl::{ParamsSrkl, Srkl};
    /// # let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// # let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::hessian())?;
    /// # let loss = || w.sqr()?.sum_all();
    /// let grads = loss()?.backward()?;
    /// if opt.measuring() {
    ///     let perturbed = opt.perturb(&grads)?;
    ///     let again = loss()?.backward()?;
    ///     perturbed.observe(&again)?;
    /// }
    /// opt.step(&grads)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn measuring(&self) -> bool {
        let Some(MeasureSchedule { every, first, probe }) = self.measure_schedule else {
            return false;
        };
        let MeasureState { step_calls, asked, requested, blind, measured, .. } = self.measure_state;
        let can = probe.is_some() || self.schedule != 0.;
        !measured && can && (requested || blind || asked < first || step_calls % every == 0)
    }

    /// When curvature is measured; `None` if no group measures it.
    #[must_use]
    pub fn measure(&self) -> Option<Measure> {
        let measured = |params: &&ParamsSrkl| MeasureSchedule::of(params).is_some();
        self.all
            .groups
            .iter()
            .map(|group| &group.params)
            .find(measured)
            .map(|params| params.measure)
    }

    /// Replaces [`ParamsSrkl::measure`] of all groups, from the next step on. Without effect on a step where no group
    /// measures.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{Measure, ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w], ParamsSrkl::braked_adam())?;
    /// opt.set_measure(Measure { every: 50, ..Measure::default() })?;
    /// assert_eq!(opt.measure().map(|measure| measure.every), Some(50));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A step that waits for its measurement, or settings out of range. The old ones stay.
    pub fn set_measure(&mut self, measure: Measure) -> Result<()> {
        self.refuse_pending()?;
        measure.validate()?;
        let old: Vec<Measure> = self.all.groups.iter().map(|group| group.params.measure).collect();
        self.all.groups.iter_mut().for_each(|group| group.params.measure = measure);
        if let Err(e) = self.upload_settings() {
            for (group, old) in self.all.groups.iter_mut().zip(old) {
                group.params.measure = old;
            }
            return Err(e);
        }
        self.measure_schedule =
            MeasureSchedule::of_all(self.all.groups.iter().map(|group| &group.params))?;
        Ok(())
    }

    /// Makes the next step measure. For replays of captured steps, which can't measure and which the optimizer does
    /// not see. (Before replays check [`Srkl::measuring`] too: it is true if a measurement has left no estimate.) Without
    /// effect if no group measures.
    pub fn request_measurement(&mut self) {
        self.measure_state.requested = true;
    }

    /// Gives up the measurement that the last step waits for or, if it waits for none, the one that is due with the
    /// next step. Steps go on with the estimate there is. Without one, a step that does not measure has a `phi` of 0,
    /// and the next step is due a measurement again.
    pub fn skip_measurement(&mut self) {
        match std::mem::take(&mut self.measure_state.awaiting_observe) {
            true => self.engine.release(&mut self.all),
            false => self.measure_state.measured |= self.measuring(),
        }
    }

    /// The second half of a step that measures with [`Curvature::Step`](crate::Curvature::Step): takes the gradients of the **same
    /// batch** as the step's, at the parameters as they are now. Nothing may write to them in between.
    ///
    /// # Errors
    ///
    /// No step waits for it, or a gradient that `step` would refuse. It can then be called again. (A parameter
    /// without a second gradient is no error: it is left out of this measurement, and counted.)
    pub fn observe(&mut self, grads_again: &GradStore) -> Result<()> {
        if !self.measure_state.awaiting_observe {
            bail!(
                "`observe`: no step waits for a measurement; call it once after a `step` before which \
                 `measuring()` was true, with `Curvature::Step`"
            )
        }
        let scalars = self.scalars()?;
        let remaining = self.engine.observe(&mut self.all, grads_again, scalars)?;
        self.measure_state.awaiting_observe = false;
        self.note_estimates(remaining);
        Ok(())
    }

    /// Perturbs the parameters that have a gradient in `grads`, the gradients of the next step, for a measurement of
    /// [`Curvature::Hutchinson`](crate::Curvature::Hutchinson). Dropping the guard restores them.
    ///
    /// # Errors
    ///
    /// Settings without [`Curvature::Hutchinson`](crate::Curvature::Hutchinson), a measurement that has been taken
    /// already, or a gradient that `step` would refuse.
    pub fn perturb<'a>(&'a mut self, grads: &'a GradStore) -> Result<Perturbed<'a>> {
        let Some(MeasureSchedule { probe: Some((delta, seed)), .. }) = self.measure_schedule else {
            bail!("`perturb`: expected settings with `Curvature::Hutchinson`")
        };
        if self.measure_state.measured {
            bail!("`perturb`: the measurement for the next step has been taken; call `step`")
        }
        let draw = self.measure_state.probe_count;
        let step = self.probe_step(grads)?;
        self.engine.perturb(&mut self.all, step, Perturbation { delta, seed, draw })?;
        self.measure_state.probe_count += 1;
        Ok(Perturbed { opt: self, grads, done: false })
    }

    /// Checks that `loss` gives the same loss and the same gradients twice, bit for bit, at the same parameters;
    /// otherwise a measurement of curvature measures noise. Calls it as [`Srkl::backward_step_with`] does, with the
    /// same seed.
    ///
    /// # Errors
    ///
    /// A loss or a gradient that differs, and those of `loss`.
    pub fn check_repeatable<E: From<Error>>(
        &self,
        mut loss: impl FnMut() -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<(), E> {
        let seed = self.step_seed();
        let mut run = || -> std::result::Result<_, E> {
            let loss = random::with_seed(seed, &mut loss)?;
            let grads = loss.backward()?;
            Ok((exact_values(&loss)?, self.detached(&grads)))
        };
        let ((first, first_grads), (second, second_grads)) = (run()?, run()?);
        refuse_different(&first, &second)?;
        for block in &self.all.blocks {
            let values = |grads: &GradStore| grads.get_id(block.id).map(exact_values).transpose();
            let (first, second) = (values(&first_grads)?, values(&second_grads)?);
            if !same_bits(first.as_deref(), second.as_deref()) {
                Err(Error::msg(format!(
                    "the gradient of `{}` is not repeatable: it differs between two calls at the same \
                     parameters, whose losses are the same{ADVICE}",
                    block.name
                )))?
            }
        }
        Ok(())
    }

    /// The counts of measurements so far, and the current `H`, of one parameter: the one with the most measurements
    /// that were not ignored.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The numbers may live on a device.)
    pub fn measurements(&self) -> Result<Measurements> {
        let now = self.steps()? + self.skipped_steps()?;
        let each = self.engine.estimates()?.into_iter().map(|estimate| estimate.measurements(now));
        let most = |m: &Measurements| (m.taken + m.nonfinite + m.unmoved, m.uninformative);
        Ok(each.max_by_key(most).unwrap_or_default())
    }

    /// The next step, as a measurement by random vectors needs it.
    fn probe_step<'g>(&self, grads: &'g GradStore) -> Result<Step<'g>> {
        Ok(Step { grads, scalars: self.scalars()?, measures: false, records: false, steps: 0 })
    }

    /// Whether a closure must be checked before the next measurement.
    fn checks_closures(&self) -> bool {
        let measured = |params: &ParamsSrkl| MeasureSchedule::of(params).is_some();
        let checks =
            |params: &ParamsSrkl| measured(params) && params.repeatable == Repeatable::Check;
        !self.measure_state.checked && self.all.groups.iter().any(|group| checks(&group.params))
    }

    /// Whether curvature is measured at perturbed parameters.
    pub(crate) fn probes(&self) -> bool {
        self.measure_schedule.is_some_and(|plan| plan.probe.is_some())
    }

    /// An error if the last step waits for its measurement.
    pub(crate) fn refuse_pending(&self) -> Result<()> {
        if self.measure_state.awaiting_observe {
            bail!(
                "the last step measures the curvature, and waits for `observe` with the gradients of the \
                 same batch at the new parameters; or use `backward_step_with`, or give it up by \
                 `skip_measurement`"
            )
        }
        Ok(())
    }

    /// An error if the last step waits for its measurement, or a measurement is due that `step` can't make.
    pub(crate) fn refuse_unmeasured(&self) -> Result<()> {
        self.refuse_pending()?;
        if self.probes() && self.measuring() {
            bail!(
                "this step is due a measurement of the curvature first: call `perturb`, and `observe` of \
                 what it returns; or use `backward_step_with`, or give it up by `skip_measurement`"
            )
        }
        Ok(())
    }
}

/// A step whose measurement is under way. If that fails, or the closure panics, no later step waits for it.
struct Awaited<'a>(&'a mut Srkl);

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        if std::mem::take(&mut self.0.measure_state.awaiting_observe) {
            self.0.engine.release(&mut self.0.all);
        }
    }
}

/// Bookkeeping after steps and measurements.
impl Srkl {
    /// Counts a step, taken or skipped. If it `measures`, it now waits for `observe`.
    pub(crate) fn count_step(&mut self, measures: bool) {
        let state = &mut self.measure_state;
        state.step_calls += 1;
        if measures || state.measured {
            state.asked += 1;
            state.requested = false;
        }
        state.measured = false;
        state.awaiting_observe = measures;
    }

    /// Notes which blocks have had a gradient. If one that has a gradient now has no estimate of the curvature that
    /// its group measures, the next step measures.
    pub(crate) fn note_gradients(&mut self, grads: &GradStore, measures: bool) {
        for block in self.all.blocks.iter_mut().filter(|block| !block.trained) {
            block.trained = grads.get_id(block.id).is_some();
        }
        let all = &self.all;
        let missing = |block: &Block| {
            let measured = MeasureSchedule::of(all.of(block)).is_some();
            let moves = block.n > 0 && all.of(block).lr > 0. && grads.get_id(block.id).is_some();
            !block.known && measured && moves
        };
        if !measures && self.all.blocks.iter().any(missing) {
            self.measure_state.blind = true;
        }
    }

    /// Notes which blocks have an estimate after a measurement. If one has been lost, or there is none at all, the
    /// next step measures.
    fn note_estimates(&mut self, remaining: Vec<Remaining>) {
        let (mut any, mut lost) = (false, false);
        for (block, (left, known)) in self.all.blocks.iter_mut().zip(remaining) {
            any |= known;
            lost |= left == Some(Left::Lost);
            // Without a direction nothing can be measured: such a block waits for the next regular measurement.
            block.known = known || left == Some(Left::Unchanged);
        }
        self.measure_state.blind = !any || lost;
    }

    /// The same after estimates were loaded, or settings of curvature have changed.
    pub(crate) fn recall_estimates(&mut self) -> Result<()> {
        if self.measure_schedule.is_none() {
            return Ok(());
        }
        let estimates = self.engine.estimates()?;
        for (block, estimate) in self.all.blocks.iter_mut().zip(estimates) {
            block.known = estimate.is_known();
        }
        self.measure_state.blind |= !self.all.blocks.iter().any(|block| block.known);
        Ok(())
    }
}

/// Parameters are perturbed while this lives: see [`Srkl::perturb`]. Dropping it restores them, bit for bit.
#[derive(Debug)]
#[must_use = "dropping it restores the parameters"]
pub struct Perturbed<'a> {
    opt: &'a mut Srkl,
    grads: &'a GradStore,
    done: bool,
}

impl Perturbed<'_> {
    /// Restores the parameters and takes the measurement, from the gradients of the same batch at the perturbed
    /// parameters. A parameter without one is left out, and counted.
    ///
    /// # Errors
    ///
    /// A gradient that `step` would refuse. The parameters are restored, and the estimate is as it was.
    pub fn observe(mut self, grads_again: &GradStore) -> Result<()> {
        self.restore()?;
        let step = self.opt.probe_step(self.grads)?;
        let Srkl { engine, all, .. } = &mut *self.opt;
        let remaining = engine.observe_probe(all, step, grads_again)?;
        self.opt.note_estimates(remaining);
        self.opt.measure_state.measured = true;
        Ok(())
    }

    fn restore(&mut self) -> Result<()> {
        self.done = true;
        self.opt.engine.restore(&mut self.opt.all)
    }
}

impl Drop for Perturbed<'_> {
    fn drop(&mut self) {
        if !self.done {
            // Can fail only if the device has failed.
            let _ = self.restore();
        }
    }
}
