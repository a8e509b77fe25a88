//! The pictures, in SVG: a panel for each task, a line for each optimizer.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::optimizers::Rule;
use crate::results::Results;
use crate::run::Point;
use crate::table::{Study, Summary};
use crate::tasks::{Kind, Task};

const COLUMNS: usize = 3;
const PANEL: (u32, u32) = (460, 340);
/// Of a row of the legend.
const ROW: u32 = 22;

/// The least value that a logarithmic axis shows.
const LEAST: f64 = 1e-16;

struct Panel {
    title: &'static str,
    x_label: &'static str,
    y_label: &'static str,
    x: Axis,
    y: Axis,
    lines: Vec<Line>,
}

struct Line {
    rule: Rule,
    points: Vec<(f64, f64)>,
}

/// Points outside are drawn at its ends.
struct Axis {
    range: Range<f64>,
    log: bool,
}

/// Writes `score.svg`, `loss.svg` and `brake.svg`, and returns where they are.
pub fn draw(
    folder: &Path,
    studies: &[(Study, Vec<Summary>)],
    results: &Results,
) -> Result<Vec<PathBuf>> {
    let mut curves = vec![];
    for (study, summaries) in studies {
        let mut of_task = vec![];
        for Summary { rule, .. } in summaries {
            // Those that are only judged by averages train as the others.
            if !rule.averages() {
                let curve = results.curve(study.drawn(*rule))?.unwrap_or_default();
                of_task.push((*rule, curve));
            }
        }
        curves.push((study.task, of_task));
    }
    let score = studies.iter().map(|(study, summaries)| score(study.task, summaries)).collect();
    let loss = curves.iter().map(|(task, curves)| loss(*task, curves)).collect();
    let brake = curves.iter().map(|(task, curves)| brake(*task, curves)).collect();
    let mut written = vec![];
    let pictures: [(_, Vec<Panel>); 3] =
        [("score.svg", score), ("loss.svg", loss), ("brake.svg", brake)];
    for (name, panels) in pictures {
        let path = folder.join(name);
        picture(&path, &panels)?;
        written.push(path);
    }
    Ok(written)
}

/// The score at each learning rate; where runs diverged, at the panel's bad end.
fn score(task: Task, summaries: &[Summary]) -> Panel {
    let kind = task.kind();
    let worst = if kind == Kind::Accuracy { 0. } else { f64::INFINITY };
    let line = |summary: &Summary| Line {
        rule: summary.rule,
        points: summary.scores.iter().map(|&(lr, score)| (lr, score.unwrap_or(worst))).collect(),
    };
    let lines: Vec<Line> = summaries.iter().map(line).collect();
    let y = match kind {
        Kind::Accuracy => Axis { range: 0.8..1., log: false },
        Kind::Nats => Axis::around(&lines, false),
        Kind::Value => Axis::around(&lines, true),
    };
    let rates = summaries.iter().flat_map(|summary| &summary.scores).map(|&(lr, _)| lr);
    let x = Axis { range: rates.clone().fold(1., f64::min)..rates.fold(1., f64::max), log: true };
    Panel { title: task.title(), x_label: "learning rate", y_label: task.score(), x, y, lines }
}

/// The loss at the default learning rates.
fn loss(task: Task, curves: &[(Rule, Vec<Point>)]) -> Panel {
    let y = |point: &Point| Some(point.loss);
    over_time(task, "training loss", curves, y)
}

fn brake(task: Task, curves: &[(Rule, Vec<Point>)]) -> Panel {
    over_time(task, "phi, mean over tensors", curves, |point| point.brake)
}

fn over_time(
    task: Task,
    y_label: &'static str,
    curves: &[(Rule, Vec<Point>)],
    y: impl Fn(&Point) -> Option<f64>,
) -> Panel {
    let point = |point: &Point| Some((point.evaluations as f64, y(point)?));
    let line = |(rule, curve): &(Rule, Vec<Point>)| Line {
        rule: *rule,
        points: curve.iter().filter_map(point).collect(),
    };
    let mut lines: Vec<Line> = curves.iter().map(line).collect();
    lines.retain(|line| !line.points.is_empty());
    let end = lines.iter().flat_map(|line| &line.points).map(|&(x, _)| x).fold(1., f64::max);
    let x = Axis { range: 0. ..end, log: false };
    let y = Axis::around(&lines, true);
    Panel { title: task.title(), x_label: "gradients", y_label, x, y, lines }
}

impl Axis {
    /// A y axis of all finite values.
    fn around(lines: &[Line], log: bool) -> Self {
        let ys = lines.iter().flat_map(|line| &line.points).map(|&(_, y)| y);
        let mut ys: Vec<f64> = ys.filter(|y| y.is_finite()).collect();
        if log {
            ys.iter_mut().for_each(|y| *y = y.max(LEAST));
        }
        let least = ys.iter().copied().reduce(f64::min).unwrap_or(0.1);
        let most = ys.iter().copied().reduce(f64::max).unwrap_or(1.);
        let range = least..most.max(if log { 1.1 * least } else { least + 1e-3 });
        Self { range, log }
    }

    /// What is drawn for a value.
    fn place(&self, value: f64) -> f64 {
        let Range { start, end } = self.range;
        let value = value.clamp(start, end);
        if self.log { value.log10() } else { value }
    }

