#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod backend;
mod block;
#[cfg(feature = "cuda")]
mod cuda;
mod curvature;
mod dropout;
mod estimate;
mod file;
pub mod numerics;
mod optimizer;
mod params;
pub mod random;
mod rule;
mod state;

pub use curvature::{Averaged, Perturbed};
pub use dropout::Dropout;
pub use estimate::Measurements;
pub use optimizer::{BlockTelemetry, DEFAULT_GROUP, Srkl, SrklBuilder};
pub use params::{
    Beta, Curvature, Direction, MasterWeights, NonFinite, ParamsSrkl, Repeatable, Scope,
};
