//! Curvature that is measured: when, by which gradients, and what becomes of it.
//!
//! [`Curvature::Step`] is measured after a step, [`Curvature::Hutchinson`] before it, at parameters that are
//! perturbed meanwhile. The estimates' formulas are here and in `kernels/curvature.cuh`, those of the elements
//! in `backend/cpu.rs`.

use candle_core::backprop::GradStore;
use candle_core::{DType, Error, Result, Tensor, bail};
use candle_nn::Optimizer;

use crate::block::Block;
use crate::numerics::Pair;
use crate::optimizer::Srkl;
use crate::params::{Curvature, ParamsSrkl};

/// What is known of a block's curvature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    /// `Step`: the average of H, uncorrected. `Hutchinson`: H squared, corrected.
    pub mean: f64,
    /// `Hutchinson`: the sum of q over the block, corrected, whatever the scope.
    pub own: f64,
    /// The product of the average's decays: 1 before the first measurement.
    pub power: f64,
    /// Whether the last measurement was not finite.
    pub infinite: bool,
    pub counts: Measurements,
}

/// How measurements of curvature went: see [`Srkl::measurements`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measurements {
    /// How many entered the estimate.
    pub taken: u64,
    /// How many met a NaN or an infinity, and count as infinite curvature up to the next step that
    /// measures.
    pub nonfinite: u64,
    /// How many say nothing, of a step that moved nothing: one that was skipped, or by
    /// [`Curvature::Hutchinson`] one whose gradient is not finite.
    pub without_step: u64,
}

impl Estimate {
    pub const NONE: Self = Self {
        mean: 0.,
        own: 0.,
        power: 1.,
        infinite: false,
        counts: Measurements { taken: 0, nonfinite: 0, without_step: 0 },
    };

    /// `H`; `None` before the first measurement.
    pub fn curvature(&self, curvature: Curvature) -> Option<f64> {
        if self.infinite {
            return Some(f64::INFINITY);
        }
        if self.counts.taken == 0 {
            return None;
        }
        Some(match curvature {
            Curvature::Hutchinson { .. } => self.mean.sqrt(),
            _ => self.mean / (1. - self.power),
        })
    }

    /// Whether a checkpoint may have it.
    pub fn is_valid(&self) -> bool {
        let Self { mean, own, power, counts, .. } = *self;
        mean >= 0.
            && own >= 0.
            && (0. ..=1.).contains(&power)
            && (power < 1. || counts.taken == 0 || own == 0.)
    }

    /// As a checkpoint has it.
    pub fn to_text(self) -> String {
        let Self { mean, own, power, infinite, counts } = self;
        let Measurements { taken, nonfinite, without_step } = counts;
        let infinite = infinite as u8;
        format!("{mean:?} {own:?} {power:?} {infinite} {taken} {nonfinite} {without_step}")
    }

    pub fn from_numbers(numbers: [f64; 7]) -> Self {
        let [mean, own, power, infinite, counts @ ..] = numbers;
        let [taken, nonfinite, without_step] = counts.map(|count| count as u64);
        let counts = Measurements { taken, nonfinite, without_step };
        Self { mean, own, power, infinite: infinite != 0., counts }
    }

    /// Takes a measurement along a step: `pair` has the sums of `G^2 / P` and `D^2 P`.
    pub fn observe_step(&mut self, pair: Pair, decay: f64) {
        let curvature = pair.a.sqrt() / pair.b.sqrt();
        if !(pair.a.is_finite() && pair.b.is_finite()) || pair.b > 0. && !curvature.is_finite() {
            self.infinite = true;
            self.counts.nonfinite += 1;
        } else if pair.b == 0. {
            self.counts.without_step += 1;
        } else {
            self.infinite = false;
            self.mean = decay * self.mean + (1. - decay) * curvature;
            self.power *= decay;
            self.counts.taken += 1;
        }
    }
}

/// What a product with the Hessian came to.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Probe {
    Finite,
    /// A NaN or an infinity in the second gradient.
    Infinite,
    /// One in the first gradient, whose step says nothing.
    Nothing,
}

impl Probe {
    /// By the sums of [`probe_sums`](crate::backend::cpu::probe_sums) over all blocks.
    pub fn of(total: Pair) -> Self {
        match (total.b.is_finite(), total.a.is_finite()) {
            (false, _) => Self::Nothing,
            (true, false) => Self::Infinite,
            (true, true) => Self::Finite,
        }
    }
}

impl Estimate {
    /// Takes a measurement by random vectors: `squared` is H squared.
    pub fn observe_rows(&mut self, probe: Probe, squared: f64) {
        match probe {
            Probe::Nothing => self.counts.without_step += 1,
            Probe::Finite if squared.is_finite() => {
                self.infinite = false;
                self.mean = squared;
                self.counts.taken += 1;
            }
            _ => {
                self.infinite = true;
                self.counts.nonfinite += 1;
            }
        }
    }
}

pub(crate) fn no_second_gradient(block: &Block) -> Error {
    Error::msg(format!("`{}` has a gradient in the step, and none in its measurement", block.name))
}

