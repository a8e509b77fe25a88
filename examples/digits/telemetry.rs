//! What SRKL tells of its steps, in files.

use std::fs::File;
use std::num::NonZeroU64;
use std::path::Path;

use anyhow::Result;
use candle_srkl::Srkl;
use candle_srkl::monitor::{Csv, JsonLines, TensorBoard};

use crate::train::{AnyOptimizer, Training};

/// `telemetry.csv`, `telemetry.jsonl` and TensorBoard's event file.
pub struct Files {
    every: NonZeroU64,
    csv: Csv<File>,
    json: JsonLines<File>,
    board: TensorBoard<File>,
}

impl Files {
    /// In a folder of the training's own. A training that is resumed goes on with those that are there. `None` for the
    /// optimizers of others.
    pub fn open(folder: &Path, every: NonZeroU64, training: &mut Training) -> Result<Option<Self>> {
        let AnyOptimizer::Srkl(srkl) = &mut training.optimizer else { return Ok(None) };
        srkl.record_norms(true);
        let (settings, next) = (&training.settings, training.steps as u64 + 1);
        let rule = settings.rule.name().replace(' ', "-");
        let folder = folder.join(format!("{rule}-lr-{:?}-seed-{}", settings.lr, settings.seed));
        let mut board = TensorBoard::create(&folder)?;
        board.purge_from(next)?;
        let (csv, json) = (folder.join("telemetry.csv"), folder.join("telemetry.jsonl"));
        let (csv, json) = match next {
            1 => (Csv::create(csv)?, JsonLines::create(json)?),
            _ => (Csv::append(csv)?, JsonLines::append(json)?),
        };
        Ok(Some(Self { every, csv, json, board }))
    }

    /// Writes what the last step did, if it is one of those that are written; and the loss before it.
    pub fn write(&mut self, step: usize, optimizer: &Srkl, loss: f64) -> Result<()> {
        if !(step as u64).is_multiple_of(self.every.get()) {
            return Ok(());
        }
        let metrics = optimizer.metrics()?;
        self.csv.write(&metrics)?;
        self.json.write(&metrics)?;
        self.board.write(&metrics)?;
        Ok(self.board.add_scalar("loss", loss, metrics.step)?)
    }
}