    fn places(&self) -> Range<f64> {
        let (start, end) = (self.place(self.range.start), self.place(self.range.end));
        let margin = 0.02 * (end - start);
        start - margin..end + margin
    }

    fn label(&self, place: f64) -> String {
        let Range { start, end } = self.range;
        let whole = place.round();
        match self.log {
            true if (place - whole).abs() < 1e-6 => format!("1e{whole}"),
            true if end / start < 30. => format!("{:.2}", 10f64.powf(place)),
            // Too many to be read.
            true => String::new(),
            false if end > 10. => format!("{place:.0}"),
            false => format!("{place:.2}"),
        }
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn picture(path: &Path, panels: &[Panel]) -> Result<()> {
    let columns = COLUMNS.min(panels.len()).max(1);
    let rows = panels.len().div_ceil(columns);
    let (width, height) = (PANEL.0 * columns as u32, PANEL.1 * rows as u32);
    let shown =
        |rule: &&Rule| panels.iter().flat_map(|panel| &panel.lines).any(|l| l.rule == **rule);
    let entries = places(Rule::value_variants().iter().filter(shown), width);
    let lowest = entries.iter().map(|&(_, _, y)| y).max().unwrap_or(0);
    let size = (width, height + lowest as u32 + ROW);
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(height);
    for (area, panel) in upper.split_evenly((rows, columns)).iter().zip(panels) {
        panel.draw(area)?;
    }
    legend(&lower, &entries)?;
    Ok(area.present()?)
}

impl Panel {
    fn draw(&self, area: &Area) -> Result<()> {
        let Self { title, x_label, y_label, x, y, lines } = self;
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(66)
            .build_cartesian_2d(x.places(), y.places())?;
        chart
            .configure_mesh()
            .x_desc(*x_label)
            .y_desc(*y_label)
            .x_labels(8)
            .y_labels(8)
            .x_label_formatter(&|&place| x.label(place))
            .y_label_formatter(&|&place| y.label(place))
            .axis_desc_style(("sans-serif", 14))
            .label_style(("sans-serif", 12))
            .bold_line_style(BLACK.mix(0.12))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for Line { rule, points } in lines {
            let points = points.iter().filter(|(_, y)| !y.is_nan());
            let points: Vec<_> = points.map(|&(px, py)| (x.place(px), y.place(py))).collect();
            let style = stroke(*rule);
            match dashes(*rule) {
                Some((length, gap)) => {
                    chart.draw_series(DashedLineSeries::new(points, length, gap, style))?
                }
                None => chart.draw_series(LineSeries::new(points, style))?,
            };
        }
        Ok(())
    }
}

/// Where the legend's entries are, in rows.
fn places<'a>(rules: impl Iterator<Item = &'a Rule>, width: u32) -> Vec<(Rule, i32, i32)> {
    let (mut x, mut y) = (30, 14);
    let place = |&rule: &Rule| {
        let length = 60 + 8 * rule.name().len() as i32;
        if x + length > width as i32 && x > 30 {
            (x, y) = (30, y + ROW as i32);
        }
        x += length;
        (rule, x - length, y)
    };
    rules.map(place).collect()
}

fn legend(area: &Area, entries: &[(Rule, i32, i32)]) -> Result<()> {
    for &(rule, x, y) in entries {
        let (length, gap) =
            dashes(rule).map_or((26, 0), |(length, gap)| (length as i32, gap as i32));
        for start in (0..=26 - length).step_by((length + gap) as usize) {
            let line = [(x + start, y), (x + start + length, y)];
            area.draw(&PathElement::new(line, stroke(rule)))?;
        }
        area.draw(&Text::new(rule.name(), (x + 32, y - 7), ("sans-serif", 15)))?;
    }
    Ok(())
}

/// Lengths of dashes and gaps; `None` for a whole line.
fn dashes(rule: Rule) -> Option<(u32, u32)> {
    match rule {
        Rule::AdamwPolynomial | Rule::MuonPolynomial => Some((2, 4)),
        Rule::AdamwCosine | Rule::ProdigyCosine | Rule::MuonCosine => Some((12, 2)),
        _ => rule.averages().then_some((6, 4)),
    }
}

/// Okabe and Ito's, which colour-blind readers can tell apart too.
fn stroke(rule: Rule) -> ShapeStyle {
    let color = match rule {
        Rule::Sgd => RGBColor(0, 0, 0),
        Rule::Adamw | Rule::AdamwCosine | Rule::AdamwAveraged | Rule::AdamwPolynomial => {
            RGBColor(213, 94, 0)
        }
        Rule::Prodigy | Rule::ProdigyCosine => RGBColor(86, 180, 233),
        Rule::ScheduleFree => RGBColor(240, 228, 66),
        Rule::Reference => RGBColor(204, 121, 167),
        Rule::Kinetic => RGBColor(0, 158, 115),
        Rule::BrakedAdam | Rule::BrakedAdamAveraged => RGBColor(0, 114, 178),
        Rule::Hessian => RGBColor(230, 159, 0),
        Rule::Muon | Rule::MuonCosine | Rule::MuonPolynomial => RGBColor(150, 75, 0),
        Rule::BrakedMuon | Rule::BrakedMuonAveraged => RGBColor(128, 0, 128),
    };
    // SGD's line is often under the reference's.
    color.stroke_width(if rule == Rule::Sgd { 4 } else { 2 })
}