/// When an optimizer measures, from the settings of its groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Plan {
    pub every: u64,
    pub first: u64,
    /// For Hutchinson: delta and seed.
    pub probe: Option<(f64, u64)>,
}

impl Plan {
    fn of(params: &ParamsSrkl) -> Option<Self> {
        match params.curvature {
            Curvature::GradSquare => None,
            Curvature::Step { every, first, .. } => Some(Self { every, first, probe: None }),
            Curvature::Hutchinson { every, first, delta, seed, .. } => {
                Some(Self { every, first, probe: Some((delta, seed)) })
            }
        }
    }

    /// # Errors
    ///
    /// Two groups that measure, but not alike.
    pub fn of_all<'a>(groups: impl Iterator<Item = &'a ParamsSrkl>) -> Result<Option<Self>> {
        let mut plans = groups.filter_map(Self::of);
        let Some(plan) = plans.next() else { return Ok(None) };
        match plans.find(|other| *other != plan) {
            None => Ok(Some(plan)),
            Some(_) => bail!(
                "`curvature`: groups that measure must agree in the kind, `every`, `first`, `delta` and \
                 `seed`"
            ),
        }
    }
}

/// Where an optimizer is between a step and its measurement.
#[derive(Default)]
pub(crate) struct Progress {
    /// Steps, those skipped included, that were asked for: they decide when to measure.
    pub attempts: u64,
    /// Hutchinson measurements made: each has its own random vectors.
    pub draws: u64,
    /// The size of the last perturbation, where the host has decided it.
    pub size: f64,
    /// Whether the next step measures whatever its number.
    pub requested: bool,
    /// Hutchinson: whether the measurement of the next step has been taken.
    pub measured: bool,
    /// Step: the first gradients of the step that waits for `observe`, by block.
    pub pending: Option<Pending>,
}

/// The first gradient of each block that has one.
pub(crate) type Pending = Vec<Option<Tensor>>;

impl Srkl {
    /// One step that asks for what it needs: calls `loss` once, and, where the step measures the curvature,
    /// a second time: after the step ([`Curvature::Step`]), or before it at perturbed parameters
    /// ([`Curvature::Hutchinson`]). Returns the first loss.
    ///
    /// `loss` must compute the same function of the parameters each time: the same batch, the same dropout
    /// mask. [`Srkl::check_repeatable`] finds out. It includes the factor [`Srkl::grad_scale`].
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
    /// # Errors
    ///
    /// Those of `loss`, of its gradient and of [`step`](Optimizer::step). If the first call fails nothing has
    /// changed. If the second one fails, or panics, there is no measurement: with `Step` the step has been
    /// taken; with `Hutchinson` it has not, and the parameters are as they were, bit for bit.
    pub fn backward_step_with(
        &mut self,
        mut loss: impl FnMut() -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.refuse_pending()?;
        let first = loss()?;
        let grads = first.backward()?;
        if self.measuring() && self.probes() {
            let perturbed = self.perturb()?;
            let again = loss()?.backward()?;
            perturbed.observe(&grads, &again)?;
        }
        self.step(&grads)?;
        // Taken out first, so that no step waits for a measurement that has failed.
        if let Some(pending) = self.progress.pending.take() {
            let again = loss().and_then(|loss| loss.backward());
            let observed = again.and_then(|again| self.observe_pending(pending, &again));
            observed.inspect_err(|_| self.forget_kept())?;
        }
        Ok(first)
    }

