//! [`Srkl`]: parameter groups, and the order of a step.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::Optimizer;

use crate::backend::cpu::{self, Asked};
use crate::backend::cuda::Cuda;
use crate::backend::pool::Pool;
use crate::backend::simd::Simd;
use crate::backend::stages::{Found, Stages};
use crate::backend::{Inputs, StepOptions, masters, replace};
use crate::block::{Block, STATE, has_state};
use crate::estimate::{Averaging, Estimate, Left, Measured, Probe};
use crate::numerics::{Pair, Sums};
use crate::params::{
    Above, Curvature, Group, NonFinite, ParamsSrkl, Scope, check, check_grad_scale,
};
use crate::rule::{self, Decision, Directions, Powers, StepScalars};
use crate::schedule::{MeasureSchedule, MeasureState, Pending};

/// The name of the group of every parameter that no other group takes.
pub const DEFAULT_GROUP: &str = "default";

/// Blocks that need not wait for the whole list are taken in runs of about this many elements, so
/// that a gradient is still in the caches when it is read again.
const RUN: usize = 1 << 20;

/// Below this much work, in elements, a step is done sooner than another thread has woken up.
pub(crate) const PARALLEL_WORK: usize = cpu::PIECE;

/// The work of a block beside that of its elements, in elements.
pub(crate) const BLOCK_WORK: usize = 256;

/// The SRKL optimizer: `w <- w - phi * d` with `phi = lr / (1 + beta * H)`.
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
/// Parameters are stepped in place, in f32, f64, bf16 and f16 and mixed; their gradients may be of
/// any of these dtypes and of any layout. A parameter without a gradient is left alone, without
/// decay. Work is spread over threads that all optimizers share, as many as the rayon pool has that it
/// is built in (`RAYON_NUM_THREADS`); one that steps at the same time as another waits for them, or, on a
/// thread of rayon, does without. The result does not depend on their number: see
/// [`numerics`](crate::numerics).
///
/// On a CUDA device a step goes to the stream of candle's [`Device`](candle_core::Device), which for
/// `Device::new_cuda` is one of each thread: step from the thread that computes the gradients, and
/// always from the same one. Whoever reads parameters on another stream waits for this one first.
pub struct Srkl {
    pub(crate) groups: Vec<Group>,
    pub(crate) blocks: Vec<Block>,
    /// Whether parameters came without names, which are their places in a list then.
    pub(crate) by_position: bool,
    /// Where each variable's storage is, sorted: a gradient must not be one of them.
    pub(crate) storages: Arc<[usize]>,
    pub(crate) schedule: f64,
    pub(crate) grad_scale: f64,
    pub(crate) steps: u64,
    pub(crate) skipped_steps: u64,
    /// When curvature is measured, if it is.
    pub(crate) plan: Option<MeasureSchedule>,
    pub(crate) progress: MeasureState,
    /// What the seeds of steps are made from.
    pub(crate) seed: u64,
    /// Whether steps record norms for telemetry.
    pub(crate) records: bool,
    pub(crate) grad_norm: Option<f64>,
    pub(crate) simd: Simd,
    /// The threads of all optimizers, if there is enough work for them. Not those of rayon's global
    /// pool: candle computes there, holding locks of tensors that a step waits for.
    pub(crate) pool: Option<Arc<Pool>>,
    /// The CUDA devices that parameters are on.
    pub(crate) cuda: Vec<Cuda>,
}

impl Optimizer for Srkl {
    type Config = ParamsSrkl;

