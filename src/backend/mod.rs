//! The backends, which run the stages of a step.
//!
//! A step is the same few stages over blocks on every device:
//!
//! | stage | reads | gives |
//! |---|---|---|
//! | `statistics` | gradients | [`Sums`] of each block |
//! | `decide` | sums, settings | a [`Decision`] for each block: phi, or that it is skipped |
//! | `orthogonalize` | gradients, momentum, decisions | the directions of [`Direction::Muon`](crate::Direction::Muon), by products of matrices |
//! | `directions`, `adjust` | gradients, state, parameters | new decisions, if the trust clip or a small step needs the directions |
//! | `update` | gradients, decisions | parameters, masters, moments, averages; of a step that measures, [`StepSums`] |
//! | `change_of_gradient` | both gradients, step sums | an [`Estimate`] |
//! | `squares`, `perturb`, `probe_sums`, `average_probe` | parameters; both gradients | an estimate by random vectors |
//!
//! `engine/host.rs` decides what is done in which order, and a [`Backend`] does it: `cpu` distributes blocks over
//! threads and goes over their elements; `cuda` launches the kernels of `kernels/srkl.cu`. If one CUDA device has all
//! blocks, `engine/device.rs` launches the kernels, which decide themselves. The mathematics is in `rule.rs` and
//! `kernels/rule.cuh`.
//!
//! | word | meaning |
//! |---|---|
//! | place | the index of a block in the list of the optimizer |
//! | block | a parameter tensor with its state; what CUDA calls a block of threads is a CTA here |
//! | chunk | 8192 neighbouring elements of a block ([`CHUNK`](crate::numerics::CHUNK)): what one sum is over, and what a CTA takes |
//! | lane | one of the 1024 partial sums of a chunk ([`LANES`](crate::numerics::LANES)) |
//! | row | up to 1024 neighbouring elements: one for each lane |
//! | strip | 32 neighbouring elements: curvature along a step is bounded in each by itself |
//! | piece | 65,536 elements: what a thread of the CPU takes of a large block |
//! | run | neighbouring blocks that go through all stages before the next ones begin; all blocks if a decision needs all |
//! | small step | with `Curvature::Step`, a step that measures without an estimate, as the first one does |
//!
//! # Where the two sides differ
//!
//! Both give the same bits; this is where their code is not alike, and why.
//!
//! | what | CPU | kernels |
//! |---|---|---|
//! | decisions | `engine/host.rs` adds up totals and applies policies; the bias corrections are made at the update, where the products of decays are at hand | `decide.cuh` does all of it: an update reads one struct a block |
//! | order of blocks | runs of a million elements, so that a gradient is still in the caches | all at once; chunks are taken by tickets |
//! | sums of two terms | a type for the terms of each sum, in `cpu/curvature.rs`, for loops in vectors | one loop with a switch: a kernel for each would be loaded, and few are launched |
//! | finiteness alone | a pass without sums, which is faster | `sum4` as for the other policies: memory is what takes time |
//! | overwritten masters | looked for at the update, which has the parameter's lock; of sharded blocks before it | at the statistics, so that an update reads one flag |
//! | no average, no second moment | `Option`, and no loop | a decay of 1, which changes nothing |
//! | random bits | once for 64 elements | once an element: threads share nothing |
//! | measuring steps | summed up in the update's own loop | element by element, by a kernel of its own: registers are few |

use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

use crate::block::{Block, Parameters};
use crate::estimate::{Estimate, Probe, StepSums};
use crate::numerics::{Pair, Sums};
use crate::params::ParamsSrkl;
use crate::rule::{self, Corrections, Decision, Powers, StepScalars};

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod masters;
mod newton_schulz;

/// The input of a step.
#[derive(Clone, Copy)]
pub(crate) struct Step<'g> {
    pub grads: &'g GradStore,
    pub scalars: StepScalars,
    /// Whether curvature is measured along it.
    pub measures: bool,
    /// Whether norms are recorded.
    pub records: bool,
    /// How many steps were taken before, if the host decides.
    pub steps: u64,
}

/// The sums over gradients that a step needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradSums {
    /// None: gradients are only checked.
    None,
    /// Whether all elements are finite: `sum4` is 0, or a NaN.
    FiniteOnly,
    /// `sum4`
    Sum4,
    /// `sum2` and `sum4`
    Sum2AndSum4,
}

/// A block's gradient, after stage 1.
#[derive(Clone, Copy)]
pub(crate) struct BlockGradient<'g> {
    pub gradient: &'g Tensor,
    pub sums: Sums,
    /// On the CPU the addresses of its storage and of its first element, for prefetching. The latter is 0 if elements are not
    /// contiguous, by which the update knows.
    pub storage: usize,
    pub elements: usize,
}

/// What stage 1 finds of the shard of a block.
#[derive(Clone)]
pub(crate) struct ShardSums {
    pub of_chunks: Vec<Sums>,
    /// Whether its parameter seems to have been overwritten; the host looks at those on the CPU itself.
    pub overwritten: bool,
}

