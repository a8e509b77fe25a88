//! SRKL (self-regulated kinetic learning), an optimizer for [candle](https://docs.rs/candle-core): steps
//! `w <- w - phi * d` with the brake `phi = s * lr / (1 + beta * H)`, where `H` is a curvature of the loss. With a curvature
//! that is measured along the steps, and `beta` tied to `lr`, nobody needs to search for a learning rate.
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{Module, VarBuilder, VarMap, linear, loss::mse};
//! use candle_srkl::{ParamsSrkl, Srkl};
//!
//! # fn main() -> Result<()> {
//! let varmap = VarMap::new();
//! let model = linear(2, 1, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
//! // The function to learn is y = x0 - 2 x1 + 3.
//! let x = Tensor::new(&[[0f32, 0.], [1., 0.], [0., 1.], [1., 1.]], &Device::Cpu)?;
//! let y = Tensor::new(&[[3f32], [4.], [1.], [2.]], &Device::Cpu)?;
//!
//! let mut opt = Srkl::from_varmap(&varmap, ParamsSrkl::braked_adam())?;
//! for _ in 0..300 {
//!     opt.backward_step_with(|| mse(&model.forward(&x)?, &y))?;
//! }
//! assert!(mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()? < 1e-3);
//! # Ok(())
//! # }
//! ```
//!
//! # Which preset
//!
//! | preset | for |
//! |---|---|
//! | [`ParamsSrkl::braked_adam`] | nearly everything: start here |
//! | [`ParamsSrkl::braked_adam_averaged`] | the same, where evaluation may use averaged weights ([`Srkl::swap_averaged`]) |
//! | [`ParamsSrkl::braked_muon_averaged`] | transformers: the lowest losses, for more time a step ([`Direction::Muon`]) |
//! | [`ParamsSrkl::braked_muon`] | the same without averages |
//! | [`ParamsSrkl::kinetic`] | full batches, convex problems, one state tensor less |
//! | [`ParamsSrkl::hessian`] | studies of curvature |
//! | [`ParamsSrkl::reference`] | the original rule, whose `lr` needs a search |
//! | [`ParamsSrkl::adamw`], [`ParamsSrkl::sgd`], [`ParamsSrkl::muon`], [`ParamsSrkl::lion`] | the plain optimizers, fused, with an `lr` of yours |
//!
//! # What it requires
//!
//! A step that measures computes the loss twice ([`Srkl::backward_step_with`]): the closure must be the same function of the
//! parameters each time. [`Dropout`] draws the same masks in both calls; [`random::current_seed`] seeds random layers of
//! your own.
//!
//! # Features
//!
//! | feature | what |
//! |---|---|
//! | `cuda` | steps on CUDA devices; needs nvcc to build and a driver to run |
//! | `nccl` | ranks whose CUDA devices talk by NCCL: `Nccl`; needs its library to build and run |
//! | `mpi` | ranks that are processes started by `mpirun`: `Mpi`; needs an MPI library and libclang to build |
//! | `serde` | `Serialize` and `Deserialize` for [`ParamsSrkl`], [`LrSchedule`] and [`GradScaler`] |
//! | `tracing` | events of steps and measurements by the crate `tracing`: see [`monitor`] |
//!
//! The interface has types of `candle-core` and `candle-nn` 0.11: with another version of these comes another of this crate.
//! (Feature `bindgen` is for work on the kernels.)
//!
//! # Where to go on
//!
//! - [`Srkl`]: groups, schedules ([`LrSchedule`]), gradient scale ([`GradScaler`]), checkpoints, state in memory, freezing,
//!   telemetry ([`monitor`]), loops of your own.
//! - [`ParamsSrkl`]: every setting, with its formula.
//! - [`monitor`]: telemetry as CSV, JSON lines, TensorBoard's files.
//! - [`numerics`]: why a step has the same bits on the CPU, for any number of threads, and on CUDA devices (feature `cuda`).
//! - The repository's README and `docs/`: what each preset reached, the brake for those who know SGD, speed.

#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod accumulate;
mod averages;
mod backend;
mod block;
mod builder;
mod checkpoint;
mod collective;
mod compact;
mod dropout;
mod engine;
mod estimate;
mod exchange;
mod file;
mod freezing;
mod growing;
mod loss_scale;
mod lr_schedule;
mod matching;
mod matrices;
mod measuring;
mod micro_batches;
pub mod monitor;
pub mod numerics;
mod optimizer;
mod params;
pub mod random;
mod ranks;
mod reduce;
mod rule;
mod scaling;
mod schedule;
mod shards;
mod snapshot;
mod state;
mod telemetry;

pub use averages::Averaged;
pub use builder::SrklBuilder;
#[cfg(feature = "mpi")]
pub use collective::Mpi;
#[cfg(feature = "nccl")]
pub use collective::Nccl;
pub use collective::{Collective, OnDevice, Tcp, Threads};
pub use dropout::Dropout;
pub use estimate::Measurements;
pub use loss_scale::GradScaler;
pub use lr_schedule::LrSchedule;
pub use matching::LoadReport;
pub use matrices::hidden_matrices;
pub use measuring::Perturbed;
pub use micro_batches::Reduction;
pub use optimizer::{DEFAULT_GROUP, Srkl};
pub use params::{
    Average, AverageFormat, Beta, Curvature, Direction, HutchinsonCurvature, MasterWeights,
    Measure, NonFinite, ParamsSrkl, Repeatable, Rounding, Scope, StateFormat, StepCurvature,
};
pub use snapshot::{Snapshot, SrklState};
pub use telemetry::BlockTelemetry;

/// The code of the README and of the pages compiles and runs.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;

    #[doc = include_str!("../docs/memory.md")]
    struct Memory;

    #[doc = include_str!("../docs/monitoring.md")]
    struct Monitoring;

    #[doc = include_str!("../docs/pytorch.md")]
    struct PyTorch;

    #[doc = include_str!("../docs/ranks.md")]
    struct Ranks;

    #[doc = include_str!("../docs/standing-still.md")]
    struct StandingStill;
}
