//! [`Srkl`]: parameter groups, and the order of a step.

use std::collections::HashSet;
use std::fmt;
use std::ops::Deref;

use candle_core::backprop::GradStore;
use candle_core::{Error, Result, Tensor, TensorId, Var, bail};
use candle_nn::Optimizer;

use crate::backend::{Step, masters};
use crate::block::{Block, Parameters};
use crate::engine::{Engine, Outcome};
use crate::loss_scale::{Scaling, refuse_unskipped};
use crate::lr_schedule::{LrSchedule, Scheduled};
use crate::micro_batches::{Accumulated, Reduction};
use crate::params::{Above, Group, ParamsSrkl, check, check_grad_scale};
use crate::ranks::{Claim, Ranks, Statement, claim};
use crate::reduce::{given, has_frozen};
use crate::rule::StepScalars;
use crate::schedule::{MeasureSchedule, MeasureState};
use crate::state::refuse_other_state;

/// The name of the group that holds every parameter no other group takes.
pub const DEFAULT_GROUP: &str = "default";

/// The SRKL optimizer: `w <- w - phi * d` with `phi = s * lr / (1 + beta * H)`.
///
/// It is a [`candle_nn::Optimizer`]; [`ParamsSrkl`] has the formula and the settings.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use candle_srkl::{ParamsSrkl, Srkl};
///
/// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::reference())?;
/// let loss = w.sqr()?.sum_all()?;
/// opt.backward_step(&loss)?;
/// assert!(w.sqr()?.sum_all()?.to_scalar::<f32>()? < 14.);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Parameters are stepped in place. They may be f32, f64, bf16 and f16, mixed; gradients may have any of these dtypes
/// and any layout. A parameter without a gradient is left alone: it does not decay either.
///
/// Optimizers share one pool, with as many threads as the rayon pool in which they are built (`RAYON_NUM_THREADS`).
/// An optimizer that steps while another uses the pool waits for it; on a rayon thread it steps without the pool
/// instead. The number of threads does not change the result: see [`numerics`](crate::numerics).
///
/// On a CUDA device a step runs on the stream of candle's [`Device`](candle_core::Device). With `Device::new_cuda`
/// each thread has its own stream, so always step from the one thread that computes the gradients. Work on another
/// stream that reads parameters must wait for this stream first.
pub struct Srkl {
    pub(crate) all: Parameters,
    /// Whether parameters were given without names: each name is then its index in the list.
    pub(crate) by_position: bool,
    /// The multiplier of the next step.
    pub(crate) schedule: f64,
    /// That of the last step, if only a schedule has changed it since then.
    pub(crate) last_schedule: Option<f64>,
    /// What sets it, if not the user.
    pub(crate) lr_schedule: Option<Scheduled>,
    pub(crate) grad_scale: f64,
    /// If the scale follows the gradients.
    pub(crate) scaling: Option<Scaling>,
    /// When curvature is measured, if it is.
    pub(crate) measure_schedule: Option<MeasureSchedule>,
    pub(crate) measure_state: MeasureState,
    /// The base of the step seeds.
    pub(crate) seed: u64,
    /// Whether steps record norms for telemetry.
    pub(crate) records: bool,
    /// Decides steps and counts them, on the host or on a CUDA device.
    pub(crate) engine: Box<dyn Engine>,
    /// The other ranks, if there are any.
    pub(crate) ranks: Option<Box<Ranks>>,
    /// How many micro-batches of this rank the gradients of the last step were summed over.
    pub(crate) step_count: u64,
    pub(crate) accumulated: Accumulated,
    pub(crate) reduction: Reduction,
}

impl Optimizer for Srkl {
    type Config = ParamsSrkl;