    /// An optimizer of `vars` in one group. Their names are their places in `vars`: "0", "1", ... and sums
    /// over all of them ([`Scope::Global`], clipping) are added in that order.
    ///
    /// The order of [`VarMap::all_vars`](candle_nn::VarMap::all_vars) differs from run to run. So [`Srkl::load`] tells parameters by their
    /// values, and refuses equal ones whose state differs; [`Srkl::from_varmap`] goes by name.
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
    /// A gradient that differs from its parameter in shape or device, that is not of f32, f64, bf16
    /// or f16, or that shares its memory with a parameter; a learning rate that was set to a
    /// negative or non-finite number. Parameters and state are then as they were. (Of several bad
    /// gradients any one is named. A device that fails while it works is the exception.)
    ///
    /// On a CUDA device also: a variable whose memory was replaced since the optimizer was built, and
    /// in a capture of its stream, settings that have changed inside it, a second step of the
    /// optimizer, or parameters on several devices.
    ///
    /// # CUDA graphs
    ///
    /// A captured step can be replayed: it reads the learning rate and the gradient scale that were
    /// set last, and counts. The optimizer must live as long as the graph. After a capture it takes a
    /// step outside of one before the next.
    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let scalars = self.scalars()?;
        self.refuse_unmeasured()?;
        let measures = self.measuring() && !self.probes();
        if self.decides_on_device() {
            let options = StepOptions { measures, records: self.records };
            let Self { cuda, blocks, storages, groups, .. } = self;
            let inputs = Inputs { blocks, storages, groups, grads, scalars };
            if cuda[0].step(&inputs, options)? {
                return Ok(()); // Captured, not taken.
            }
            self.count_attempt(measures.then(Vec::new));
        } else {
            self.step_all(grads, scalars, measures)?;
        }
        self.note_gradients(grads, measures);
        Ok(())
    }

    /// One step by the gradient of `loss`.
    ///
    /// # Errors
    ///
    /// Those of [`step`](Self::step), a loss that reaches none of the parameters, and a step that measures the
    /// curvature, for which it takes [`Srkl::backward_step_with`].
    fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        if self.measuring() {
            bail!(
                "`backward_step`: this step measures the curvature, for which the loss must be computed \
                 twice; use `backward_step_with(|| loss)`, or the pieces that `measuring` describes"
            )
        }
        let grads = loss.backward()?;
        self.refuse_unreached(&grads)?;
        self.step(&grads)
    }

    /// The schedule's multiplier times the `lr` of the default group (of the first group that is not frozen, if
    /// that one is, by an `lr` of 0).
    fn learning_rate(&self) -> f64 {
        self.schedule * self.base_lr().unwrap_or(0.)
    }

    /// Sets the schedule's multiplier of **every** group to `lr` over the `lr` of the default group (of the first
    /// group that is not frozen, if that one is; without effect if all are).
    ///
    /// The multiplier is applied to `phi`, not to [`ParamsSrkl::lr`]: with [`Beta::Tied`] a large
    /// `lr` has no effect on the step, so a schedule of it would have none either.
    ///
    /// A negative or non-finite `lr` makes the next `step` fail, and so does one that is set inside a
    /// capture of a CUDA stream. Replays of captured steps go on with the last one that was neither.
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
        }
        // What fails here fails again, and is reported, in the next step.
        let _ = self.send_settings();
    }
}

impl Srkl {
    /// The factor that the loss was multiplied by (1 unless set): gradients are divided by it
    /// before everything else.
    pub fn grad_scale(&self) -> f64 {
        self.grad_scale
    }

    /// Sets [`Srkl::grad_scale`], for the steps to come.
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
    /// A scale that is not finite and above 0, or whose reciprocal is not finite, or a step that waits for its
    /// measurement, which is of the old scale. The old one stays.
    pub fn set_grad_scale(&mut self, grad_scale: f64) -> Result<()> {
        check_grad_scale(grad_scale)?;
        self.refuse_pending()?;
        let old = std::mem::replace(&mut self.grad_scale, grad_scale);
        self.send_settings().inspect_err(|_| self.grad_scale = old)
    }

    /// Steps taken, those skipped not counted.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The number may live on a device.)
    pub fn steps(&self) -> Result<u64> {
        if self.decides_on_device() {
            return Ok(self.cuda[0].counters()?.steps);
        }
        Ok(self.steps)
    }

    /// Steps that [`NonFinite::SkipStep`] has skipped.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The number may live on a device.)
    pub fn skipped_steps(&self) -> Result<u64> {
        if self.decides_on_device() {
            return Ok(self.cuda[0].counters()?.skipped_steps);
        }
        Ok(self.skipped_steps)
    }

    /// The 2-norm over all (unscaled) gradients of the last step, before clipping. `None` where no
    /// group clips, since then it is not computed.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The number may live on a device.)
    pub fn grad_norm(&self) -> Result<Option<f64>> {
        if self.decides_on_device() {
            return Ok(self.cuda[0].counters()?.grad_norm);
        }
        Ok(self.grad_norm)
    }

    /// The settings of a group; [`DEFAULT_GROUP`] always exists.
    pub fn params(&self, group: &str) -> Option<&ParamsSrkl> {
        self.groups.iter().find(|g| g.name == group).map(|g| &g.params)
    }

