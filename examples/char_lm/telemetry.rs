//! What the optimizer tells of its steps, in files, and a picture of it.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_srkl::Srkl;
use candle_srkl::monitor::{Csv, JsonLines, TensorBoard};
use plotters::coord::Shift;
use plotters::prelude::*;
use serde::Deserialize;

const CSV: &str = "telemetry.csv";
const SIZE: (u32, u32) = (1000, 360);

/// Okabe and Ito's, which colour-blind readers can tell apart too.
const COLOR: RGBColor = RGBColor(0, 114, 178);

/// `telemetry.csv`, `telemetry.jsonl` and TensorBoard's event file.
pub struct Files {
    csv: Csv<File>,
    json: JsonLines<File>,
    board: TensorBoard<File>,
}

impl Files {
    /// Those of a new training, or, if the next step is not the first, goes on with those that are there.
    pub fn open(folder: &Path, next: u64) -> Result<Self> {
        let mut board = TensorBoard::create(folder)?;
        board.purge_from(next)?;
        let (csv, json) = (folder.join(CSV), folder.join("telemetry.jsonl"));
        let (csv, json) = match next {
            1 => (Csv::create(csv)?, JsonLines::create(json)?),
            _ => (Csv::append(csv)?, JsonLines::append(json)?),
        };
        Ok(Self { csv, json, board })
    }

    /// Writes what the last step did, which waits for a device; and the loss before it.
    pub fn write(&mut self, optimizer: &Srkl, loss: f64) -> Result<()> {
        let metrics = optimizer.metrics()?;
        self.csv.write(&metrics)?;
        self.json.write(&metrics)?;
        self.board.write(&metrics)?;
        Ok(self.board.add_scalar("loss", loss, metrics.step)?)
    }
}

/// A row of `telemetry.csv`, as far as it is drawn.
#[derive(Deserialize)]
struct Row {
    step: u64,
    phi: Option<f64>,
    curvature: Option<f64>,
    step_norm: Option<f64>,
    param_norm: Option<f64>,
}

/// Draws `telemetry.svg` from the `telemetry.csv` in a folder: of each step that was written the lowest, the median and the
/// highest over all parameters.
pub fn draw(folder: &Path) -> Result<PathBuf> {
    let csv = folder.join(CSV);
    let name = || csv.display().to_string();
    let mut reader = csv::Reader::from_path(&csv).with_context(name)?;
    let mut rows: Vec<Row> = vec![];
    for row in reader.deserialize() {
        let row: Row = row.with_context(name)?;
        // Steps after a checkpoint that the training was taken up from are there twice: the later count.
        if rows.last().is_some_and(|last| last.step > row.step) {
            rows.retain(|before| before.step < row.step);
        }
        rows.push(row);
    }
    let path = folder.join("telemetry.svg");
    let area = SVGBackend::new(&path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let panels = area.split_evenly((1, 3));
    panel(&panels[0], "H, the curvature", &rows, |row| row.curvature)?;
    panel(&panels[1], "phi, the brake", &rows, |row| row.phi)?;
    panel(&panels[2], "step_norm / param_norm", &rows, |row| {
        Some(row.step_norm? / row.param_norm?)
    })?;
    area.present()?;
    drop((panels, area));
    Ok(path)
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    rows: &[Row],
    value: impl Fn(&Row) -> Option<f64>,
) -> Result<()> {
    let steps = rows.chunk_by(|a, b| a.step == b.step);
    let points: Vec<(f64, [f64; 3])> = steps
        .filter_map(|rows| {
            // What a logarithmic axis can show.
            let shown = |x: &f64| *x > 0. && x.is_finite();
            let mut values: Vec<f64> = rows.iter().filter_map(&value).filter(shown).collect();
            values.sort_by(f64::total_cmp);
            let (low, high) = (*values.first()?, *values.last()?);
            Some((rows[0].step as f64, [low, values[values.len() / 2], high]))
        })
        .collect();
    let end = points.iter().map(|point| point.0).fold(1., f64::max);
    let all = || points.iter().flat_map(|point| point.1);
    let y = decades(all().reduce(f64::min).unwrap_or(1.), all().reduce(f64::max).unwrap_or(1.));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(10)
        .margin_right(22)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(0. ..end, y.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_labels(5)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&scale)
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let forth = points.iter().map(|&(x, [low, ..])| (x, low));
    let back = points.iter().rev().map(|&(x, [.., high])| (x, high));
    let band: Vec<_> = forth.chain(back).collect();
    chart.draw_series([Polygon::new(band, COLOR.mix(0.2))])?;
    let median = points.iter().map(|&(x, [_, median, _])| (x, median));
    chart.draw_series(LineSeries::new(median, COLOR.stroke_width(2)))?;
    Ok(())
}

/// One, two and five of a decade: the others would overlap.
fn scale(y: &f64) -> String {
    let label = format!("{y:.0e}");
    if label.starts_with(['1', '2', '5']) { label } else { String::new() }
}

/// Whole decades, a little wider, so that rounding takes no decade's label away.
fn decades(least: f64, most: f64) -> Range<f64> {
    let (least, most) = (least.log10().floor(), most.log10().ceil());
    0.99 * 10f64.powf(least)..1.01 * 10f64.powf(most.max(least + 1.))
}