    /// An optimizer of `vars` in one group. Each is named by its index in `vars`: "0", "1", ... Sums over all of them
    /// ([`Scope::Global`](crate::Scope::Global), clipping) are added in that order.
    ///
    /// The order of [`VarMap::all_vars`](candle_nn::VarMap::all_vars) differs from run to run. So [`Srkl::load`]
    /// matches parameters of such an optimizer by value, and fails if parameters of equal value have different state.
    /// [`Srkl::from_varmap`] matches them by name.
    ///
    /// # Errors
    ///
    /// As [`SrklBuilder::build`](crate::SrklBuilder::build).
    fn new(vars: Vec<Var>, params: ParamsSrkl) -> Result<Self> {
        let named = vars.into_iter().enumerate().map(|(place, var)| (place.to_string(), var));
        let opt = Self::builder().default_group(params).build(named)?;
        Ok(Self { by_position: true, ..opt })
    }

    /// One step by `grads`.
    ///
    /// # Errors
    ///
    /// In each case parameters and state are as they were (unless a device fails while it works):
    ///
    /// - a gradient that differs from its parameter in shape or device, that is not of f32, f64, bf16 or f16, or that
    ///   shares its memory with a parameter (of several bad gradients any one is named);
    /// - a learning rate that was set to a negative or non-finite number;
    /// - the last step still waits for its measurement, or this step is due one with
    ///   [`Curvature::Hutchinson`](crate::Curvature::Hutchinson) first ([`Srkl::measuring`]);
    /// - on a CUDA device, a variable whose memory was replaced since the optimizer was built;
    /// - in a capture of a CUDA stream, settings that have changed inside the capture, a second step of the
    ///   optimizer, a step that measures, or parameters on several devices.
    ///
    /// # CUDA graphs
    ///
    /// A captured step can be replayed: each replay uses the learning rate and the gradient scale that were set last,
    /// and is counted as a step. The optimizer must outlive the graph. Between two captures it must take a step
    /// outside of a capture. A schedule does not advance in replays: [`Srkl::set_schedule_step`] does it by hand.
    fn step(&mut self, grads: &GradStore) -> Result<()> {
        self.step_by(grads, 1)
    }

    /// One step by the gradient of `loss`.
    ///
    /// # Errors
    ///
    /// Those of [`step`](Self::step); a loss that reaches none of the parameters; a step that measures the curvature,
    /// which needs [`Srkl::backward_step_with`].
    fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        let grads = match self.gradients_alone(loss) {
            Ok(grads) => grads,
            Err(e) => return self.refuse(e),
        };
        self.step(&grads)
    }

    /// The schedule's multiplier in the next step times the `lr` of the default group. If that group is frozen (`lr` 0), the first
    /// group that is not takes its place; 0 if all are.
    fn learning_rate(&self) -> f64 {
        self.schedule * self.base_lr().unwrap_or(0.)
    }

    /// Sets the schedule's multiplier of **every** group to `lr` divided by the `lr` of the default group. If that
    /// group is frozen, the first group that is not takes its place; without effect if all are.
    ///
    /// The multiplier is applied to `phi`, not to [`ParamsSrkl::lr`]: with [`Beta::Tied`] a large
    /// `lr` has no effect on the step, so a schedule of it would have none either.
    ///
    /// The next `step` fails if `lr` is negative or not finite, or if it was set inside a capture of a CUDA stream.
    /// Replays of captured steps then keep the last valid one.
    ///
    /// It takes the place of a schedule that [`Srkl::set_schedule`] has set, which is forgotten: the multiplier stays until it
    /// is set again.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl { lr: 0.1, ..ParamsSrkl::reference() })?;
    /// for step in 0..100 {
    ///     let warm_up = (step as f64 / 10.).min(1.);
    ///     opt.set_learning_rate(0.1 * warm_up);
    ///     opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// [`Beta::Tied`]: crate::Beta::Tied
    fn set_learning_rate(&mut self, lr: f64) {
        if let Some(base) = self.base_lr() {
            self.schedule = lr / base;
            self.last_schedule = None;
            self.lr_schedule = None;
        }
        // What fails here fails again, and is reported, in the next step.
        let _ = self.upload_settings();
    }
}