    /// Replaces the settings of a group, from the next step on.
    ///
    /// # Errors
    ///
    /// No group of that name, a step that waits for its measurement, settings out of range, groups that measure the curvature but not alike, or
    /// settings that need other state than it was built with: another choice of `master_weights`, another
    /// kind of direction, with or without an average. The old settings stay.
    pub fn set_params(&mut self, group: &str, params: ParamsSrkl) -> Result<()> {
        params.validate()?;
        self.refuse_pending()?;
        let changed = |g: &Group| g.name == group;
        let others = self.groups.iter().filter(|g| !changed(g)).map(|g| &g.params);
        let plan = MeasureSchedule::of_all(others.chain([&params]))?;
        let Some(group) = self.groups.iter_mut().find(|g| changed(g)) else {
            bail!("no parameter group `{group}`")
        };
        for name in STATE {
            let (had, has) = (has_state(&group.params, name), has_state(&params, name));
            if had != has {
                let expected = if had { "settings that keep" } else { "settings without" };
                bail!(
                    "group `{}`: expected {expected} the state `{name}`, as it was built, got {params:?}",
                    group.name
                )
            }
        }
        if group.params.master_weights != params.master_weights {
            bail!(
                "`master_weights` of group `{}`: expected {:?} as it was built, got {:?}",
                group.name,
                group.params.master_weights,
                params.master_weights
            )
        }
        let old = std::mem::replace(&mut group.params, params);
        let name = group.name.clone();
        if let Err(e) = self.send_settings() {
            let group = self.groups.iter_mut().find(|g| g.name == name);
            group.into_iter().for_each(|group| group.params = old.clone());
            return Err(e);
        }
        let had = std::mem::replace(&mut self.plan, plan);
        // What has not been measured so far is missed in the next step.
        if had == self.plan { Ok(()) } else { self.recall_estimates() }
    }

    /// Takes over parameters that somebody else has written, for instance by [`VarMap::load`](candle_nn::VarMap::load).
    ///
    /// With master weights a step computes the new parameter from its master, so a value written
    /// to the parameter alone would be lost. This gives every master whose parameter is not what
    /// it rounds to the parameter's value. Without masters there is nothing to do.
    ///
    /// `step` looks at up to 32 evenly spaced elements of a parameter, and if one of them is not what
    /// its master rounds to, takes over the whole parameter. So a loaded checkpoint is noticed, but a
    /// change of single elements may not be: call this after making one.
    ///
    /// # Errors
    ///
    /// None on the CPU. (A copy from or to a device can fail.)
    pub fn sync_master(&mut self) -> Result<()> {
        for block in &mut self.blocks {
            masters::sync(block)?;
        }
        Ok(())
    }

    /// A copy of the f32 master weights of a parameter, by any of its names, in the order of its elements.
    /// `None` for a parameter without a master, or an unknown name.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The master may live on a device.)
    pub fn master(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let is_it = |block: &&Block| block.name == name || block.tied.iter().any(|t| t == name);
        let block = self.blocks.iter().find(is_it);
        block.map_or(Ok(None), Block::master_values)
    }

    /// Sets the counters, of the optimizer and (in the order of blocks) of each block; the last step is
    /// forgotten.
    pub(crate) fn set_counters(
        &mut self,
        steps: u64,
        skipped_steps: u64,
        skipped: &[u64],
    ) -> Result<()> {
        self.forget_kept();
        (self.steps, self.skipped_steps, self.grad_norm) = (steps, skipped_steps, None);
        for (block, &skipped) in self.blocks.iter_mut().zip(skipped) {
            (block.skipped, block.last) = (skipped, None);
        }
        match self.decides_on_device() {
            true => self.cuda[0].set_counters(steps, skipped_steps, &self.blocks),
            false => self.send_known(),
        }?;
        self.recall_estimates()
    }

    /// Whether all parameters are on one CUDA device: then a step is decided there, without waiting, and
    /// its counters are there too.
    pub(crate) fn decides_on_device(&self) -> bool {
        matches!(&self.cuda[..], [cuda] if cuda.decides())
    }

    /// Tells the devices of settings that have changed, for replays of captured steps: they find there what
    /// was set last.
    pub(crate) fn send_settings(&mut self) -> Result<()> {
        let scalars = self.scalars()?;
        self.cuda.iter_mut().try_for_each(|cuda| cuda.set(&self.groups, scalars))
    }

    /// Tells devices that don't decide what the host knows of their blocks.
    fn send_known(&mut self) -> Result<()> {
        self.cuda.iter_mut().try_for_each(|cuda| cuda.send_known(&self.blocks))
    }

    // -- The order of a step, and its stages --

