//! Curvature that is measured: when, by which gradients, and what becomes of it.
//!
//! [`Curvature::Step`](crate::Curvature::Step) is measured after a step, [`Curvature::Hutchinson`](crate::Curvature::Hutchinson) before it, at parameters that are
//! perturbed meanwhile. What becomes of a measurement is in `rule.rs`, the order of one in `engine/`.

use candle_core::backprop::GradStore;
use candle_core::{DType, Error, Result, Tensor, bail};
use candle_nn::Optimizer;

use crate::backend::Step;
use crate::block::Block;
use crate::engine::{Perturbation, Remaining};
use crate::estimate::{Left, Measurements};
use crate::numerics::random_bits;
use crate::optimizer::Srkl;
use crate::params::{Curvature, Measure, ParamsSrkl, Repeatable};
use crate::random;
use crate::schedule::{MeasureSchedule, MeasureState};

/// What sets the seeds of steps apart from other random numbers.
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
    /// One step that asks for what it needs: calls `loss` once, and, where the step measures the curvature,
    /// a second time: after the step ([`Curvature::Step`](crate::Curvature::Step)), or before it at perturbed parameters
    /// ([`Curvature::Hutchinson`](crate::Curvature::Hutchinson)). Returns the first loss, detached from its graph.
    ///
    /// `loss` must compute the same function of the parameters each time: the same batch, the same random numbers.
    /// Draw the batch outside of it, and use [`Dropout`](crate::Dropout), which has the same masks in both calls (random
    /// layers of your own find a seed in [`random::current_seed`]). Before the first measurement `loss` is called
    /// once more, and an error says if the two losses differ ([`ParamsSrkl::repeatable`]).
    ///
    /// `loss` includes the factor [`Srkl::grad_scale`]. The first graph is dropped before the second call.
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
    /// Errors of the closure's own type are passed on, if candle's convert into it, as into `anyhow::Error`.
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
        // Taken out first, so that no step waits for a measurement that has failed.
        if std::mem::take(&mut self.measure_state.awaiting_observe) {
            drop(grads);
            let again = loss().and_then(|loss| Ok(loss.backward()?));
            let observed = again.and_then(|again| Ok(self.measure_step(&again)?));
            observed.inspect_err(|_| self.engine.release(&mut self.all))?;
        }
        Ok(first)
    }

    /// The gradients of the parameters alone, without their graphs: what candle computes them from lives as long
    /// as they do otherwise.
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

    /// The seed of the next step, and until `observe` that of the step that waits for it: what
    /// [`random::with_seed`] is given in both calls of a closure. For loops of your own: compute both losses of a
    /// step that measures inside `with_seed(seed, ..)`, with the seed as it was before `step`.
    ///
    /// It depends on [`Srkl::set_seed`] and the number of the step alone, and on the seed of a
    /// [`random::with_seed`] around the call, if there is one; it goes on from a checkpoint.
    #[must_use]
    pub fn step_seed(&self) -> u64 {
        let waits = self.measure_state.awaiting_observe as u64;
        let outer = random::current_seed().unwrap_or(0);
        random_bits(self.seed, self.measure_state.step_calls - waits, STEP_SEEDS, outer)
    }

    /// Sets what the seeds of steps are made from. 0 unless set; a checkpoint has it.
    pub fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// The names of the parameters that have had no gradient in any step yet, of a graph's replays those that had
    /// none when it was captured.
    ///
    /// A parameter stays there if the loss does not depend on it, or only through an operation that has no
    /// backward pass in candle: the fused `layer_norm`, `rms_norm`, `softmax_last_dim` and `rope` cut the graph
    /// without a word, and so do `candle_nn::LayerNorm` and `RmsNorm` on contiguous input, which use them.
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

    /// Whether the next step measures the curvature: each of the `first` steps, then every `every`-th, skipped ones
    /// counted; after [`Srkl::request_measurement`]; and where there is no estimate to go by. Of
    /// [`Curvature::Step`](crate::Curvature::Step) none whose schedule is 0.
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

    /// Replaces [`ParamsSrkl::measure`] of all groups, from the next step on.
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

    /// Makes the next step one that measures. For those who replay captured steps, which the optimizer does
    /// not see, and which can't measure. (Before replays ask [`Srkl::measuring`] too: it is true where a measurement
    /// has left no estimate.) Without effect where no group measures.
    pub fn request_measurement(&mut self) {
        self.measure_state.requested = true;
    }

    /// Gives up the measurement that the last step waits for; if it waits for none, the one that the next step is
    /// due. Steps go on with the estimate there is; without any, `phi` is 0, and the next step is due one again.
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
    /// No step that waits for it, or what `step` refuses of gradients. It can then be called again. (A parameter
    /// without a second gradient is no error: it is left out of this measurement, and counted.)
    pub fn observe(&mut self, grads_again: &GradStore) -> Result<()> {
        if !self.measure_state.awaiting_observe {
            bail!(
                "`observe`: no step waits for a measurement; call it once after a `step` before which \
                 `measuring()` was true, with `Curvature::Step`"
            )
        }
        self.measure_step(grads_again)?;
        self.measure_state.awaiting_observe = false;
        Ok(())
    }

    fn measure_step(&mut self, again: &GradStore) -> Result<()> {
        let scalars = self.scalars()?;
        let remaining = self.engine.observe(&mut self.all, again, scalars)?;
        self.note_estimates(remaining);
        Ok(())
    }

    /// Perturbs the parameters that have a gradient in `grads`, those of the step to come, for a measurement of
    /// [`Curvature::Hutchinson`](crate::Curvature::Hutchinson), until the guard is dropped.
    ///
    /// # Errors
    ///
    /// Settings that don't ask for it, a measurement that has been taken already, or what `step` refuses of
    /// gradients.
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

    /// Checks that `loss` gives the same loss and the same gradients twice, bit for bit, at the same parameters:
    /// without that a measurement of curvature measures noise. Calls it as [`Srkl::backward_step_with`] does, with
    /// the same seed.
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

    /// How measurements went so far, of the parameter that had most that said something.
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

    /// What a measurement by random vectors is given of the step to come.
    fn probe_step<'g>(&self, grads: &'g GradStore) -> Result<Step<'g>> {
        Ok(Step { grads, scalars: self.scalars()?, measures: false, records: false })
    }

    /// Whether a closure is to be checked before it is measured by.
    fn checks_closures(&self) -> bool {
        let measured = |params: &ParamsSrkl| MeasureSchedule::of(params).is_some();
        let checks =
            |params: &ParamsSrkl| measured(params) && params.repeatable == Repeatable::Check;
        !self.measure_state.checked && self.all.groups.iter().any(|group| checks(&group.params))
    }

    /// Whether the settings perturb parameters.
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

    /// An error if a measurement is due that `step` can't make.
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

