//! Where the stages of a step run.
//!
//! A step is the same few stages over blocks on every device:
//!
//! | stage | reads | gives |
//! |---|---|---|
//! | `statistics` | gradients | [`Sums`](crate::numerics::Sums) of each block |
//! | `decide` | sums, settings | a [`Decision`](crate::rule::Decision) for each block: phi, or why it is skipped |
//! | `directions`, `adjust` | gradients, state, parameters | decisions again, where the trust clip or a small first step needs the directions |
//! | `update` | gradients, decisions | parameters, masters, moments, averages; of a step that measures, [`StepSums`](crate::estimate::StepSums) |
//! | `change_of_gradient` | both gradients, step sums | an [`Estimate`](crate::estimate::Estimate) |
//! | `squares`, `perturb`, `probe_sums`, `average_probe` | parameters; both gradients | an estimate by random vectors |
//!
//! `optimizer.rs` says what is done and in which order, a backend says how: on the CPU `stages.rs`
//! hands blocks to the threads of `pool.rs` and `cpu.rs` goes over their elements; on a CUDA device `cuda.rs` launches the
//! kernels of `kernels/srkl.cu`. The mathematics is in `rule.rs` and `kernels/rule.cuh`.
//!
//! | word | meaning |
//! |---|---|
//! | block | a parameter tensor with its state; what CUDA calls a block of threads is a CTA here |
//! | chunk | 8192 neighbouring elements of a block ([`CHUNK`](crate::numerics::CHUNK)): what one sum is over, and what a CTA takes |
//! | lane | one of the 1024 partial sums of a chunk ([`LANES`](crate::numerics::LANES)) |
//! | row | up to 1024 neighbouring elements: one for each lane |
//! | strip | 32 neighbouring elements, of curvature along a step |
//! | piece | 65,536 elements: what a thread of the CPU takes of a large block |
//! | run | blocks that are stepped before the statistics of the next ones are known; all of them where a decision needs all |
//! | small step | the first step, and any other that measures without an estimate to go by |

use candle_core::backprop::GradStore;

use crate::block::Block;
use crate::params::Group;
use crate::rule::StepScalars;

pub(crate) mod access;
pub(crate) mod cpu;
#[cfg_attr(not(feature = "cuda"), path = "no_cuda.rs")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod cuda_dropout;
pub(crate) mod gradient;
pub(crate) mod mask;
pub(crate) mod masters;
pub(crate) mod pool;
pub(crate) mod replace;
pub(crate) mod simd;
pub(crate) mod stages;

/// What a step on a device is given.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct Inputs<'a> {
    pub blocks: &'a [Block],
    /// Where the storages of all variables are, sorted: a gradient must not be one of them.
    pub storages: &'a [usize],
    pub groups: &'a [Group],
    pub grads: &'a GradStore,
    pub scalars: StepScalars,
}

/// What a step does beside moving blocks.
#[derive(Clone, Copy)]
pub(crate) struct StepOptions {
    /// Whether curvature is measured along it.
    pub measures: bool,
    /// Whether norms are recorded.
    pub records: bool,
}

/// What a device has counted, where steps are decided on it.
pub(crate) struct Counters {
    pub steps: u64,
    pub skipped_steps: u64,
    pub grad_norm: Option<f64>,
}
