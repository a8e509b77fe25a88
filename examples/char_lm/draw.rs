//! Trainings beside each other: a picture of their held-out losses and a table.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::curve::{self, Point};

const SIZE: (u32, u32) = (1000, 440);

/// Of the losses: those above its end, of the first steps, are not drawn.
const WIDTH: f64 = 0.8;

/// Okabe and Ito's, which colour-blind readers can tell apart too.
const COLORS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// The curves of trainings that differ in their seeds.
struct Trainings {
    name: String,
    curves: Vec<Vec<Point>>,
}

/// Reads `FOLDER/NAME/SEED/curve.csv`, writes `curves.svg` in the folder, where each name has a
/// colour and each seed a line, and prints a row for each name.
pub fn draw(folder: &Path) -> Result<PathBuf> {
    let mut all = vec![];
    for path in folders(folder)? {
        let read = |seed: &PathBuf| curve::read(&seed.join("curve.csv"), u64::MAX);
        let mut curves = folders(&path)?.iter().map(read).collect::<Result<Vec<_>>>()?;
        curves.retain(|curve| !curve.is_empty());
        let name = path.file_name().context("no name")?.to_string_lossy().into_owned();
        if !curves.is_empty() {
            all.push(Trainings { name, curves });
        }
    }
    let expected = "expected FOLDER/NAME/SEED/curve.csv: trainings with --out FOLDER/NAME/SEED";
    ensure!(!all.is_empty(), "{}: {expected}", folder.display());
    table(&all);
    let path = folder.join("curves.svg");
    picture(&path, &all)?;
    Ok(path)
}

/// The folders in a folder, by name.
fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut folders: Vec<PathBuf> = paths.into_iter().filter(|path| path.is_dir()).collect();
    folders.sort();
    Ok(folders)
}

fn table(all: &[Trainings]) {
    println!("| training | held-out loss, a seed each | mean | gradients | ms a gradient |");
    println!("|---|---|---|---|---|");
    for Trainings { name, curves } in all {
        let ends: Vec<&Point> = curves.iter().filter_map(|curve| curve.last()).collect();
        let mean = |value: fn(&Point) -> f64| {
            ends.iter().map(|p| value(p)).sum::<f64>() / ends.len() as f64
        };
        let losses: Vec<String> = ends.iter().map(|end| format!("{:.3}", end.held_out)).collect();
        println!(
            "| {name} | {} | {:.3} | {:.0} | {:.1} |",
            losses.join(", "),
            mean(|end| end.held_out),
            mean(|end| end.gradients as f64),
            mean(|end| 1e3 * end.seconds / end.gradients as f64),
        );
    }
}

fn picture(path: &Path, all: &[Trainings]) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let points = all.iter().flat_map(|trainings| &trainings.curves).flatten();
    let least = points.map(|point| point.held_out).fold(f64::INFINITY, f64::min);
    let losses = least - 0.02..least + WIDTH;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    panel(&left, all, "gradients", |point| point.gradients as f64, losses.clone())?;
    panel(&right, all, "minutes", |point| point.seconds / 60., losses)?;
    Ok(area.present()?)
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    all: &[Trainings],
    x_label: &str,
    x: impl Fn(&Point) -> f64,
    losses: Range<f64>,
) -> Result<()> {
    let points = all.iter().flat_map(|trainings| &trainings.curves).flatten();
    let end = points.map(&x).fold(0., f64::max);
    let top = losses.end;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d(0. ..end, losses)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc("held-out nats a character")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.1}"))
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (trainings, color) in all.iter().zip(COLORS.iter().cycle()) {
        for (number, curve) in trainings.curves.iter().enumerate() {
            let shown = curve.iter().filter(|point| point.held_out <= top);
            let line: Vec<_> = shown.map(|point| (x(point), point.held_out)).collect();
            let series = chart.draw_series(LineSeries::new(line, color.stroke_width(2)))?;
            if number == 0 {
                series.label(&trainings.name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2))
                });
            }
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .legend_area_size(28)
        .label_font(("sans-serif", 14))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