    fn step_all(&mut self, grads: &GradStore, scalars: StepScalars, measures: bool) -> Result<()> {
        let stages = self.stages();
        let records = self.records;
        let runs = self.runs(measures);
        // Devices work while the CPU does.
        for cuda in &mut self.cuda {
            let (blocks, storages, groups) = (&self.blocks, &self.storages, &self.groups);
            let inputs = Inputs { blocks, storages, groups, grads, scalars };
            cuda.statistics(&inputs, records)?;
        }
        if runs.len() > 1 {
            // Whatever can be wrong with a later run is found before the first one is updated.
            stages.check(&self.blocks, grads)?;
        }
        let asked =
            match (self.uses(ParamsSrkl::uses_norm) || records, self.uses(ParamsSrkl::uses_sum4)) {
                (true, _) => Asked::Both,
                (false, true) => Asked::Sum4,
                (false, false) => Asked::Finite,
            };
        let mut pending = measures.then(|| vec![None; self.blocks.len()]);
        let mut skipped = false;
        for run in runs {
            let mut gradients = match self.uses(ParamsSrkl::uses_sums) || records {
                true => stages.statistics(&self.blocks[run.clone()], grads, asked)?,
                false => stages.check(&self.blocks[run.clone()], grads)?,
            };
            for cuda in &self.cuda {
                for (place, sums) in cuda.found()? {
                    gradients[place] = Found::on_device(&self.blocks[place], grads, sums);
                }
            }
            let Some(mut decisions) = self.decide(run.clone(), &gradients, scalars) else {
                // Only a run of all blocks has a group that skips steps, so nothing has moved.
                self.blocks.iter_mut().for_each(|block| block.last = None);
                skipped = true;
                break;
            };
            if measures || self.uses(|params| params.trust.is_some()) {
                self.adjust(&stages, run.clone(), &gradients, &mut decisions, scalars, measures)?;
            }
            for cuda in &mut self.cuda {
                cuda.send_decisions(&decisions, &self.blocks, &self.groups)?;
            }
            for cuda in &mut self.cuda {
                cuda.update(StepOptions { measures, records })?;
            }
            let blocks = &mut self.blocks[run];
            if let Some(pending) = &mut pending {
                for (i, block) in blocks.iter().enumerate() {
                    let params = &self.groups[block.group].params;
                    let by_step = params.measures_steps();
                    if let (true, Some(found), Some(_)) = (by_step, gradients[i], decisions[i]) {
                        pending[i] = Some(found.gradient.detach());
                    }
                }
            }
            let options = (StepOptions { measures, records }, scalars.grad_scale);
            stages.update(blocks, &gradients, &decisions, &self.groups, options)?;
        }
        if !measures {
            self.cuda.iter_mut().for_each(Cuda::forget);
        }
        *(if skipped { &mut self.skipped_steps } else { &mut self.steps }) += 1;
        self.count_attempt(pending);
        Ok(())
    }

    /// Ends a step, taken or skipped, with what its measurement needs, if it has one to come.
    fn count_attempt(&mut self, pending: Option<Pending>) {
        let progress = &mut self.progress;
        progress.step_calls += 1;
        if pending.is_some() || progress.measured {
            progress.asked += 1;
            progress.requested = false;
        }
        progress.measured = false;
        progress.pending = pending;
    }

    /// Notes which blocks have had a gradient, and whether one of them has no estimate of its curvature, though it
    /// is measured: then the next step measures.
    fn note_gradients(&mut self, grads: &GradStore, measures: bool) {
        for block in self.blocks.iter_mut().filter(|block| !block.trained) {
            block.trained = grads.get_id(block.id).is_some();
        }
        let group = |block: &Block| &self.groups[block.group].params;
        let missing = |block: &Block| {
            let measured = !matches!(group(block).curvature, Curvature::GradSquare);
            let moves = block.n > 0 && group(block).lr > 0. && grads.get_id(block.id).is_some();
            !block.known && measured && moves
        };
        if !measures && self.blocks.iter().any(missing) {
            self.progress.blind = true;
        }
    }

    /// Notes what a measurement has left of each estimate, of those that it was about, and whether there is one: where
    /// one has been lost, or there is none at all, the next step measures.
    fn note_estimates(&mut self, left: impl IntoIterator<Item = (Option<Left>, bool)>) {
        let (mut any, mut lost) = (false, false);
        for (block, (left, known)) in self.blocks.iter_mut().zip(left) {
            any |= known;
            lost |= left == Some(Left::Lost);
            // A block without a direction has nothing to be measured by, and waits for the next time.
            block.known = known || left == Some(Left::AsItWas);
        }
        self.progress.blind = !any || lost;
    }

    /// The same, of estimates on the host.
    fn note_own_estimates(&mut self, left: Vec<Option<Left>>) {
        let known: Vec<bool> = self.blocks.iter().map(|block| block.estimate.is_known()).collect();
        self.note_estimates(left.into_iter().zip(known))
    }

    /// The same after estimates have been set, or their settings.
    pub(crate) fn recall_estimates(&mut self) -> Result<()> {
        if self.plan.is_none() {
            return Ok(());
        }
        let estimates = self.estimates()?;
        for (block, estimate) in self.blocks.iter_mut().zip(estimates) {
            block.known = estimate.is_known();
        }
        self.progress.blind |= !self.blocks.iter().any(|block| block.known);
        Ok(())
    }