impl Srkl {
    /// One step by the sum of the gradients of `count` micro-batches.
    pub(crate) fn step_by(&mut self, grads: &GradStore, count: u64) -> Result<()> {
        let local = self.refuse_unmeasured();
        let (grads, scalars) = self.reduced("step", Reduced::Own(grads), count, local)?;
        let grads = &grads;
        let measures = self.measuring() && !self.probes();
        let noted = self.note_skipped(measures);
        self.done(noted)?;
        let step = Step { grads, scalars, measures, records: self.records, steps: 0 };
        #[cfg(feature = "tracing")]
        let skipped = self.skipped_at_hand();
        let outcome = self.engine.step(&mut self.all, step);
        if self.after_sum(outcome, scalars)? == Outcome::Counted {
            self.step_count = count;
            self.after_step(measures, |block| grads.get_id(block.id).is_some())?;
            #[cfg(feature = "tracing")]
            self.emit_step(skipped);
        }
        Ok(())
    }

    /// What follows a step that was taken or skipped.
    fn after_step(&mut self, measures: bool, given: impl Fn(&Block) -> bool) -> Result<()> {
        self.count_step(measures);
        self.note_gradients(given, measures);
        self.advance_schedule();
        if measures { Ok(()) } else { self.step_is_whole() }
    }

    /// [`step`](candle_nn::Optimizer::step) by gradients that are freed in the course of it: on the CPU a few at a time (about a
    /// million elements, or one parameter), each as soon as its parameter is stepped; on CUDA devices when the step has been launched, in
    /// the order of the stream; of several ranks this rank's when they have been added up. With
    /// [`NonFinite::SkipStep`](crate::NonFinite::SkipStep) all are read before the first is freed. What else is in `grads`, and
    /// what is left of the graph, is freed before the step. The bits are those of `step`.
    ///
    /// Only what nothing else holds is freed: gradients that were cloned, or are views of one tensor, stay with their holders.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.1))?;
    /// let loss = w.sqr()?.sum_all()?;
    /// opt.step_consuming(loss.backward()?)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `step`, and a step that measures the curvature, whose gradients are needed until `observe`
    /// ([`Srkl::measuring`]). Parameters and state are as they were; the gradients are gone.
    pub fn step_consuming(&mut self, grads: GradStore) -> Result<()> {
        let local = self.refuse_unmeasured().and_then(|()| {
            if self.measuring() && !self.probes() {
                bail!(
                    "`step_consuming`: this step measures the curvature, and its gradients are needed until \
                     `observe`; use `step` for it, or give the measurement up by `skip_measurement`"
                )
            }
            Ok(())
        });
        let own = self.detached(&grads);
        drop(grads);
        let (reduced, scalars) = self.reduced("step", Reduced::Own(&own), 1, local)?;
        let sum = match reduced {
            Reduced::Sum(sum) => Some(sum),
            Reduced::Own(_) => None,
        };
        // Of several ranks their own gradients are freed here.
        let grads = sum.unwrap_or(own);
        let with_gradient = |block: &&Block| grads.get_id(block.id).is_some();
        let blocks = self.all.blocks.iter();
        let given: HashSet<TensorId> = blocks.filter(with_gradient).map(|b| b.id).collect();
        #[cfg(feature = "tracing")]
        let skipped = self.skipped_at_hand();
        let outcome = self.engine.step_consuming(&mut self.all, grads, scalars, self.records);
        if self.after_sum(outcome, scalars)? == Outcome::Counted {
            self.step_count = 1;
            self.after_step(false, |block| given.contains(&block.id))?;
            #[cfg(feature = "tracing")]
            self.emit_step(skipped);
        }
        Ok(())
    }

    /// The factor that the loss was multiplied by (1 unless set): gradients are divided by it
    /// before everything else.
    #[must_use]
    pub fn grad_scale(&self) -> f64 {
        self.grad_scale
    }

