//! Measured curvature: when it is measured, and with which gradients.
//!
//! [`Curvature::Step`](crate::Curvature::Step) is measured after a step,
//! [`Curvature::Hutchinson`](crate::Curvature::Hutchinson) before it, while the parameters are perturbed. How a
//! measurement changes the estimate is in `rule.rs`, the order of its stages in `engine/`.

use candle_core::backprop::GradStore;
use candle_core::{DType, Error, Result, Tensor, bail};

use crate::backend::Step;
use crate::block::Block;
use crate::engine::{Perturbation, Remaining};
use crate::estimate::{Estimate, Left, Measurements};
use crate::micro_batches::{Accumulated, leaf};
use crate::numerics::random_bits;
use crate::optimizer::{Reduced, Srkl};
use crate::params::{Measure, ParamsSrkl, Repeatable};
use crate::random;
use crate::rule::StepScalars;
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
    /// Those of `loss`, of its gradient and of [`step`](candle_nn::Optimizer::step); losses that differ at the same
    /// parameters; a loss that reaches none of the parameters. If the first call fails nothing has changed. If the
    /// second one fails, or panics, there is no measurement: with `Step` the step has been taken; with
    /// `Hutchinson` it has not, and the parameters are as they were, bit for bit.
    pub fn backward_step_with<E: From<Error>>(
        &mut self,
        mut loss: impl FnMut() -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Tensor, E> {
        let losses = self.backward_step_over(1, |_| loss())?;
        Ok(losses.into_iter().next().expect("one loss of one micro-batch"))
    }

    /// [`backward_step_with`](Self::backward_step_with) for several micro-batches: one step by the mean of their gradients,
    /// summed as [`accumulate`](Self::accumulate) does, so that one graph at a time is in memory. `loss` is called with the
    /// numbers below `count`, in order; once more where the step measures; and before the first measurement with 0 alone, to
    /// compare. Returns the losses, detached from their graphs.
    ///
    /// Each micro-batch has random numbers of its own, by its number among those of all ranks
    /// ([`micro_batch_seed`](Self::micro_batch_seed)).
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let batches = [1f64, -2., 3., 4.];
    /// let w = Var::new(2f32, &Device::Cpu)?;
    /// let mut opt = Srkl::builder()
    ///     .default_group(ParamsSrkl::braked_adam())
    ///     .build([("w".to_string(), w.clone())])?;
    /// for _ in 0..100 {
    ///     opt.backward_step_over(batches.len(), |i| (w.as_tensor() * batches[i])?.sqr())?;
    /// }
    /// assert!(w.to_scalar::<f32>()?.abs() < 1e-2);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`backward_step_with`](Self::backward_step_with), and a `count` of 0.
    pub fn backward_step_over<E: From<Error>>(
        &mut self,
        count: usize,
        mut loss: impl FnMut(usize) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Vec<Tensor>, E> {
        let seeds: Vec<u64> = (0..count).map(|i| self.micro_batch_seed(count, i)).collect();
        let mut loss = |i: usize| random::with_seed(seeds[i], || loss(i));
        let measures = self.measuring();
        let first = self.gradients_of(count, measures, &mut loss);
        let (losses, grads) = self.tell(first)?;
        let micro_batches = count as u64;
        if measures && self.probes() {
            let perturbed = self.perturb_by(Reduced::Own(&grads), micro_batches)?;
            let again = perturbed.opt.sum_gradients(count, |i| backward(&mut loss, i));
            match again {
                Ok((_, again)) => perturbed.observe_by(&again, micro_batches)?,
                Err(e) => {
                    drop(perturbed);
                    return self.tell(Err(e));
                }
            }
        }
        self.step_by(&grads, micro_batches)?;
        if self.measure_state.awaiting_observe {
            drop(grads);
            let awaited = Awaited(self);
            let again = awaited.0.sum_gradients(count, |i| backward(&mut loss, i));
            let (_, again) = awaited.0.tell(again)?;
            awaited.0.observe_by(&again, micro_batches)?;
        }
        Ok(losses)
    }

    /// The losses and the sum of their gradients, before a step; nothing is left of their graphs if it `measures`.
    fn gradients_of<E: From<Error>>(
        &mut self,
        count: usize,
        measures: bool,
        loss: &mut impl FnMut(usize) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<(Vec<Tensor>, GradStore), E> {
        self.refuse_pending()?;
        if count == 0 {
            Err(Error::msg("`backward_step_over`: expected at least one micro-batch, got 0"))?
        }
        let checks = measures && self.checks_closures();
        // Its graph is dropped here.
        let expected = if checks { Some(exact_values(&loss(0)?)?) } else { None };
        let summed = self.sum_gradients(count, |i| {
            let first = loss(i)?;
            if let (0, Some(expected)) = (i, &expected) {
                refuse_different(expected, &exact_values(&first)?)?;
            }
            let grads = first.backward()?;
            self.refuse_unreached(&grads)?;
            Ok::<_, E>((first.detach(), if measures { self.detached(&grads) } else { grads }))
        })?;
        self.measure_state.checked |= checks;
        Ok(summed)
    }

    /// Tells the other ranks if this one has failed, so that they do not wait for it.
    fn tell<T, E>(&mut self, done: std::result::Result<T, E>) -> std::result::Result<T, E> {
        if done.is_err() {
            let why =
                "its loss or the gradient of it has failed, or two calls differ; it has the error";
            let _ = self.refuse::<()>(Error::msg(why));
        }
        done
    }

    /// The gradients of the parameters, without their graphs: a graph keeps alive what candle computed them from.
    pub(crate) fn detached(&self, grads: &GradStore) -> GradStore {
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
    /// It depends only on [`Srkl::set_seed`], the number of the step, the seed of an enclosing
    /// [`random::with_seed`], if there is one, and the [`rank`](Self::rank). A checkpoint restores it.
    #[must_use]
    pub fn step_seed(&self) -> u64 {
        self.micro_batch_seed(1, 0)
    }

    /// The seed of micro-batch `i` of the `count` that this rank has in the next step: as [`Srkl::step_seed`], which is that of
    /// the only one. It goes by the number of the micro-batch among those of all ranks, so that it does not depend on how
    /// these are distributed, and each has another.
    #[must_use]
    pub fn micro_batch_seed(&self, count: usize, i: usize) -> u64 {
        let waits = self.measure_state.awaiting_observe as u64;
        let outer = random::current_seed().unwrap_or(0);
        let seed = random_bits(self.seed, self.measure_state.step_calls - waits, STEP_SEEDS, outer);
        match (self.rank() * count + i) as u64 {
            0 => seed,
            number => random_bits(seed, number, STEP_SEEDS, 0),
        }
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
    /// With [`Curvature::Step`](crate::Curvature::Step) a step whose schedule is 0 never measures, and no step does while all parameters
    /// that would be measured are frozen.
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
        !measured
            && can
            && (requested || blind || asked < first || step_calls % every == 0)
            && self.measures_any()
    }

    /// Whether any parameter that is stepped is of a group that measures.
    fn measures_any(&self) -> bool {
        let measured =
            |block: &Block| block.whole > 0 && MeasureSchedule::measures(self.all.of(block));
        self.all.blocks.iter().any(measured)
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
    /// and the next step is due a measurement again. Second gradients that have been [accumulated](Self::accumulate) are forgotten.
    pub fn skip_measurement(&mut self) {
        match std::mem::take(&mut self.measure_state.awaiting_observe) {
            true => {
                self.clear_accumulated();
                self.give_up();
            }
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
        self.observe_by(grads_again, 1)
    }

    /// The same with the sum of the gradients of `count` micro-batches.
    pub(crate) fn observe_by(&mut self, grads_again: &GradStore, count: u64) -> Result<()> {
        let local = self.refuse_unobservable(count);
        let (again, scalars) = self.reduced("observe", Reduced::Own(grads_again), count, local)?;
        if self.blames_scale(&again, None)? {
            self.engine.release(&mut self.all);
        } else {
            let remaining = self.engine.observe(&mut self.all, &again, scalars);
            let remaining = self.after_sum(remaining, scalars)?;
            self.note_estimates(remaining);
        }
        self.measure_state.awaiting_observe = false;
        // Also where the repeated one was of a step that was skipped.
        self.measure_state.requested |= self.repeats_measurement();
        self.step_is_whole()
    }

    /// Ends a step without its measurement.
    fn give_up(&mut self) {
        self.engine.release(&mut self.all);
        self.forget_repeat();
        // What fails here fails again, and is reported, in the next step.
        let _ = self.step_is_whole();
    }

    /// Perturbs the parameters that have a gradient in `grads`, the gradients of the next step, for a measurement of
    /// [`Curvature::Hutchinson`](crate::Curvature::Hutchinson). Dropping the guard restores them.
    ///
    /// # Errors
    ///
    /// Settings without [`Curvature::Hutchinson`](crate::Curvature::Hutchinson), a measurement that has been taken
    /// already, or a gradient that `step` would refuse.
    pub fn perturb<'a>(&'a mut self, grads: &'a GradStore) -> Result<Perturbed<'a>> {
        self.perturb_by(Reduced::Own(grads), 1)
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

    /// [`Srkl::perturb`] for the sum of the gradients of `count` micro-batches.
    pub(crate) fn perturb_by<'a>(
        &'a mut self,
        grads: Reduced<'a>,
        count: u64,
    ) -> Result<Perturbed<'a>> {
        let local = self.refuse_perturbation();
        let (grads, scalars) = self.reduced("perturb", grads, count, local)?;
        let draw = self.measure_state.probe_count;
        let step = probe_step(&grads, scalars);
        let (delta, seed) = self.measure_schedule.and_then(|plan| plan.probe).unwrap_or_default();
        let done = self.engine.perturb(&mut self.all, step, Perturbation { delta, seed, draw });
        if let Err(e) = self.after_sum(done, scalars) {
            let _ = self.engine.restore(&mut self.all);
            return Err(e);
        }
        self.measure_state.probe_count += 1;
        Ok(Perturbed { opt: self, grads, count, again: Accumulated::default(), done: false })
    }

    /// An error if no step waits for a measurement over so many micro-batches.
    fn refuse_unobservable(&self, count: u64) -> Result<()> {
        if !self.measure_state.awaiting_observe {
            bail!(
                "`observe`: no step waits for a measurement; call it once after a `step` before which \
                 `measuring()` was true, with `Curvature::Step`"
            )
        }
        let expected = self.step_count;
        if count != expected {
            bail!("`observe`: expected the {expected} micro-batches of the step, got {count}")
        }
        Ok(())
    }

    /// An error if the parameters can't be perturbed now.
    fn refuse_perturbation(&self) -> Result<()> {
        if !self.probes() {
            bail!("`perturb`: expected settings with `Curvature::Hutchinson`")
        }
        if self.measure_state.measured {
            bail!("`perturb`: the measurement for the next step has been taken; call `step`")
        }
        Ok(())
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

fn backward<E: From<Error>>(
    loss: &mut impl FnMut(usize) -> std::result::Result<Tensor, E>,
    i: usize,
) -> std::result::Result<(Tensor, GradStore), E> {
    let loss = loss(i)?;
    let grads = loss.backward()?;
    Ok((loss.detach(), grads))
}

/// A step whose measurement is under way. If that fails, or the closure panics, no later step waits for it.
struct Awaited<'a>(&'a mut Srkl);

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        if std::mem::take(&mut self.0.measure_state.awaiting_observe) {
            self.0.give_up();
        }
    }
}

/// Bookkeeping after steps and measurements.
impl Srkl {
    /// Counts a step, taken or skipped. If it `measures`, it now waits for `observe`.
    pub(crate) fn count_step(&mut self, measures: bool) {
        let repeats = self.repeats_measurement();
        let state = &mut self.measure_state;
        state.step_calls += 1;
        if measures || state.measured {
            state.asked += 1;
            // The measurement that was taken before the step may have to be repeated.
            state.requested = state.measured && repeats;
        }
        state.measured = false;
        state.awaiting_observe = measures;
    }

    /// Notes which blocks have had a gradient. If one that has a gradient now has no estimate of the curvature that
    /// its group measures, the next step measures.
    pub(crate) fn note_gradients(&mut self, given: impl Fn(&Block) -> bool, measures: bool) {
        for block in self.all.blocks.iter_mut().filter(|block| !block.trained) {
            block.trained = given(block);
        }
        let all = &self.all;
        let missing = |block: &Block| {
            let measured = !block.known && MeasureSchedule::measures(all.of(block));
            // Looked up last: with thousands of parameters that takes time.
            measured && block.whole > 0 && given(block)
        };
        let any_measures = all.any(MeasureSchedule::measures);
        if !measures && any_measures && self.all.blocks.iter().any(missing) {
            self.measure_state.blind = true;
        }
    }

    /// Notes which blocks have an estimate after a measurement. If one has been lost, or there is none at all, the
    /// next step measures.
    fn note_estimates(&mut self, remaining: Vec<Remaining>) {
        #[cfg(feature = "tracing")]
        self.emit_measurement(&remaining);
        let (mut any, mut lost) = (false, false);
        for (block, (left, known)) in self.all.blocks.iter_mut().zip(remaining) {
            any |= known;
            lost |= left == Some(Left::Lost);
            // Without a direction nothing can be measured: such a block waits for the next regular measurement.
            block.known = known || left == Some(Left::Unchanged);
        }
        self.measure_state.blind = !any || lost;
    }

    /// The same after estimates were loaded.
    pub(crate) fn note_unknown(&mut self) {
        let measures = self.measure_schedule.is_some();
        self.measure_state.blind |= measures && !self.all.blocks.iter().any(|block| block.known);
    }

    /// The same for the parameters of these places, which are `stepped` from now on, of which there are these `estimates`.
    pub(crate) fn note_stepped(&mut self, stepped: &[bool], estimates: Vec<Estimate>) {
        let all = &mut self.all;
        for ((block, estimate), _) in
            all.blocks.iter_mut().zip(estimates).zip(stepped).filter(|(_, stepped)| **stepped)
        {
            block.known = estimate.is_known();
            let measured = MeasureSchedule::measures(&all.groups[block.group].params);
            self.measure_state.blind |= measured && !block.known && block.whole > 0;
        }
    }
}

/// The next step, as a measurement by random vectors needs it.
fn probe_step(grads: &GradStore, scalars: StepScalars) -> Step<'_> {
    Step { grads, scalars, measures: false, records: false, steps: 0 }
}

/// Parameters are perturbed while this lives: see [`Srkl::perturb`]. Dropping it restores them, bit for bit.
#[derive(Debug)]
#[must_use = "dropping it restores the parameters"]
pub struct Perturbed<'a> {
    opt: &'a mut Srkl,
    grads: Reduced<'a>,
    /// How many micro-batches of this rank they are the sum over.
    count: u64,
    again: Accumulated,
    done: bool,
}

impl Perturbed<'_> {
    /// Restores the parameters and takes the measurement, from the gradients of the same batch at the perturbed
    /// parameters. A parameter without one is left out, and counted.
    ///
    /// # Errors
    ///
    /// A gradient that `step` would refuse. The parameters are restored, and the estimate is as it was.
    pub fn observe(self, grads_again: &GradStore) -> Result<()> {
        self.observe_by(grads_again, 1)
    }

    /// Adds the gradients of a micro-batch at the perturbed parameters, as [`Srkl::accumulate`] does.
    ///
    /// # Errors
    ///
    /// A gradient that `step` would refuse. Nothing has changed then.
    pub fn accumulate(&mut self, grads_again: &GradStore) -> Result<()> {
        self.again.push(leaf(&self.opt.all.blocks, grads_again, true)?)
    }

    /// [`observe`](Self::observe) with the mean of what has been [accumulated](Self::accumulate): the same micro-batches as of
    /// [`Srkl::perturb_accumulated`].
    ///
    /// # Errors
    ///
    /// Another number of micro-batches. The parameters are restored, and the estimate is as it was.
    pub fn observe_accumulated(self) -> Result<()> {
        let again = self.again.total()?;
        let count = self.again.count;
        self.observe_by(&again, count)
    }

    fn observe_by(mut self, grads_again: &GradStore, count: u64) -> Result<()> {
        let expected = self.count;
        let local = self.restore().and_then(|()| {
            if count != expected {
                bail!("`observe`: expected the {expected} micro-batches of `perturb`, got {count}")
            }
            Ok(())
        });
        let again = Reduced::Own(grads_again);
        let (again, scalars) = self.opt.reduced("observe", again, count, local)?;
        if self.opt.blames_scale(&again, Some(&self.grads))? {
            let Srkl { engine, all, .. } = &mut *self.opt;
            engine.release(all);
        } else {
            let step = probe_step(&self.grads, scalars);
            let Srkl { engine, all, .. } = &mut *self.opt;
            let remaining = engine.observe_probe(all, step, &again);
            let remaining = self.opt.after_sum(remaining, scalars)?;
            self.opt.note_estimates(remaining);
        }
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
