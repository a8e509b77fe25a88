//! Who decides a step, and counts it: the host, or the one CUDA device that has all parameters.

use candle_core::Result;
use candle_core::backprop::GradStore;

use crate::backend::{Last, Step};
use crate::block::Parameters;
use crate::estimate::{Estimate, Left};
use crate::rule::{Powers, StepScalars};

#[cfg(feature = "cuda")]
pub(crate) mod device;
pub(crate) mod host;

/// What has become of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was taken, or skipped.
    Counted,
    /// It was recorded in a CUDA graph, and not taken.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Captured,
}

/// What an engine has counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub steps: u64,
    pub skipped_steps: u64,
    /// Of the last step, where a group clips.
    pub grad_norm: Option<f64>,
}

/// All of an engine that a checkpoint has: by block products of decays, what is known of its curvature, and how often
/// it was skipped alone.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub steps: u64,
    pub skipped_steps: u64,
    pub blocks: Vec<(Powers, Estimate, u64)>,
}

/// What a measurement has left of a block's estimate, if it was about that block, and whether there is one.
pub(crate) type Remaining = (Option<Left>, bool);

/// How a perturbation by random vectors is made: [`Curvature::Hutchinson`](crate::Curvature::Hutchinson).
#[derive(Clone, Copy)]
pub(crate) struct Perturbation {
    pub delta: f64,
    pub seed: u64,
    /// Its number.
    pub draw: u64,
}

/// Takes steps and measurements of all parameters, and counts them.
pub(crate) trait Engine: Send + Sync {
    /// A step, from gradients to parameters.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient, or with a capture. Nothing has changed then.
    fn step(&mut self, all: &mut Parameters, step: Step) -> Result<Outcome>;

    /// The measurement along the last step, by second gradients.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient. It can be called again then.
    fn observe(
        &mut self,
        all: &mut Parameters,
        again: &GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Remaining>>;

    /// Keeps the parameters that have a gradient, and perturbs them.
    fn perturb(&mut self, all: &mut Parameters, step: Step, by: Perturbation) -> Result<()>;

    /// The measurement by the last perturbation.
    fn observe_probe(
        &mut self,
        all: &mut Parameters,
        step: Step,
        again: &GradStore,
    ) -> Result<Vec<Remaining>>;

    /// Puts averages in the place of the parameters, which are kept.
    fn swap(&mut self, all: &mut Parameters) -> Result<()>;

    /// Puts back the parameters that were kept: all that it can, whatever fails.
    fn restore(&mut self, all: &mut Parameters) -> Result<()>;

    /// Drops gradients that wait for a measurement, and copies of parameters that nobody waits for.
    fn release(&mut self, all: &mut Parameters);

    /// Takes settings ahead of the next step, so that a replay of a captured one finds them.
    fn upload_settings(&mut self, all: &Parameters, scalars: StepScalars) -> Result<()>;

    /// Goes on from a checkpoint; the last step is forgotten.
    fn set_progress(&mut self, all: &mut Parameters, progress: Progress) -> Result<()>;

    /// Whether blocks may be brought into another order before [`Engine::set_progress`].
    fn may_reorder(&self) -> bool;

    // What follows waits for a device, if it is there.

    fn counters(&self) -> Result<Counters>;

    /// The counters, where nobody has to be waited for.
    fn counters_at_hand(&self) -> Option<Counters>;

    fn powers(&self) -> Result<Vec<Powers>>;

    fn estimates(&self) -> Result<Vec<Estimate>>;

    /// For each block what the last step did, and how often it was skipped.
    fn outcomes(&self) -> Result<Vec<(Option<Last>, u64)>>;

    /// The squares of each block's parameter as it is.
    fn param_squares(&self, all: &Parameters) -> Result<Vec<Option<f64>>>;
}