    /// The `lr` that learning rates are relative to: of the first group that is not frozen.
    fn base_lr(&self) -> Option<f64> {
        self.groups.iter().map(|group| group.params.lr).find(|lr| *lr > 0.)
    }

    fn stages(&self) -> Stages {
        Stages {
            simd: self.simd,
            pool: self.pool.clone(),
            storages: self.storages.clone(),
            frozen: self.groups.iter().map(|group| group.params.lr == 0.).collect(),
        }
    }

    pub(crate) fn scalars(&self) -> Result<StepScalars> {
        for group in &self.groups {
            let lr = self.schedule * group.params.lr;
            check("learning rate", lr, Above::OrZero)
                .map_err(|e| e.context(format!("group `{}`", group.name)))?;
        }
        Ok(StepScalars { schedule: self.schedule, grad_scale: self.grad_scale })
    }

    /// Whether something holds for any group.
    fn uses(&self, holds: impl Fn(&ParamsSrkl) -> bool) -> bool {
        self.groups.iter().any(|group| holds(&group.params))
    }

    fn params_of(&self, block: &Block) -> &ParamsSrkl {
        &self.groups[block.group].params
    }

    /// The parts of the list that are stepped one after the other: everything at once where a
    /// decision needs the statistics of all blocks.
    fn runs(&self, measures: bool) -> Vec<Range<usize>> {
        let whole = self.uses(ParamsSrkl::waits_for_all) || measures || !self.cuda.is_empty();
        let (mut runs, mut start, mut elements) = (vec![], 0, 0);
        for (i, block) in self.blocks.iter().enumerate() {
            elements += block.n;
            if i + 1 == self.blocks.len() || elements >= RUN && !whole {
                runs.push(start..i + 1);
                (start, elements) = (i + 1, 0);
            }
        }
        runs
    }

    /// Stage 2: the numbers of each block's step, `None` for a block that is not stepped; or `None`
    /// if the whole step is skipped.
    fn decide(
        &mut self,
        run: Range<usize>,
        gradients: &[Option<Found>],
        scalars: StepScalars,
    ) -> Option<Vec<Option<Decision>>> {
        let blocks = &self.blocks[run];
        let total = if self.uses(ParamsSrkl::uses_total) {
            let counts = |block, found: &Found| {
                let skips_block = self.params_of(block).nonfinite == NonFinite::SkipBlock;
                found.sums.curvature(1. / scalars.grad_scale).is_finite() || !skips_block
            };
            let in_total = blocks.iter().zip(gradients).map(|(block, found)| match found {
                Some(found) if counts(block, found) => found.sums,
                _ => Sums::ZERO,
            });
            Sums::fold(&in_total.collect::<Vec<_>>())
        } else {
            Sums::ZERO
        };
        self.grad_norm =
            self.uses(ParamsSrkl::uses_norm).then(|| total.norm(1. / scalars.grad_scale));

        let mut decisions = Vec::with_capacity(blocks.len());
        for (block, found) in blocks.iter().zip(gradients) {
            let params = self.params_of(block);
            let decision = found.map(|Found { sums, .. }| {
                rule::decide(params, scalars, &sums, &total, &block.estimate)
            });
            match decision {
                Some(decision) if !rule::may_step(&decision, params.nonfinite) => {
                    if params.nonfinite == NonFinite::SkipStep {
                        return None;
                    }
                    decisions.push(None);
                }
                decision => decisions.push(decision),
            }
        }
        Some(decisions)
    }

