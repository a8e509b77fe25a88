#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod backend;
mod block;
mod builder;
mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod estimate;
mod file;
mod measuring;
pub mod numerics;
mod optimizer;
mod params;
pub mod random;
mod rule;
mod schedule;
mod telemetry;

pub use builder::SrklBuilder;
pub use dropout::Dropout;
pub use estimate::Measurements;
pub use measuring::{Averaged, Perturbed};
pub use optimizer::{DEFAULT_GROUP, Srkl};
pub use params::{
    Beta, Curvature, Direction, MasterWeights, NonFinite, ParamsSrkl, Repeatable, Scope,
};
pub use telemetry::BlockTelemetry;