    /// Sets [`Srkl::grad_scale`], for the steps to come. With a [`GradScaler`](crate::GradScaler) it goes on from there.
    ///
    /// The division is folded into the step's coefficient, which is computed in f64 and rounded once.
    /// A power of two, as loss scalers use, changes no bit as long as `phi / grad_scale` is a normal
    /// number of the compute type: in f32 from about 1e-38 on.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::reference())?;
    /// opt.set_grad_scale(1024.)?;
    /// let skipped = opt.skipped_steps()?;
    /// opt.backward_step(&(w.sqr()?.sum_all()? * opt.grad_scale())?)?;
    /// if opt.skipped_steps()? > skipped {
    ///     opt.set_grad_scale(opt.grad_scale() / 2.)?;
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A scale that is not finite and above 0, or whose reciprocal is not finite in f32; a step that waits for its measurement, or
    /// micro-batches that have been [accumulated](Self::accumulate), which need the old scale. The old scale stays.
    pub fn set_grad_scale(&mut self, grad_scale: f64) -> Result<()> {
        check_grad_scale(grad_scale)?;
        self.refuse_pending()?;
        if self.accumulated.count > 0 && grad_scale != self.grad_scale {
            bail!(
                "`grad_scale`: the losses of {} accumulated micro-batches have been multiplied by {}; call \
                 `step_accumulated` or `clear_accumulated` first",
                self.accumulated.count,
                self.grad_scale
            )
        }
        let old = std::mem::replace(&mut self.grad_scale, grad_scale);
        self.upload_settings().inspect_err(|_| self.grad_scale = old)
    }

    /// Sets the multiplier of the learning rate in each step from the next one on, by the number of the step; `None` sets it to
    /// 1 for all. As with [`set_learning_rate`](Optimizer::set_learning_rate), `phi` is multiplied, of **every** group and
    /// after any brake, and [`ParamsSrkl::lr`] stays as it is.
    ///
    /// The schedule's step 0 is the first step of the optimizer: one that is set later, or after [`Srkl::load`], goes on from
    /// the number of the next step. [`Srkl::set_schedule_step`] sets another number; 0 begins anew.
    ///
    /// - Each step counts, also one that [`NonFinite::SkipStep`](crate::NonFinite::SkipStep) skips: the host does not wait for a
    ///   CUDA device to tell. A step that fails does not, nor do captured steps and their replays.
    /// - A measurement of curvature belongs to its step, and is not counted again.
    /// - [`learning_rate`](Optimizer::learning_rate) tells what the next step will use.
    /// - [`Srkl::save`] saves the schedule and its number, and [`Srkl::load`] takes both, or none, from the file.
    /// - All ranks must set the same.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_srkl::{LrSchedule, ParamsSrkl, Srkl};
    /// # use candle_nn::Optimizer;
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    /// opt.set_schedule(Some(LrSchedule::warmup_stable_decay(20, 160, 20, 0.)))?;
    /// for _ in 0..200 {
    ///     opt.backward_step_with(|| w.sqr()?.sum_all())?;
    /// }
    /// assert_eq!(opt.learning_rate(), 0.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A schedule whose settings are out of range, or by which the learning rate of a group would not be finite; in a capture of
    /// a CUDA stream, another multiplier. The old schedule stays.
    pub fn set_schedule(&mut self, schedule: Option<LrSchedule>) -> Result<()> {
        if let Some(schedule) = &schedule {
            schedule.validate()?;
            self.check_schedule(schedule)?;
        }
        let step = self.measure_state.step_calls;
        self.replace_schedule(schedule.map(|schedule| Scheduled { schedule, step }))
    }

    /// The schedule that [`Srkl::set_schedule`] has set, if it has not been taken back.
    #[must_use]
    pub fn schedule(&self) -> Option<&LrSchedule> {
        self.lr_schedule.as_ref().map(|scheduled| &scheduled.schedule)
    }

    /// The number of the next step in the [schedule](Self::schedule); `None` if there is none.
    #[must_use]
    pub fn schedule_step(&self) -> Option<u64> {
        self.lr_schedule.as_ref().map(|scheduled| scheduled.step)
    }

    /// Sets [`Srkl::schedule_step`], from which the schedule goes on: 0 to begin anew, or the next number before each replay of a
    /// captured step.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{LrSchedule, ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w], ParamsSrkl::sgd(1.))?;
    /// opt.set_schedule(Some(LrSchedule::linear_decay(4, 0.)))?;
    /// opt.set_schedule_step(3)?;
    /// assert_eq!(opt.learning_rate(), 0.25);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No schedule; in a capture of a CUDA stream, another multiplier. The old number stays.
    pub fn set_schedule_step(&mut self, step: u64) -> Result<()> {
        let Some(scheduled) = &self.lr_schedule else {
            bail!("`set_schedule_step`: no schedule has been set; call `set_schedule` first")
        };
        self.replace_schedule(Some(Scheduled { step, ..scheduled.clone() }))
    }

