//! The pictures, in SVG.

use std::ops::Range;
use std::path::{Path, PathBuf};

use SeriesLabelPosition::{LowerRight, MiddleRight, UpperRight};
use anyhow::Result;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::study::{Row, Run, Study};
use crate::train::{Point, Rule};

const SIZE: (u32, u32) = (900, 480);

/// About so many points make a line over time, each the mean of those it stands for.
const POINTS: usize = 50;

/// Of those that braked Adam was tried at, every so many are drawn.
const RATES: usize = 4;

/// Okabe and Ito's, which colour-blind readers can tell apart too.
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

struct Line {
    label: String,
    points: Vec<(f64, f64)>,
    /// In pixels. The first line is drawn first: a wide one shows under others.
    width: u32,
    /// A point with a ring around it.
    ring: Option<(f64, f64)>,
}

/// Writes `loss.svg`, and, if there is anything to show by them, `accuracy.svg` and `brake.svg`.
/// Returns where they are.
pub fn draw(folder: &Path, studies: &[Study]) -> Result<Vec<PathBuf>> {
    let [accuracy, loss, brake] =
        ["accuracy.svg", "loss.svg", "brake.svg"].map(|name| folder.join(name));
    let mut written = vec![];

    let lines: Vec<Line> = studies.iter().filter(|study| study.rows.len() > 1).map(rates).collect();
    if !lines.is_empty() {
        let title = "Does the learning rate matter?";
        let x = log_range(lines.iter().flat_map(|line| &line.points).map(|point| point.0));
        let axes = ("learning rate", x.log_scale(), "held-out accuracy", 0. ..1.);
        let percent = |y: &f64| format!("{:.0}%", 100. * y);
        panel(&accuracy, title, axes, &power, &percent, MiddleRight, &lines)?;
        written.push(accuracy);
    }

    let lines: Vec<Line> = studies.iter().map(losses).collect();
    over_time(&loss, "Training loss", "cross entropy", UpperRight, &lines)?;
    written.push(loss);

    let lines: Vec<Line> = studies.first().map_or(vec![], phis);
    if !lines.is_empty() {
        over_time(&brake, "The brake", "phi", LowerRight, &lines)?;
        written.push(brake);
    }
    Ok(written)
}

/// The accuracy at each learning rate.
fn rates(study: &Study) -> Line {
    let point = |row: &Row| (row.lr, row.mean(|run| run.held_out.accuracy));
    Line {
        label: format!("{}; ring: {}", study.rule.name(), study.origin()),
        points: study.rows.iter().map(point).collect(),
        width: width(study.rule),
        ring: Some(point(study.shown())),
    }
}

/// The loss of the first seed, at the learning rate that is shown.
fn losses(study: &Study) -> Line {
    let row = study.shown();
    Line {
        label: format!("{}, lr {:?}", study.rule.name(), row.lr),
        points: smooth(row.runs[0], |point| Some(point.loss)),
        width: width(study.rule),
        ring: None,
    }
}

/// The brake of the first seed, at some of the learning rates.
fn phis(study: &Study) -> Vec<Line> {
    let shown = study.shown().lr;
    let rows = study.rows.iter().enumerate();
    let drawn = rows.filter(|(i, row)| i % RATES == 0 || row.lr == shown);
    let line = |(_, row): (usize, &Row)| Line {
        label: format!("{}, lr {:?}", study.rule.name(), row.lr),
        points: smooth(row.runs[0], |point| point.phi),
        width: 2,
        ring: None,
    };
    drawn.map(line).filter(|line| !line.points.is_empty()).collect()
}

/// SGD's line is often so close that it covers the reference's.
fn width(rule: Rule) -> u32 {
    if rule == Rule::Reference { 5 } else { 2 }
}

fn smooth(run: &Run, value: impl Fn(&Point) -> Option<f64>) -> Vec<(f64, f64)> {
    let mut smooth = vec![];
    for points in run.points.chunks(run.points.len().div_ceil(POINTS)) {
        let values: Vec<f64> = points.iter().filter_map(&value).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        // What a logarithmic axis can show.
        if mean > 0. && mean.is_finite() {
            smooth.push((points[points.len() - 1].gradients as f64, mean));
        }
    }
    smooth
}

fn over_time(
    path: &Path,
    title: &str,
    y_label: &str,
    legend: SeriesLabelPosition,
    lines: &[Line],
) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = 0. ..points().map(|point| point.0).fold(1., f64::max);
    let y = log_range(points().map(|point| point.1)).log_scale();
    panel(path, title, ("gradients", x, y_label, y), &|x| format!("{x:.0}"), &power, legend, lines)
}

/// Of whole decades.
fn log_range(values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let least = values.clone().reduce(f64::min).unwrap_or(1.).log10().floor();
    let most = values.reduce(f64::max).unwrap_or(1.).log10().ceil().max(least + 1.);
    // A little wider, so that rounding takes no decade's label away.
    0.99 * 10f64.powf(least)..1.01 * 10f64.powf(most)
}

fn power(value: &f64) -> String {
    format!("{value:.0e}")
}

fn panel<X, Y>(
    path: &Path,
    title: &str,
    (x_label, x, y_label, y): (&str, X, &str, Y),
    x_format: &dyn Fn(&f64) -> String,
    y_format: &dyn Fn(&f64) -> String,
    legend: SeriesLabelPosition,
    lines: &[Line],
) -> Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 24))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(84)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .x_label_formatter(x_format)
        .y_label_formatter(y_format)
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 15))
        .bold_line_style(BLACK.mix(0.15))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (line, color) in lines.iter().zip(COLORS.iter().cycle()) {
        let style = color.stroke_width(line.width);
        // A single one makes no line.
        let size = if line.points.len() == 1 { 3 } else { 0 };
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style).point_size(size))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        chart.draw_series(line.ring.map(|point| Circle::new(point, 7, color.stroke_width(2))))?;
    }
    chart
        .configure_series_labels()
        .position(legend)
        .legend_area_size(30)
        .label_font(("sans-serif", 16))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(area.present()?)
}
