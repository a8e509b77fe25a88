//! A training by SRKL in a folder: `model.safetensors`, `optimizer.safetensors`, and `run.txt` with
//! the settings and how far it is, a name and a value a line.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use candle_srkl::Srkl;
use clap::ValueEnum;

use crate::train::{AnyOptimizer, Rule, Settings, Training};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const RUN: &str = "run.txt";

/// Saves a training in a folder that exists.
pub fn save(folder: &Path, training: &mut Training) -> Result<()> {
    training.model.varmap.save(folder.join(MODEL))?;
    srkl(training)?.save(folder.join(OPTIMIZER))?;
    let Training { steps, gradients, .. } = training;
    let Settings { rule, lr, beta, batch, dtype, seed } = &training.settings;
    let rule = rule.to_possible_value().context("every optimizer has a name")?;
    let (rule, dtype) = (rule.get_name(), dtype.as_str());
    let run = format!(
        "optimizer {rule}\nlr {lr}\nbeta {beta}\nbatch {batch}\ndtype {dtype}\nseed {seed}\n\
         steps {steps}\ngradients {gradients}\n"
    );
    let path = folder.join(RUN);
    fs::write(&path, run).with_context(|| path.display().to_string())
}

/// Goes on where the saved training was.
pub fn load(folder: &Path, device: &Device) -> Result<Training> {
    let path = folder.join(RUN);
    let context = || path.display().to_string();
    let text = fs::read_to_string(&path).with_context(context)?;
    let values = text.lines().filter_map(|line| line.split_once(' ')).collect();
    let (settings, steps, gradients) = parse(&values).with_context(context)?;
    let mut training = Training::new(settings, device)?;
    (training.steps, training.gradients) = (steps, gradients);
    // The parameters first: the optimizer's state is checked against them.
    training.model.varmap.load(folder.join(MODEL))?;
    srkl(&mut training)?.load(folder.join(OPTIMIZER))?;
    Ok(training)
}

/// The settings, steps and gradients.
fn parse(values: &HashMap<&str, &str>) -> Result<(Settings, usize, usize)> {
    let rule: String = value(values, "optimizer")?;
    let settings = Settings {
        rule: Rule::from_str(&rule, false).map_err(anyhow::Error::msg)?,
        lr: value(values, "lr")?,
        beta: value(values, "beta")?,
        batch: value(values, "batch")?,
        dtype: value(values, "dtype")?,
        seed: value(values, "seed")?,
    };
    Ok((settings, value(values, "steps")?, value(values, "gradients")?))
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