    fn replace_schedule(&mut self, scheduled: Option<Scheduled>) -> Result<()> {
        let multiplier = scheduled.as_ref().map_or(1., Scheduled::multiplier);
        let old = std::mem::replace(&mut self.schedule, multiplier);
        self.upload_settings().inspect_err(|_| self.schedule = old)?;
        self.last_schedule = None;
        self.lr_schedule = scheduled;
        Ok(())
    }

    /// An error if a schedule does not fit the learning rate of some group.
    pub(crate) fn check_schedule(&self, schedule: &LrSchedule) -> Result<()> {
        self.all.groups.iter().try_for_each(|group| {
            let checked = schedule.check_lr(group.params.lr);
            checked.map_err(|e| e.context(format!("group `{}`", group.name)))
        })
    }

    /// The multiplier of the last step, or what has been set since then.
    pub(crate) fn multiplier(&self) -> f64 {
        self.last_schedule.unwrap_or(self.schedule)
    }

    /// Goes on to the multiplier of the next step.
    fn advance_schedule(&mut self) {
        self.last_schedule = Some(self.schedule);
        let Some(scheduled) = &mut self.lr_schedule else { return };
        scheduled.step = scheduled.step.saturating_add(1);
        self.schedule = scheduled.multiplier();
        // What fails here fails again, and is reported, in the next step.
        let _ = self.upload_settings();
    }

    /// Steps taken, those skipped not counted.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The number may live on a device.)
    pub fn steps(&self) -> Result<u64> {
        Ok(self.engine.counters()?.steps)
    }

    /// Steps that [`NonFinite::SkipStep`](crate::NonFinite::SkipStep) has skipped.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The number may live on a device.)
    pub fn skipped_steps(&self) -> Result<u64> {
        Ok(self.engine.counters()?.skipped_steps)
    }

    /// The 2-norm over all (unscaled) gradients of the last step, before clipping. `None` where no
    /// group clips, since then it is not computed.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The number may live on a device.)
    pub fn grad_norm(&self) -> Result<Option<f64>> {
        Ok(self.engine.counters()?.grad_norm)
    }

    /// The settings of a group; [`DEFAULT_GROUP`] always exists.
    #[must_use]
    pub fn params(&self, group: &str) -> Option<&ParamsSrkl> {
        self.all.groups.iter().find(|g| g.name == group).map(|g| &g.params)
    }

    /// Replaces the settings of a group, from the next step on.
    ///
    /// # Errors
    ///
    /// The old settings stay in each case:
    ///
    /// - no group of that name, or settings out of range;
    /// - a step that waits for its measurement;
    /// - groups that measure curvature in different ways;
    /// - an `lr` that is not finite times a [schedule](Srkl::set_schedule)'s multiplier, at any step;
    /// - another [`nonfinite`](ParamsSrkl::nonfinite) than `SkipStep` beside a [`GradScaler`](crate::GradScaler);
    /// - settings that need other state than the group was built with: other `master_weights`, `rounding`, `state`
    ///   or `average_format`, another kind of direction, another `bf16` of [`Direction::Muon`](crate::Direction::Muon), an
    ///   average added or removed, or a change to or from [`Curvature::Hutchinson`](crate::Curvature::Hutchinson).
    pub fn set_params(&mut self, group: &str, params: ParamsSrkl) -> Result<()> {
        params.validate()?;
        if self.scaling.is_some() {
            refuse_unskipped(&params)?;
        }
        if let Some(scheduled) = &self.lr_schedule {
            scheduled.schedule.check_lr(params.lr)?;
        }
        self.refuse_pending()?;
        let changed = |g: &Group| g.name == group;
        let others = self.all.groups.iter().filter(|g| !changed(g)).map(|g| &g.params);
        let plan = MeasureSchedule::of_all(others.chain([&params]))?;
        let Some(group) = self.all.groups.iter_mut().find(|g| changed(g)) else {
            bail!("no parameter group `{group}`")
        };
        refuse_other_state(&group.name, &group.params, &params)?;
        let old = group.params.clone();
        let name = group.name.clone();
        // What has not been measured so far is missed in the next step.
        let starts = !MeasureSchedule::measures(&old) && MeasureSchedule::measures(&params);
        let kind = |schedule: Option<MeasureSchedule>| schedule.map(|s| s.probe.is_some());
        let stepped = |block: &Block| {
            let thawed = starts && self.all.groups[block.group].name == name;
            kind(self.measure_schedule) != kind(plan) || thawed
        };
        let stepped: Vec<bool> = self.all.blocks.iter().map(stepped).collect();
        let asks = plan.is_some() && stepped.contains(&true);
        if asks {
            self.engine.refuse_capture("`set_params`")?;
        }
        let estimates = if asks { self.engine.estimates()? } else { vec![] };
        self.set_group(&name, params);
        if let Err(e) = self.upload_settings() {
            self.set_group(&name, old);
            return Err(e);
        }
        self.measure_schedule = plan;
        self.note_stepped(&stepped, estimates);
        Ok(())
    }

