//! The engine, which decides steps and counts them: the host, or the one CUDA device that has all parameters.

use candle_core::Result;
use candle_core::backprop::GradStore;

use crate::backend::{Last, Step};
use crate::block::Parameters;
use crate::estimate::{Estimate, Left};
use crate::rule::{Powers, StepScalars};

#[cfg(feature = "cuda")]
pub(crate) mod device;
pub(crate) mod host;

/// The outcome of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was taken, or skipped.
    Counted,
    /// It was recorded in a CUDA graph, and not taken.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Captured,
}

/// The counters of an engine.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub steps: u64,
    pub skipped_steps: u64,
    /// Of the last step, if a group clips.
    pub grad_norm: Option<f64>,
}

/// What a checkpoint saves of an engine. For each block: products of decays, the estimate of its curvature, and how
/// often it alone was skipped.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub steps: u64,
    pub skipped_steps: u64,
    pub blocks: Vec<(Powers, Estimate, u64)>,
}

/// What a measurement did to a block's estimate (`None` if it left the block out), and whether there is an estimate.
pub(crate) type Remaining = (Option<Left>, bool);

/// How a perturbation by random vectors is made: [`Curvature::Hutchinson`](crate::Curvature::Hutchinson).
#[derive(Clone, Copy)]
pub(crate) struct Perturbation {
    pub delta: f64,
    pub seed: u64,
    /// The number of the measurement: each has its own random vectors.
    pub draw: u64,
}

/// Takes steps and measurements of all parameters, and counts them.
pub(crate) trait Engine: Send + Sync {
    /// A step, from gradients to parameters.
    ///
    /// # Errors
    ///
    /// A gradient that does not fit, or a step that a capture does not allow. Nothing has changed then. (With several ranks what
    /// fails after they have agreed ends their training.)
    fn step(&mut self, all: &mut Parameters, step: Step) -> Result<Outcome>;

    /// A step that does not measure, and frees each gradient as soon as it can.
    ///
    /// # Errors
    ///
    /// As [`Engine::step`].
    fn step_consuming(
        &mut self,
        all: &mut Parameters,
        grads: GradStore,
        scalars: StepScalars,
        records: bool,
    ) -> Result<Outcome> {
        self.step(all, Step { grads: &grads, scalars, measures: false, records, steps: 0 })
    }

    /// Measures the curvature along the last step, with second gradients.
    ///
    /// # Errors
    ///
    /// A gradient that does not fit. It can be called again then.
    fn observe(
        &mut self,
        all: &mut Parameters,
        again: &GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Remaining>>;

    /// Backs up the parameters that have a gradient, and perturbs them.
    fn perturb(&mut self, all: &mut Parameters, step: Step, by: Perturbation) -> Result<()>;

    /// Measures the curvature by the last perturbation.
    fn observe_probe(
        &mut self,
        all: &mut Parameters,
        step: Step,
        again: &GradStore,
    ) -> Result<Vec<Remaining>>;

    /// Backs up the parameters, and replaces them by their averages.
    fn swap(&mut self, all: &mut Parameters) -> Result<()>;

    /// Restores the parameters from their backups: all that it can, whatever fails.
    fn restore(&mut self, all: &mut Parameters) -> Result<()>;

    /// Drops gradients that were kept for a measurement, and invalidates backups of parameters.
    fn release(&mut self, all: &mut Parameters);

    /// Receives settings ahead of the next step, for replays of captured steps.
    fn upload_settings(&mut self, all: &Parameters, scalars: StepScalars) -> Result<()>;

    /// Continues from a checkpoint; the last step is forgotten.
    fn set_progress(&mut self, all: &mut Parameters, progress: Progress) -> Result<()>;

    /// An error for what would make work of several ranks fail whatever its gradients are, if it can be known before. A step
    /// that goes `by_device` may be captured. Returns whether it will be.
    fn check_ready(&self, _: &Parameters, _: Step, _by_device: bool) -> Result<bool> {
        Ok(false)
    }

    /// An error if a capture is under way, which `what` can't be part of.
    fn refuse_capture(&self, _what: &str) -> Result<()> {
        Ok(())
    }

    /// Whether steps have been captured, whose replays use its memory, or a capture is under way.
    fn is_captured(&self) -> Result<bool> {
        Ok(false)
    }

    /// Whether blocks may be brought into another order before [`Engine::set_progress`].
    fn may_reorder(&self) -> bool;

    // The following wait for a device, if the numbers are there.

    fn counters(&self) -> Result<Counters>;

    /// The counters, if the host has them.
    fn counters_at_hand(&self) -> Option<Counters>;

    fn powers(&self) -> Result<Vec<Powers>>;

    fn estimates(&self) -> Result<Vec<Estimate>>;

    /// For each block what the last step did, and how often it was skipped.
    fn outcomes(&self, all: &Parameters) -> Result<Vec<(Option<Last>, u64)>>;

    /// The sum of `w^2` of each block, as it is now.
    fn param_squares(&self, all: &Parameters) -> Result<Vec<Option<f64>>>;
}