    /// Stage 2 where it needs the directions of all blocks of a run.
    fn adjust(
        &mut self,
        stages: &Stages,
        run: Range<usize>,
        gradients: &[Option<Found>],
        decisions: &mut [Option<Decision>],
        scalars: StepScalars,
        measures: bool,
    ) -> Result<()> {
        let Self { blocks, groups, cuda, .. } = self;
        for cuda in cuda.iter_mut() {
            cuda.send_decisions(decisions, blocks, groups)?;
            cuda.directions(measures)?;
        }
        let blocks = &mut blocks[run];
        let by_step = |block: &Block| groups[block.group].params.measures_steps();
        let small = |block: &Block, decision: &Decision| {
            measures && by_step(block) && !rule::is_known(decision)
        };
        // A small step goes by the directions of all.
        let any = blocks.iter().zip(&*decisions);
        let any_small = any.filter_map(|(b, d)| d.as_ref().map(|d| small(b, d))).any(|small| small);
        let needs = |block: &Block| {
            any_small && by_step(block) || groups[block.group].params.trust.is_some()
        };
        let all = blocks.iter().zip(gradients).zip(&*decisions);
        let given = all.map(|((block, found), decision)| {
            let both = ((*found)?, (*decision)?);
            needs(block).then_some(both)
        });
        let given: Vec<_> = given.collect();
        let mut pairs = stages.each(blocks, &given, |scratch, block, (found, decision)| {
            let params = &groups[block.group].params;
            cpu::directions(block, found.gradient, params, decision, stages.simd, scratch)
        })?;
        add_pairs(cuda, &mut pairs, |place| given[place].is_some())?;
        let counted = |(block, pair): (&Block, &Option<Pair>)| pair.filter(|_| by_step(block));
        let moving: Vec<Option<Pair>> = blocks.iter().zip(&pairs).map(counted).collect();
        let sizes = blocks.iter().zip(&moving).filter(|(_, pair)| pair.is_some());
        let total_n = sizes.map(|(block, _)| block.n as u64).sum::<u64>() as f64;
        let total = Pair::fold(&moving.iter().map(|p| p.unwrap_or(Pair::ZERO)).collect::<Vec<_>>());
        for ((block, decision), own) in blocks.iter().zip(decisions).zip(pairs) {
            if let (Some(decision), Some(own)) = (decision, own) {
                let directions = Directions { own, n: block.n as f64, total, total_n };
                let params = &groups[block.group].params;
                let still = block.estimate.still;
                rule::adjust(decision, params, scalars, &directions, still, measures);
            }
        }
        Ok(())
    }

    // -- Measured curvature, and what stands in for parameters --

    /// Takes the measurement of the last step.
    pub(crate) fn observe_pending(&mut self, pending: Pending, again: &GradStore) -> Result<()> {
        let scalars = self.scalars()?;
        if self.decides_on_device() {
            let Self { cuda, blocks, storages, groups, .. } = self;
            let inputs = Inputs { blocks, storages, groups, grads: again, scalars };
            cuda[0].observe(&inputs)?;
            cuda[0].forget();
            let left = self.cuda[0].left()?;
            self.note_estimates(left);
            return Ok(());
        }
        let stages = self.stages();
        let given = self.both_gradients(
            &stages,
            |i, _| pending[i].as_ref(),
            again,
            |block| block.grad_factor,
        )?;
        let now = self.steps + self.skipped_steps;
        let Self { cuda, blocks, storages, groups, .. } = self;
        for cuda in cuda.iter_mut() {
            let inputs = Inputs { blocks, storages, groups, grads: again, scalars };
            cuda.observe(&inputs)?;
        }
        let mut changes = stages.each(blocks, &given, |scratch, block, given| {
            cpu::change_of_gradient(block, given, stages.simd, scratch)
        })?;
        add_pairs(cuda, &mut changes, |place| given[place].is_some())?;
        for cuda in cuda.iter() {
            for (place, sums) in cuda.step_sums()? {
                blocks[place].step_sums = sums;
            }
        }
        let own = |(block, change): (&Block, &Option<Pair>)| match change {
            Some(change) => rule::measured(*change, &block.step_sums),
            None => Measured::default(),
        };
        let measured: Vec<Measured> = blocks.iter().zip(&changes).map(own).collect();
        let total = Measured::fold(&measured);
        let observe = |(i, block): (usize, &mut Block)| {
            let params = &groups[block.group].params;
            let Curvature::Step { every, decay, noise, .. } = params.curvature else { return None };
            let is_missing = pending[i].is_some() && given[i].is_none();
            block.estimate.counts.missing += is_missing as u64;
            let own = if is_missing { None } else { Some(&measured[i]) };
            let measured = if params.scope == Scope::Global { Some(&total) } else { own };
            Some(rule::observe_step(
                &mut block.estimate,
                measured?,
                Averaging { every, decay, noise },
                block.small,
                now,
            ))
        };
        let left = blocks.iter_mut().enumerate().map(observe).collect();
        blocks.iter_mut().for_each(|block| block.strips = vec![]);
        self.forget_kept();
        self.note_own_estimates(left);
        Ok(())
    }