    fn set_group(&mut self, name: &str, params: ParamsSrkl) {
        let parts = self.all.groups.iter_mut().filter(|group| group.name == name);
        parts.for_each(|part| part.set(params.clone()));
    }

    /// Updates the masters of parameters that were written outside of the optimizer, for instance by
    /// [`VarMap::load`](candle_nn::VarMap::load).
    ///
    /// With master weights a step computes the new parameter from its master, so a value that was written to the
    /// parameter alone would be lost. This sets every master that does not round to its parameter to the parameter's
    /// value. Without masters it does nothing.
    ///
    /// `step` does so too, but compares only up to 32 evenly spaced elements: if one of them differs, it resets all
    /// masters of the parameter. So it notices a loaded checkpoint, but may miss a change of single elements: call
    /// this after making one.
    ///
    /// With [`MasterWeights::Split`](crate::MasterWeights::Split) a change of other elements than these leaves no trace:
    /// the changed parameter keeps the remainder of the old one, at most half a unit in its own last place, unless it would
    /// round to a neighbour with it.
    ///
    /// # Errors
    ///
    /// None on the CPU. (A copy from or to a device can fail.)
    pub fn sync_master(&mut self) -> Result<()> {
        let Some(ranks) = self.sharding_ranks().cloned() else {
            return self.all.blocks.iter_mut().try_for_each(|block| masters::sync(block, None));
        };
        let overwritten = self.all.blocks.iter().map(masters::is_overwritten).collect();
        let statement = |own: &Vec<bool>| {
            let claims = vec![claim("what is called", "sync_master")];
            Ok(Statement { claims, own: own.iter().map(|own| *own as u8).collect() })
        };
        let (_, stated) = ranks.agree_on(overwritten, statement)?;
        for (place, block) in self.all.blocks.iter_mut().enumerate() {
            let any = stated.iter().any(|own| own.get(place) == Some(&1));
            ranks.or_abort(masters::sync(block, Some(any)))?;
        }
        Ok(())
    }

    /// A copy of the f32 master weights of a parameter, by any of its names, in the order of its elements.
    /// `None` for a parameter without a master, or an unknown name. If state is sharded, all ranks must call it.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The master may live on a device, or on other ranks.)
    pub fn master(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let block = self.all.blocks.iter().find(|block| block.is_named(name));
        let own = block.map_or(Ok(None), masters::values);
        let Some(ranks) = self.sharding_ranks() else { return own };
        let own = self.agree_on("master", own, |own, _| {
            Ok(vec![
                claim("the parameter whose master is asked for", name),
                claim("has one", own.is_some()),
            ])
        })?;
        let Some((block, own)) = block.zip(own) else { return Ok(None) };
        ranks.or_abort(ranks.gather_masters(block, own)).map(Some)
    }

