//! Metrics of a training for people and programs to read: rows of CSV or JSON lines, TensorBoard's event files and, with
//! feature `tracing`, events.
//!
//! [`Srkl::metrics`] reads what the last step did; the writers take what it has read. **Nothing is read from a device at any
//! other time**: an optimizer that is not asked takes its steps as ever, and writing does not wait for a device either.
//!
//! ```
//! use candle_core::{Device, Var};
//! use candle_nn::Optimizer;
//! use candle_srkl::monitor::{Csv, JsonLines, TensorBoard};
//! use candle_srkl::{ParamsSrkl, Srkl};
//!
//! let w = Var::new(&[3f32, -4.], &Device::Cpu)?;
//! let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! let mut csv = Csv::create(folder.join("telemetry.csv"))?;
//! let mut json = JsonLines::create(folder.join("telemetry.jsonl"))?;
//! let mut board = TensorBoard::create(folder)?;
//! opt.record_norms(true);
//! for step in 1..=20 {
//!     let loss = opt.backward_step_with(|| w.sqr()?.sum_all())?;
//!     if step % 10 == 0 {
//!         let metrics = opt.metrics()?;
//!         csv.write(&metrics)?;
//!         json.write(&metrics)?;
//!         board.write(&metrics)?;
//!         board.add_scalar("loss", loss.to_scalar::<f32>()?.into(), metrics.step)?;
//!     }
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! The repository's `docs/monitoring.md` has the columns, and how to read them.
//!
//! Each call gives all of its bytes to the underlying [`Write`] in one `write_all`. A file is written without a buffer, so that
//! a program that ends in the middle of a training has lost nothing; what wraps a [`BufWriter`](std::io::BufWriter) has to
//! flush it. If writing fails, as on a full disk, a part of the row may be in the file: `append` cuts it off. (TensorBoard reads a file
//! up to such a place: go on with another one, by `create`.)
//!
//! # Events
//!
//! With feature `tracing` the optimizer emits events of the crate `tracing`, with the target `candle_srkl`; `step` numbers the calls, in
//! which replays of captured steps are not counted:
//!
//! | level | message | fields | when |
//! |---|---|---|---|
//! | debug | `step` | `step`, `multiplier` (of the schedule), `measures` (whether `observe` is to follow) | a step was taken; on a CUDA device, taken or skipped |
//! | debug | `curvature measured` | `step`, `parameters`, `estimates` (how many of them have one now) | a measurement is complete |
//! | warn | `step skipped: ..` | `step`, `skipped_steps` | `NonFinite::SkipStep` skipped it, where the host decides that; on a CUDA device only [`Metrics`] tell |
//! | info | `parameter` | [`COLUMNS`] | `Metrics::emit` was called, for each parameter |
//!
//! # Ranks
//!
//! Of several ranks one has to write: the others have the same metrics. Where [`Srkl::telemetry`] is a call of all ranks, so is
//! [`Srkl::metrics`].

#[cfg(feature = "tracing")]
mod events;
mod rows;
mod tensorboard;

use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Error, Result};

use crate::optimizer::Srkl;
use crate::telemetry::BlockTelemetry;

pub use rows::{COLUMNS, Csv, JsonLines};
pub use tensorboard::TensorBoard;

/// What the last step did, and where the training is: read by [`Srkl::metrics`].
///
/// To write fewer parameters, take them out of the list:
///
/// ```
/// # use candle_core::{Device, Var};
/// # use candle_nn::Optimizer;
/// # use candle_srkl::{ParamsSrkl, Srkl};
/// # let w = Var::new(&[3f32, -4.], &Device::Cpu)?;
/// # let opt = Srkl::new(vec![w], ParamsSrkl::braked_adam())?;
/// let mut metrics = opt.metrics()?;
/// metrics.parameters.retain(|parameter| parameter.name.ends_with("weight"));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Metrics {
    /// The number of steps so far, taken and skipped: a checkpoint goes on with it.
    pub step: u64,
    /// How many of them [`NonFinite::SkipStep`](crate::NonFinite::SkipStep) has skipped.
    pub skipped_steps: u64,
    /// That of the last step, or what has been set since then: the schedule's multiplier times the `lr` of the default group.
    pub learning_rate: f64,
    /// Each parameter, in order.
    pub parameters: Vec<BlockTelemetry>,
}

impl Srkl {
    /// [`Srkl::telemetry`] with the number of the step, for the writers of [`monitor`](crate::monitor). Waits for a device, if
    /// the numbers are there.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The numbers may live on a device, or on other ranks.)
    pub fn metrics(&self) -> Result<Metrics> {
        let parameters = self.telemetry()?;
        let skipped_steps = self.skipped_steps()?;
        let step = self.steps()? + skipped_steps;
        let learning_rate = self.multiplier() * self.base_lr().unwrap_or(0.);
        Ok(Metrics { step, skipped_steps, learning_rate, parameters })
    }
}

/// Where bytes go; its errors name the file.
#[derive(Debug)]
struct Out<W> {
    writer: W,
    path: Option<PathBuf>,
}

impl<W: Write> Out<W> {
    fn new(writer: W) -> Self {
        Self { writer, path: None }
    }

    fn of_file(writer: W, path: &Path) -> Self {
        Self { writer, path: Some(path.to_path_buf()) }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|e| match &self.path {
            Some(path) => Error::from(e).with_path(path),
            None => e.into(),
        })
    }
}