    /// Both gradients of every block that has them, and what they are multiplied by.
    fn both_gradients<'a>(
        &self,
        stages: &Stages,
        first: impl Fn(usize, &Block) -> Option<&'a Tensor>,
        again: &'a GradStore,
        factor: impl Fn(&Block) -> f64,
    ) -> Result<Vec<Option<cpu::Measured<'a>>>> {
        stages.check(&self.blocks, again)?;
        let both = |(i, block): (usize, &Block)| {
            let (first, again) = (first(i, block)?, again.get_id(block.id)?);
            Some(cpu::Measured { first, again, c: factor(block) })
        };
        Ok(self.blocks.iter().enumerate().map(both).collect())
    }

    /// Keeps the parameters that have a gradient and perturbs them.
    pub(crate) fn perturb_all(&mut self, grads: &GradStore) -> Result<()> {
        let Some(MeasureSchedule { probe: Some((delta, seed)), .. }) = self.plan else {
            bail!("`perturb`: expected settings with `Curvature::Hutchinson`")
        };
        let draw = self.progress.probe_count;
        let scalars = self.scalars()?;
        let stages = self.stages();
        stages.check(&self.blocks, grads)?;
        self.forget_kept();
        let Self { cuda, blocks, storages, groups, .. } = self;
        for cuda in cuda.iter_mut() {
            let inputs = Inputs { blocks, storages, groups, grads, scalars };
            cuda.squares(&inputs, delta)?;
        }
        if self.decides_on_device() {
            self.cuda[0].perturb(seed, draw)?;
            self.progress.probe_count += 1;
            return Ok(());
        }
        let moves = |block: &Block| grads.get_id(block.id).is_some() && !stages.frozen[block.group];
        let places = self.blocks.iter().enumerate();
        let places: Vec<_> = places.map(|(i, block)| moves(block).then_some(i as u64)).collect();
        let mut squares = stages.each(&mut self.blocks, &places, |scratch, block, _| {
            Ok(Pair { a: cpu::squares(block, stages.simd, scratch)?, b: 0. })
        })?;
        add_pairs(&self.cuda, &mut squares, |place| places[place].is_some())?;
        let squares: Vec<_> = squares.into_iter().map(|p| p.unwrap_or(Pair::ZERO)).collect();
        let n: usize = self.blocks.iter().filter(|block| moves(block)).map(|block| block.n).sum();
        let size = rule::probe_size(delta, Pair::fold(&squares).a, n as f64);
        let on_cpu = stages.each(&mut self.blocks, &places, |_, block, place| {
            replace::keep(block)?;
            replace::perturb(block, *place, size, seed, draw)
        });
        let perturbed = on_cpu.and_then(|_| {
            self.cuda.iter_mut().try_for_each(|cuda| {
                cuda.send_probe(size, Probe::Finite)?;
                cuda.perturb(seed, draw)
            })
        });
        if let Err(e) = perturbed {
            let _ = self.restore_all();
            return Err(e);
        }
        self.progress.probe_count += 1;
        self.progress.size = size;
        Ok(())
    }

    /// Takes a measurement by the last perturbation.
    pub(crate) fn observe_probe(&mut self, grads: &GradStore, again: &GradStore) -> Result<()> {
        let stages = self.stages();
        let size = self.progress.size;
        let scalars = self.scalars()?;
        stages.check(&self.blocks, grads)?;
        let Self { cuda, blocks, storages, groups, .. } = self;
        for cuda in cuda.iter_mut() {
            let first = Inputs { blocks, storages, groups, grads, scalars };
            cuda.probe_sums(&first, &Inputs { grads: again, ..first })?;
        }
        if self.decides_on_device() {
            self.cuda[0].average_probe()?;
            let left = self.cuda[0].left()?;
            self.note_estimates(left);
            return Ok(());
        }
        let decay = |groups: &[Group], block: &Block| match groups[block.group].params.curvature {
            Curvature::Hutchinson { decay, .. } if !stages.frozen[block.group] => Some(decay),
            _ => None,
        };
        let has_first = |groups: &[Group], block: &Block| {
            grads.get_id(block.id).filter(|_| decay(groups, block).is_some())
        };
        let c = 1. / self.grad_scale;
        let first = |_, block: &Block| has_first(&self.groups, block);
        let both = self.both_gradients(&stages, first, again, |_| c)?;
        let now = self.steps + self.skipped_steps;
        let Self { blocks, groups, cuda, .. } = self;
        let given: Vec<_> = blocks
            .iter()
            .zip(both)
            .map(|(block, both)| Some((both?, decay(groups, block)?)))
            .collect();
        let mut squares = stages.each(blocks, &given, |scratch, block, (both, _)| {
            cpu::probe_sums(block, both, size, stages.simd, scratch)
        })?;
        add_pairs(cuda, &mut squares, |place| given[place].is_some())?;
        let squares: Vec<_> = squares.into_iter().map(|p| p.unwrap_or(Pair::ZERO)).collect();
        let probe = Probe::of(Pair::fold(&squares));
        if probe == Probe::Finite {
            for cuda in cuda.iter_mut() {
                cuda.send_probe(size, probe)?;
                cuda.average_probe()?;
            }
            let mut sums = stages.each(blocks, &given, |scratch, block, (both, decay)| {
                let a = cpu::average_probe(block, both, size, *decay, scratch)?;
                Ok(Pair { a, b: 0. })
            })?;
            add_pairs(cuda, &mut sums, |place| given[place].is_some())?;
            for (place, sum) in sums.into_iter().enumerate() {
                if let (Some(Pair { a, .. }), Some((_, decay))) = (sum, &given[place]) {
                    let estimate = &mut blocks[place].estimate;
                    estimate.power *= decay;
                    estimate.own = a / (1. - estimate.power);
                }
            }
        }
        let own = |block: &Block| Pair { a: block.estimate.own, b: 0. };
        let total = Pair::fold(&blocks.iter().map(own).collect::<Vec<_>>()).a;
        let observe = |(block, given): (&mut Block, &Option<_>)| {
            let is_missing = has_first(groups, block).is_some() && given.is_none();
            block.estimate.counts.missing += is_missing as u64;
            let global = groups[block.group].params.scope == Scope::Global;
            let takes_part = decay(groups, block).is_some() && (global || given.is_some());
            let squared = if global { total } else { block.estimate.own };
            takes_part.then(|| rule::observe_rows(&mut block.estimate, probe, squared, now))
        };
        let left = blocks.iter_mut().zip(&given).map(observe).collect();
        self.forget_kept();
        self.send_known()?;
        self.note_own_estimates(left);
        Ok(())
    }

    /// Puts the averages in the place of the parameters.
    pub(crate) fn swap_all(&mut self) -> Result<()> {
        self.forget_kept();
        if self.decides_on_device() {
            return self.cuda[0].swap(&self.blocks);
        }
        self.send_known()?;
        let averaged = |block: &Block| (block.powers.average != 1.).then_some(());
        let given: Vec<_> = self.blocks.iter().map(averaged).collect();
        let on_cpu = self.stages().each(&mut self.blocks, &given, |_, block, ()| {
            replace::keep(block)?;
            replace::swap_average(block)
        });
        let swapped =
            on_cpu.and_then(|_| self.cuda.iter_mut().try_for_each(|cuda| cuda.swap(&self.blocks)));
        if let Err(e) = swapped {
            let _ = self.restore_all();
            return Err(e);
        }
        Ok(())
    }

    /// Drops copies of parameters that nobody waits for any more.
    pub(crate) fn forget_kept(&mut self) {
        self.blocks.iter_mut().for_each(|block| block.old.valid = false);
        self.cuda.iter_mut().for_each(Cuda::forget);
    }

    /// Puts back the parameters that were kept: all that it can, whatever fails.
    pub(crate) fn restore_all(&mut self) -> Result<()> {
        let mut restored = Ok(());
        for cuda in &mut self.cuda {
            restored = restored.and(cuda.restore(&self.blocks));
        }
        let all = vec![Some(()); self.blocks.len()];
        // By threads that wait for no other's lock: see `Stages::spread`.
        let on_cpu =
            self.stages().each(&mut self.blocks, &all, |_, block, ()| replace::restore(block));
        restored.and(on_cpu.map(|_| ()))
    }

    /// The products of decays of each block.
    pub(crate) fn powers(&self) -> Result<Vec<Powers>> {
        if self.decides_on_device() {
            return self.cuda[0].powers();
        }
        Ok(self.blocks.iter().map(|block| block.powers).collect())
    }

    /// What is known of the curvature of each block.
    pub(crate) fn estimates(&self) -> Result<Vec<Estimate>> {
        if self.decides_on_device() {
            return self.cuda[0].estimates();
        }
        Ok(self.blocks.iter().map(|block| block.estimate).collect())
    }
}

/// Adds what devices have summed up for blocks at places that are `asked` for.
fn add_pairs(
    cuda: &[Cuda],
    pairs: &mut [Option<Pair>],
    asked: impl Fn(usize) -> bool,
) -> Result<()> {
    for cuda in cuda {
        for (place, pair) in cuda.pairs()?.into_iter().filter(|(place, _)| asked(*place)) {
            pairs[place] = Some(pair);
        }
    }
    Ok(())
}

/// Without the counters where a CUDA device has them: whoever logs does not wait for it.
impl fmt::Debug for Srkl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |count: u64| (!self.decides_on_device()).then_some(count);
        f.debug_struct("Srkl")
            .field("groups", &self.groups.iter().map(|g| (&g.name, &g.params)).collect::<Vec<_>>())
            .field("parameters", &self.blocks.len())
            .field("learning_rate", &self.learning_rate())
            .field("grad_scale", &self.grad_scale)
            .field("steps", &counted(self.steps))
            .field("skipped_steps", &counted(self.skipped_steps))
            .finish_non_exhaustive()
    }
}