    /// Sends changed settings to the engine, so that replays of captured steps use them.
    pub(crate) fn upload_settings(&mut self) -> Result<()> {
        let scalars = self.of_replays(self.scalars()?);
        self.engine.upload_settings(&self.all, scalars)
    }

    /// The `lr` that learning rates are relative to: of the first group that is not frozen.
    pub(crate) fn base_lr(&self) -> Option<f64> {
        self.all.groups.iter().map(|group| group.params.lr).find(|lr| *lr > 0.)
    }

    /// The gradients of a loss that is computed once.
    fn gradients_alone(&self, loss: &Tensor) -> Result<GradStore> {
        if self.measuring() {
            bail!(
                "`backward_step`: this step measures the curvature, for which the loss must be computed \
                 twice; use `backward_step_with(|| loss)`, or the pieces that `measuring` describes"
            )
        }
        let grads = loss.backward()?;
        self.refuse_unreached(&grads)?;
        Ok(grads)
    }

    /// The number of this rank; 0 if there is only one.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.ranks.as_ref().map_or(0, |ranks| ranks.rank)
    }

    /// How many ranks step together: see [`SrklBuilder::collective`](crate::SrklBuilder::collective).
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.ranks.as_ref().map_or(1, |ranks| ranks.world_size)
    }

    /// The ranks, if each keeps the state of its shard alone.
    pub(crate) fn sharding_ranks(&self) -> Option<&Ranks> {
        self.ranks.as_deref().filter(|ranks| ranks.sharded)
    }

    /// `local`, if no rank has an error, and all make this call with the same claims. Without other ranks nothing is claimed.
    pub(crate) fn agree_on<T>(
        &self,
        call: &str,
        local: Result<T>,
        claims: impl FnOnce(&T, &[Block]) -> Result<Vec<Claim>>,
    ) -> Result<T> {
        let Some(ranks) = &self.ranks else { return local };
        let blocks = &self.all.blocks;
        let statement = |local: &T| {
            let call = claim("what is called", call);
            let claims = [call].into_iter().chain(claims(local, blocks)?).collect();
            Ok(Statement { claims, ..Statement::default() })
        };
        Ok(ranks.agree_on(local, statement)?.0)
    }

    /// What an engine has done after all ranks have agreed on it: if it has failed on one, all are told.
    pub(crate) fn done<T>(&self, done: Result<T>) -> Result<T> {
        match &self.ranks {
            Some(ranks) => ranks.or_abort(done),
            None => done,
        }
    }

    /// An error of this rank, which the others are told of.
    pub(crate) fn refuse<T>(&mut self, e: Error) -> Result<T> {
        match &self.ranks {
            Some(ranks) => ranks.agree(Err(e)).and_then(|_| bail!("no rank has failed")),
            None => Err(e),
        }
    }

    /// The gradients of all ranks, each the sum over `count` micro-batches, and the numbers of a step by their mean, or sum. `local` is
    /// what this rank has found so far.
    ///
    /// # Errors
    ///
    /// What is wrong on any rank, or differs between them: the same error on all.
    pub(crate) fn reduced<'g>(
        &mut self,
        call: &str,
        grads: Reduced<'g>,
        count: u64,
        local: Result<()>,
    ) -> Result<(Reduced<'g>, StepScalars)> {
        let scalars = local.and_then(|()| self.scalars());
        let (measuring, probes, reduction) = (self.measuring(), self.probes(), self.reduction);
        let Self { all, ranks, measure_state, seed, engine, records, scaling, .. } = self;
        // The sum over micro-batches is scaled as the loss is: their mean takes no operation on elements.
        let of_sum = |scalars: StepScalars, count: u64| {
            let grad_scale = scalars.grad_scale * reduction.divisor(count);
            StepScalars { grad_scale, ..scalars }
        };
        let Some(ranks) = ranks else { return Ok((grads, of_sum(scalars?, count))) };
        let checked = scalars.and_then(|scalars| {
            for block in all.blocks.iter().filter(|block| all.of(block).lr != 0.) {
                grads.get_id(block.id).map_or(Ok(()), |gradient| block.check_gradient(gradient))?;
            }
            let step = Step {
                grads: &grads,
                scalars: of_sum(scalars, count * ranks.world_size as u64),
                measures: call != "step" || measuring && !probes,
                records: *records,
                steps: 0,
            };
            Ok((scalars, engine.check_ready(all, step, ranks.by_device)?))
        });
        let statement = |(scalars, captured): &(StepScalars, bool)| {
            let numbers = [
                claim("what is called", call),
                claim("the number of micro-batches", count),
                claim("the reduction", format!("{reduction:?}")),
                claim("the number of steps before", measure_state.step_calls),
                claim("whether this step measures", measuring),
                claim("whether norms are recorded", *records && ranks.sharded),
                claim("whether a CUDA stream is captured", captured),
                claim("the learning rate's multiplier", scalars.schedule),
                claim("the gradient scale", scalars.grad_scale),
                claim("the scaler of it", format!("{:?}", scaling.map(|scaling| scaling.scaler))),
                claim("the seed", *seed),
                claim("the number of random vectors before", measure_state.probe_count),
            ];
            let claims = numbers.into_iter().chain(all.groups.iter().map(settings)).collect();
            Ok(Statement { claims, own: given(all, &grads) })
        };
        let ((scalars, _), stated) = ranks.agree_on(checked, statement)?;
        let sum = ranks.sum(&all.blocks, &grads, &stated)?;
        let total = count * ranks.world_size as u64;
        if call == "step" {
            for (place, block) in all.blocks.iter_mut().enumerate() {
                block.trained |= has_frozen(&stated, place);
            }
        }
        Ok((Reduced::Sum(sum), of_sum(scalars, total)))
    }

    /// What the engine has done by the scalars of a sum. Replays of captured steps get their own then.
    pub(crate) fn after_sum<T>(&mut self, done: Result<T>, scalars: StepScalars) -> Result<T> {
        let own = StepScalars { grad_scale: self.grad_scale, ..scalars };
        let same = scalars == self.of_replays(own);
        let after = if same { Ok(()) } else { self.upload_settings() };
        self.done(done.and_then(|done| after.map(|()| done)))
    }

    /// The scalars of captured steps, each of one micro-batch of each rank.
    fn of_replays(&self, scalars: StepScalars) -> StepScalars {
        let divisor = self.reduction.divisor(self.world_size() as u64);
        StepScalars { grad_scale: scalars.grad_scale * divisor, ..scalars }
    }

    pub(crate) fn scalars(&self) -> Result<StepScalars> {
        for group in &self.all.groups {
            let lr = self.schedule * group.params.lr;
            check("learning rate", lr, Above::OrZero)
                .map_err(|e| e.context(format!("group `{}`", group.name)))?;
        }
        Ok(StepScalars { schedule: self.schedule, grad_scale: self.grad_scale })
    }
}

