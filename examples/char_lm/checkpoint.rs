//! Checkpoints of a training, each a folder `step-N` of the model, the optimizer's state, and
//! `training.json` with the step and the settings.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::train::Training;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const TRAINING: &str = "training.json";

/// Saves a checkpoint in the folder `out`, and then removes those before it.
pub fn save(out: &Path, training: &mut Training) -> Result<()> {
    // It has its name only when it is complete.
    let unfinished = out.join("unfinished");
    if training.optimizer.rank() > 0 {
        // Rank 0 writes, and each has state to give.
        return Ok(training.optimizer.save(unfinished.join(OPTIMIZER))?);
    }
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
    }
    fs::create_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
    training.optimizer.save(unfinished.join(OPTIMIZER))?;
    training.model.varmap.save(unfinished.join(MODEL))?;
    let position = json!({ "step": training.step, "settings": training.settings.describe() });
    fs::write(unfinished.join(TRAINING), format!("{position:#}\n"))?;

    let before = all(out)?;
    fs::rename(&unfinished, out.join(format!("step-{}", training.step)))?;
    for (_, folder) in before {
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    Ok(())
}

/// The last checkpoint in the folder `out`.
pub fn last(out: &Path) -> Result<Option<PathBuf>> {
    Ok(all(out)?.into_iter().max().map(|(_, folder)| folder))
}

/// Puts a new training of the same settings where that of the checkpoint was.
pub fn restore(folder: &Path, training: &mut Training) -> Result<()> {
    let path = folder.join(TRAINING);
    let position = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let position: Value =
        serde_json::from_str(&position).with_context(|| path.display().to_string())?;
    let (saved, given) = (&position["settings"], json!(training.settings.describe()));
    let name = folder.display();
    ensure!(*saved == given, "{name} was made with other options:\n{saved}\ninstead of\n{given}");
    let step = position["step"].as_u64();
    training.step = step.with_context(|| format!("{}: no step", path.display()))?;
    // The parameters first: the optimizer's state is checked against them.
    training.model.varmap.load(folder.join(MODEL))?;
    Ok(training.optimizer.load(folder.join(OPTIMIZER))?)
}

/// The steps and folders of all checkpoints in `out`.
fn all(out: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut checkpoints = vec![];
    for entry in fs::read_dir(out).with_context(|| out.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
        checkpoints.extend(step.map(|step| (step, entry.path())));
    }
    Ok(checkpoints)
}