/// What an optimizer notes of steps and measurements.
impl Srkl {
    /// Ends a step, taken or skipped, with what its measurement needs, if it has one to come.
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

    /// Notes which blocks have had a gradient, and whether one of them has no estimate of its curvature, though it
    /// is measured: then the next step measures.
    pub(crate) fn note_gradients(&mut self, grads: &GradStore, measures: bool) {
        for block in self.all.blocks.iter_mut().filter(|block| !block.trained) {
            block.trained = grads.get_id(block.id).is_some();
        }
        let all = &self.all;
        let missing = |block: &Block| {
            let measured = !matches!(all.of(block).curvature, Curvature::GradSquare);
            let moves = block.n > 0 && all.of(block).lr > 0. && grads.get_id(block.id).is_some();
            !block.known && measured && moves
        };
        if !measures && self.all.blocks.iter().any(missing) {
            self.measure_state.blind = true;
        }
    }

    /// Notes what a measurement has left of each estimate, of those that it was about, and whether there is one: where
    /// one has been lost, or there is none at all, the next step measures.
    fn note_estimates(&mut self, remaining: Vec<Remaining>) {
        let (mut any, mut lost) = (false, false);
        for (block, (left, known)) in self.all.blocks.iter_mut().zip(remaining) {
            any |= known;
            lost |= left == Some(Left::Lost);
            // A block without a direction has nothing to be measured by, and waits for the next time.
            block.known = known || left == Some(Left::Unchanged);
        }
        self.measure_state.blind = !any || lost;
    }

    /// The same after estimates have been set, or their settings.
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
    /// What `step` refuses of gradients. The parameters are restored, and the estimate is as it was.
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
            // Fails with its device alone.
            let _ = self.restore();
        }
    }
}