/// What all ranks must set alike.
pub(crate) fn settings(group: &Group) -> Claim {
    claim(format!("the settings of group `{}`", group.name), format!("{:?}", group.params))
}

/// The gradients of a step.
#[derive(Debug)]
pub(crate) enum Reduced<'g> {
    /// Those that were given.
    Own(&'g GradStore),
    /// A sum over micro-batches.
    Sum(GradStore),
}

impl Deref for Reduced<'_> {
    type Target = GradStore;

    fn deref(&self) -> &GradStore {
        match self {
            Self::Own(grads) => grads,
            Self::Sum(grads) => grads,
        }
    }
}

/// Without the counters if a CUDA device has them: logging must not wait for it.
impl fmt::Debug for Srkl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counters = self.engine.counters_at_hand();
        f.debug_struct("Srkl")
            .field(
                "groups",
                &self
                    .all
                    .groups
                    .iter()
                    .filter(|group| !group.beside_muon && !group.frozen)
                    .map(|group| (&group.name, &group.params))
                    .collect::<Vec<_>>(),
            )
            .field("parameters", &self.all.blocks.len())
            .field("learning_rate", &self.learning_rate())
            .field("grad_scale", &self.grad_scale)
            .field("steps", &counters.map(|counters| counters.steps))
            .field("skipped_steps", &counters.map(|counters| counters.skipped_steps))
            .finish_non_exhaustive()
    }
}
