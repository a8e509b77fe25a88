//! How a training went, one row for each report: `curve.csv`. A resumed training goes on with it.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Deserialize, Serialize)]
pub struct Point {
    pub step: u64,
    /// Computed so far.
    pub gradients: u64,
    /// That steps took so far, with their gradients.
    pub seconds: f64,
    /// The mean since the last row.
    pub loss: f64,
    pub held_out: f64,
}

/// The rows up to a step.
pub fn read(path: &Path, step: u64) -> Result<Vec<Point>> {
    if !path.exists() {
        return Ok(vec![]);
    }
    let name = || path.display().to_string();
    let mut reader = csv::Reader::from_path(path).with_context(name)?;
    let points = reader.deserialize().collect::<csv::Result<Vec<Point>>>().with_context(name)?;
    Ok(points.into_iter().filter(|point| point.step <= step).collect())
}

pub fn write(path: &Path, points: &[Point]) -> Result<()> {
    let name = || path.display().to_string();
    let mut writer = csv::Writer::from_path(path).with_context(name)?;
    points.iter().try_for_each(|point| writer.serialize(point)).with_context(name)?;
    writer.flush().with_context(name)
}