/// What the host tracks of a block, if the host decides steps.
#[derive(Clone)]
pub(crate) struct Tracked {
    pub powers: Powers,
    pub estimate: Estimate,
    /// On the CPU the sums of the last step over chunks, for its measurement or for telemetry.
    pub step_sums: Vec<StepSums>,
    /// What these are multiplied by: [`SumScales`].
    pub sum_scales: SumScales,
    /// On the CPU the last step's sums of `D^2` over strips, until it is measured.
    pub strips: Vec<f64>,
    /// Whether the last step has summed up.
    pub sums_up: bool,
    /// What the last step multiplied the gradient by, to unscale and clip it.
    pub grad_factor: f64,
    /// Whether its last step was a small one, or did not move it.
    pub small: bool,
    /// How often it alone was skipped.
    pub skipped: u64,
    pub last: Option<Last>,
}

impl Tracked {
    pub const NEW: Self = Self {
        powers: Powers::NONE,
        estimate: Estimate::NONE,
        step_sums: vec![],
        sum_scales: SumScales::NONE,
        strips: vec![],
        sums_up: false,
        grad_factor: 1.,
        small: true,
        skipped: 0,
        last: None,
    };

    /// Notes what a step did to the block: it moved it if there are a gradient and a decision.
    pub fn note(
        &mut self,
        block: &Block,
        params: &ParamsSrkl,
        found: Option<&BlockGradient>,
        decision: Option<&Decision>,
        step: Step,
    ) {
        self.sums_up = false;
        self.small = decision.is_none_or(|d| d.small);
        self.grad_factor = decision.map_or(1., |d| d.grad_factor);
        self.last = decision.map(|d| Last {
            curvature: d.has_curvature.then_some(d.curvature),
            phi: d.phi,
            norms: None,
        });
        match (found, decision) {
            (Some(found), Some(decision)) => {
                let measures = step.measures && params.measures_steps();
                self.sums_up = step.records || measures;
                if let Some(last) = self.last.as_mut().filter(|_| step.records) {
                    let of_step = f64::NAN; // `outcomes` reads it.
                    let norm = found.sums.norm(1. / step.scalars.grad_scale);
                    last.norms = Some([norm, of_step]);
                }
                if self.sums_up {
                    let matrix_scale = block.matrix_scale();
                    self.sum_scales = SumScales::new(params, decision, &self.powers, matrix_scale);
                }
                self.powers = rule::next_powers(&self.powers, params);
            }
            (Some(_), None) => self.skipped += 1,
            (None, _) => {}
        }
    }
}

/// What sums over a block are multiplied by: the stages sum up directions before their scale.
#[derive(Clone, Copy)]
pub(crate) struct SumScales {
    /// Sums of `d^2`.
    pub direction: f64,
    /// Sums of `d m`.
    along: f64,
}

impl SumScales {
    pub const NONE: Self = Self { direction: 1., along: 1. };

    /// `powers` are those before the step.
    pub fn new(
        params: &ParamsSrkl,
        decision: &Decision,
        powers: &Powers,
        matrix_scale: f64,
    ) -> Self {
        let corrections = Corrections::new(params, powers);
        let scale = rule::direction_scale(params, decision, &corrections, matrix_scale);
        let momentum_scale = rule::momentum_scale(params, decision, &corrections);
        Self { direction: scale * scale, along: scale * momentum_scale }
    }

    pub fn apply(&self, sums: StepSums) -> StepSums {
        let StepSums { step, direction, along } = sums;
        StepSums { step, direction: direction * self.direction, along: along * self.along }
    }
}

/// What the last step did, if it moved the block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Last {
    /// `H`, if it is known.
    pub curvature: Option<f64>,
    pub phi: f64,
    /// `||g||_2`, unscaled, and `||D||_2`, if they were recorded.
    pub norms: Option<[f64; 2]>,
}

/// The two gradients of one batch that a measurement reads.
#[derive(Clone, Copy)]
pub(crate) struct GradientPair<'g> {
    pub first: &'g Tensor,
    pub again: &'g Tensor,
    /// What both are multiplied by.
    pub factor: f64,
}

/// Runs the stages of steps that the host decides, on the CPU or on one CUDA device.
///
/// Lists are those of the whole optimizer; a backend ignores blocks that are elsewhere. The sums of a device are read
/// by a separate call, after all backends have begun, so that they work at the same time.
///
/// Sums over a block come as items of rule 4 of the contract in [`numerics`](crate::numerics): one for each chunk, or their
/// sum alone.
pub(crate) trait Backend: Send + Sync {
    /// Finds and checks all gradients, without summing up anything.
    ///
    /// # Errors
    ///
    /// A gradient that does not fit. Nothing has changed then.
    fn check(&self, all: &Parameters, grads: &GradStore) -> Result<()>;

    /// An error if a capture is under way, which `what` can't be part of.
    fn refuse_capture(&self, _what: &str) -> Result<()> {
        Ok(())
    }

    /// Stage 1: finds and checks the gradients of a run, and starts their sums.
    ///
    /// # Errors
    ///
    /// As [`Backend::check`].
    fn statistics<'g>(
        &mut self,
        all: &Parameters,
        step: Step<'g>,
        run: Range<usize>,
        asked: GradSums,
        gradients: &mut [Option<BlockGradient<'g>>],
    ) -> Result<()>;

