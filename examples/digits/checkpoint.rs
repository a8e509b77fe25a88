//! A training by SRKL in a folder: `model.safetensors`, `optimizer.safetensors`, and `run.txt` with
//! the settings, a name and a value a line.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use candle_srkl::Srkl;

use crate::train::{AnyOptimizer, Settings, Training};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const RUN: &str = "run.txt";

pub struct Checkpoint {
    folder: PathBuf,
    pub epochs: usize,
    pub lr: f64,
    pub settings: Settings,
}

impl Checkpoint {
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RUN);
        let context = || path.display().to_string();
        let text = fs::read_to_string(&path).with_context(context)?;
        let values = text.lines().filter_map(|line| line.split_once(' ')).collect();
        Self::parse(folder, &values).with_context(context)
    }

    fn parse(folder: &Path, values: &HashMap<&str, &str>) -> Result<Self> {
        let settings = Settings {
            beta: value(values, "beta")?,
            batch: value(values, "batch")?,
            dtype: value(values, "dtype")?,
            seed: value(values, "seed")?,
        };
        Ok(Self {
            folder: folder.to_path_buf(),
            epochs: value(values, "epochs")?,
            lr: value(values, "lr")?,
            settings,
        })
    }

    /// Puts a new training of the same settings where the saved one was.
    pub fn restore(&self, training: &mut Training) -> Result<()> {
        // The parameters first: the optimizer's state is checked against them.
        training.model.varmap.load(self.folder.join(MODEL))?;
        Ok(srkl(training)?.load(self.folder.join(OPTIMIZER))?)
    }
}

/// Saves a training of so many epochs in a folder that exists.
pub fn save(folder: &Path, training: &mut Training, epochs: usize, lr: f64) -> Result<()> {
    let Settings { beta, batch, dtype, seed } = training.settings.clone();
    let dtype = dtype.as_str();
    training.model.varmap.save(folder.join(MODEL))?;
    srkl(training)?.save(folder.join(OPTIMIZER))?;
    let run = format!(
        "epochs {epochs}\nlr {lr}\nbeta {beta}\nbatch {batch}\ndtype {dtype}\nseed {seed}\n"
    );
    let path = folder.join(RUN);
    fs::write(&path, run).with_context(|| path.display().to_string())
}

fn srkl(training: &mut Training) -> Result<&mut Srkl> {
    match &mut training.optimizer {
        AnyOptimizer::Srkl(srkl) => Ok(srkl),
        _ => bail!("only SRKL's state can be saved and loaded"),
    }
}

fn value<T: FromStr>(values: &HashMap<&str, &str>, name: &str) -> Result<T>
where
    T::Err: Error + Send + Sync + 'static,
{
    let value = values.get(name).with_context(|| format!("`{name}` is missing"))?;
    value.parse().with_context(|| format!("`{name}` is not valid: {value:?}"))
}