    /// Whether the next step measures the curvature: each of the `first` steps, then every `every`-th,
    /// skipped ones counted, and after [`Srkl::request_measurement`].
    ///
    /// In a loop of your own, with [`Curvature::Step`]:
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
    /// and with [`Curvature::Hutchinson`]:
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
    ///     let perturbed = opt.perturb()?;
    ///     let again = loss()?.backward()?;
    ///     perturbed.observe(&grads, &again)?;
    /// }
    /// opt.step(&grads)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn measuring(&self) -> bool {
        let Some(Plan { every, first, .. }) = self.plan else { return false };
        let Progress { attempts, requested, measured, .. } = self.progress;
        !measured && (requested || attempts < first || attempts % every == 0)
    }

    /// Makes the next step one that measures. For those who replay captured steps, which the optimizer does
    /// not see, and which can't measure.
    pub fn request_measurement(&mut self) {
        self.progress.requested = true;
    }

    /// Gives up the measurement that the last step waits for; if it waits for none, the one that the next step is
    /// due. Steps go on with the estimate there is; without any, `phi` is 0.
    pub fn skip_measurement(&mut self) {
        match self.progress.pending.take() {
            Some(_) => self.forget_kept(),
            None => self.progress.measured = self.measuring(),
        }
    }

    /// The second half of a step that measures with [`Curvature::Step`]: takes the gradients of the **same
    /// batch** as the step's, at the parameters as they are now. Nothing may write to them in between.
    ///
    /// # Errors
    ///
    /// No step that waits for it, or what `step` refuses of gradients. It can then be called again.
    pub fn observe(&mut self, grads_again: &GradStore) -> Result<()> {
        let Some(pending) = self.progress.pending.take() else {
            bail!(
                "`observe`: no step waits for a measurement; call it once after a `step` before which \
                 `measuring()` was true, with `Curvature::Step`"
            )
        };
        let kept = pending.clone();
        self.observe_pending(pending, grads_again)
            .inspect_err(|_| self.progress.pending = Some(kept))
    }

    /// Perturbs the parameters for a measurement of [`Curvature::Hutchinson`], until the guard is dropped.
    ///
    /// # Errors
    ///
    /// Settings that don't ask for it, or a measurement that has been taken already.
    pub fn perturb(&mut self) -> Result<Perturbed<'_>> {
        if !self.probes() {
            bail!("`perturb`: expected settings with `Curvature::Hutchinson`")
        }
        if self.progress.measured {
            bail!("`perturb`: the measurement for the next step has been taken; call `step`")
        }
        self.perturb_all()?;
        Ok(Perturbed { opt: self, done: false })
    }

    /// Checks that `loss` gives the same loss twice, bit for bit, at the same parameters: without that a
    /// measurement of curvature measures noise.
    ///
    /// # Errors
    ///
    /// A loss that differs, with both values, and those of `loss`.
    pub fn check_repeatable(&self, mut loss: impl FnMut() -> Result<Tensor>) -> Result<()> {
        let mut value = || loss()?.to_dtype(DType::F64)?.to_scalar::<f64>();
        let (first, second) = (value()?, value()?);
        if first.to_bits() != second.to_bits() {
            bail!(
                "the loss is not repeatable: {first}, and {second} at the same parameters; use the same \
                 batch and the same dropout mask in both calls"
            )
        }
        Ok(())
    }

    /// How measurements went so far, of the parameter that had most that said something.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The numbers may live on a device.)
    pub fn measurements(&self) -> Result<Measurements> {
        let counts = self.estimates()?.into_iter().map(|estimate| estimate.counts);
        let told = |c: &Measurements| (c.taken + c.nonfinite, c.without_step);
        Ok(counts.max_by_key(told).unwrap_or_default())
    }

    /// Whether the settings perturb parameters.
    pub(crate) fn probes(&self) -> bool {
        self.plan.is_some_and(|plan| plan.probe.is_some())
    }

    /// An error if the last step waits for its measurement.
    pub(crate) fn refuse_pending(&self) -> Result<()> {
        if self.progress.pending.is_some() {
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

/// Parameters are perturbed while this lives: see [`Srkl::perturb`]. Dropping it restores them, bit for bit.
#[must_use = "dropping it restores the parameters"]
pub struct Perturbed<'a> {
    opt: &'a mut Srkl,
    done: bool,
}

impl Perturbed<'_> {
    /// Restores the parameters and takes the measurement, from the gradients of the same batch at the
    /// parameters (`grads`) and at the perturbed ones.
    ///
    /// # Errors
    ///
    /// What `step` refuses of gradients. The parameters are restored, and the estimate is as it was.
    pub fn observe(mut self, grads: &GradStore, grads_again: &GradStore) -> Result<()> {
        self.restore()?;
        self.opt.observe_probe(grads, grads_again)?;
        self.opt.progress.measured = true;
        Ok(())
    }

    fn restore(&mut self) -> Result<()> {
        self.done = true;
        self.opt.restore_all()
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

/// Parameters are their averages while this lives: see [`Srkl::swap_averaged`]. Dropping it puts the training
/// weights back, bit for bit.
#[must_use = "dropping it puts the training weights back"]
pub struct Averaged<'a> {
    opt: &'a mut Srkl,
}

impl Drop for Averaged<'_> {
    fn drop(&mut self) {
        // Fails with its device alone.
        let _ = self.opt.restore_all();
    }
}

impl Srkl {
    /// Puts the averages ([`ParamsSrkl::average`]) in the place of the parameters, rounded to their dtype, until
    /// the guard is dropped. A parameter that has not been stepped yet stays as it is.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_srkl::{ParamsSrkl, Srkl};
    /// # use candle_nn::Optimizer;
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let params = ParamsSrkl { average: Some(0.98), ..ParamsSrkl::braked_adam() };
    /// let mut opt = Srkl::new(vec![w.clone()], params)?;
    /// opt.backward_step_with(|| w.sqr()?.sum_all())?;
    /// {
    ///     let _averaged = opt.swap_averaged()?;
    ///     let validation = w.sqr()?.sum_all()?;
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No group with an average, or a step that waits for its measurement.
    pub fn swap_averaged(&mut self) -> Result<Averaged<'_>> {
        if !self.groups.iter().any(|group| group.params.average.is_some()) {
            bail!("`swap_averaged`: no group has an average; set `average` in its settings")
        }
        self.refuse_pending()?;
        self.swap_all()?;
        Ok(Averaged { opt: self })
    }
}
