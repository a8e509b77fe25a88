//! The pictures, in SVG.

use std::path::Path;

use SeriesLabelPosition::{LowerRight, UpperRight};
use anyhow::Result;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::train::Curve;

const WIDTH: u32 = 900;
const HEIGHT: u32 = 480;

/// Okabe and Ito's, which colour-blind readers can tell apart too.
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

#[derive(Clone)]
pub struct Line {
    pub label: String,
    pub curve: Curve,
    /// In pixels. The first line is drawn first: a wide one shows under others.
    pub width: u32,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws the training loss of each optimizer.
pub fn loss(path: &Path, lines: &[Line]) -> Result<()> {
    let area = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    log_panel(&area, "Training loss", "cross entropy, mean over the epoch", lines)?;
    Ok(area.present()?)
}

/// Draws `phi / lr` of each parameter tensor and, as that is often close to 1, what it lacks of 1.
pub fn brake(path: &Path, lines: &[Line]) -> Result<()> {
    let mut lacking = lines.to_vec();
    lacking.iter_mut().flat_map(|line| &mut line.curve).for_each(|(_, y)| *y = 1. - *y);

    let area = SVGBackend::new(path, (WIDTH, 2 * HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(HEIGHT);
    linear_panel(&upper, "Brake of each parameter tensor", "phi / lr, mean over the epoch", lines)?;
    log_panel(
        &lower,
        "What it takes off the learning rate",
        "1 - phi / lr, mean over the epoch",
        &lacking,
    )?;
    Ok(area.present()?)
}

/// Of values up to 1.
fn linear_panel(area: &Area, title: &str, y_label: &str, lines: &[Line]) -> Result<()> {
    let span = 1. - values(lines).fold(1. - 1e-6, f64::min);
    let decimals = (1. - span.log10().floor()) as usize;
    let format = |y: &f64| format!("{y:.decimals$}");
    panel(area, title, y_label, 1. - 1.05 * span..1. + 0.05 * span, &format, LowerRight, lines)
}

/// Of whole decades; leaves out what a logarithmic axis can't show.
fn log_panel(area: &Area, title: &str, y_label: &str, lines: &[Line]) -> Result<()> {
    let mut lines = lines.to_vec();
    for line in &mut lines {
        line.curve.retain(|&(_, y)| y > 0. && y.is_finite());
    }
    let least = values(&lines).reduce(f64::min).unwrap_or(1.).log10().floor();
    let most = values(&lines).reduce(f64::max).unwrap_or(1.).log10().ceil().max(least + 1.);
    // A little wider, so that rounding takes no decade's label away.
    let range = 0.99 * 10f64.powf(least)..1.01 * 10f64.powf(most);
    panel(area, title, y_label, range.log_scale(), &|y| format!("{y:.0e}"), UpperRight, &lines)
}

fn panel<Y>(
    area: &Area,
    title: &str,
    y_label: &str,
    y: Y,
    y_format: &dyn Fn(&f64) -> String,
    legend: SeriesLabelPosition,
    lines: &[Line],
) -> Result<()>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let epochs = lines.iter().flat_map(|line| &line.curve).map(|&(x, _)| x);
    let first = epochs.clone().reduce(f64::min).unwrap_or(1.);
    let last = epochs.reduce(f64::max).unwrap_or(1.);
    // No more than one for each whole epoch.
    let x_labels = ((last - first) as usize + 2).min(11);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 24))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(84)
        .build_cartesian_2d(first - 1.0..last, y)?;
    chart
        .configure_mesh()
        .x_desc("epoch")
        .y_desc(y_label)
        .x_labels(x_labels)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(y_format)
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 15))
        .bold_line_style(BLACK.mix(0.15))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (line, color) in lines.iter().zip(COLORS.iter().cycle()) {
        let style = color.stroke_width(line.width);
        // A single epoch makes no line.
        let point_size = if line.curve.len() == 1 { 3 } else { 0 };
        let points = line.curve.iter().copied();
        chart
            .draw_series(LineSeries::new(points, style).point_size(point_size))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .legend_area_size(30)
        .label_font(("sans-serif", 16))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

fn values(lines: &[Line]) -> impl Iterator<Item = f64> {
    lines.iter().flat_map(|line| &line.curve).map(|&(_, y)| y)
}