    /// Reads the sums that [`Backend::statistics`] has started.
    fn read_statistics<'g>(
        &self,
        _: &Parameters,
        _: Step<'g>,
        _: &mut [Option<BlockGradient<'g>>],
    ) -> Result<()> {
        Ok(())
    }

    /// The sums of sharded blocks that have a gradient, by chunk, in place of those of [`Backend::statistics`].
    fn shard_sums(
        &mut self,
        all: &mut Parameters,
        asked: GradSums,
        gradients: &[Option<BlockGradient>],
        sums: &mut [Option<ShardSums>],
    ) -> Result<()>;

    /// Receives the decisions of the host.
    fn upload_decisions(
        &mut self,
        _: &Parameters,
        _: &[Tracked],
        _: &[Option<Decision>],
    ) -> Result<()> {
        Ok(())
    }

    /// Orthogonalises the momentum of the matrices of a run that have a gradient and a decision. State stays as it is.
    ///
    /// # Errors
    ///
    /// A product that fails, for want of memory. Nothing has changed then.
    fn orthogonalize(
        &mut self,
        all: &mut Parameters,
        tracked: &[Tracked],
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &[Option<Decision>],
    ) -> Result<()>;

    /// Sums of `d^2` and `w^2` ([`Directions`](crate::rule::Directions)) of the blocks of a run that have an entry in
    /// `given`, before their [`SumScales`].
    fn directions(
        &mut self,
        all: &mut Parameters,
        tracked: &[Tracked],
        run: Range<usize>,
        given: &[Option<(&Tensor, Decision)>],
        measures: bool,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()>;

    /// Stage 3: moves every block of a run that has a gradient and a decision. The CPU also notes of each of its
    /// blocks, moved or not, what was done ([`Tracked::note`]), in the same visit.
    fn update(
        &mut self,
        all: &mut Parameters,
        tracked: &mut [Tracked],
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &[Option<Decision>],
        step: Step,
    ) -> Result<()>;

    /// Reads the [`StepSums`] of a step that measured or recorded norms, before their [`SumScales`].
    fn read_step_sums(&self, _: &mut [Vec<StepSums>]) -> Result<()> {
        Ok(())
    }

    /// Sums of `G^2` and `||G|| ||D||`, with `G` the change of the gradient along the last step. (A device has kept the
    /// first gradients.)
    fn change_of_gradient(
        &mut self,
        all: &mut Parameters,
        tracked: &[Tracked],
        again: Step,
        given: &[Option<GradientPair>],
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()>;

    /// Sums of `w^2` of the blocks that have a gradient and are `wanted`.
    fn squares(
        &mut self,
        all: &mut Parameters,
        step: Step,
        wanted: &[Option<()>],
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()>;

    /// Backs up the `wanted` parameters and perturbs them: `w + size * z`, with the random vectors of number `draw`.
    fn perturb(
        &mut self,
        all: &mut Parameters,
        wanted: &[Option<()>],
        size: f64,
        seed: u64,
        draw: u64,
    ) -> Result<()>;

    /// Sums of `(H z)^2`, and of the first gradient's squares.
    fn probe_sums(
        &mut self,
        all: &mut Parameters,
        step: Step,
        again: &GradStore,
        given: &[Option<(GradientPair, f64)>],
        size: f64,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()>;

    /// `q <- decay q + (1 - decay) (H z)^2`, and the sums of it, after [`Backend::probe_sums`]; `given` has the decay
    /// beside the gradients.
    fn average_probe(
        &mut self,
        all: &mut Parameters,
        given: &[Option<(GradientPair, f64)>],
        size: f64,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()>;

    /// Reads the sums of the last stage that gives [`Pair`]s, for the blocks that are `wanted`.
    fn read_sums(
        &self,
        _wanted: &dyn Fn(usize) -> bool,
        _: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        Ok(())
    }

    /// The sum of `w^2` of each block, as it is now.
    fn param_squares(&self, all: &Parameters, squares: &mut [Option<Vec<Pair>>]) -> Result<()>;

    /// Backs up the parameters that have an average, and replaces them by it.
    fn swap(&mut self, all: &mut Parameters, tracked: &[Tracked]) -> Result<()>;

    /// Restores parameters from their backups, if there are any.
    fn restore(&mut self, all: &mut Parameters) -> Result<()>;

    /// Drops gradients that were kept for a measurement, and invalidates backups of parameters.
    fn release(&mut self, all: &mut Parameters);

    /// Receives settings ahead of the next step.
    fn upload_settings(&mut self, _: &Parameters, _: StepScalars) -> Result<()> {
        Ok(())
    }

    /// Receives products of decays, and estimates.
    fn upload_estimates(&mut self, _: &[Tracked]) -> Result<()> {
        Ok(())
    }

    /// Receives the size of the perturbation, and whether the product with the Hessian is finite.
    fn upload_probe(&mut self, _size: f64, _: Probe) -> Result<()> {
        Ok(())
    }
}
