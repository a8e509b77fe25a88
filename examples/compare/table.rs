//! The table at the end.

use candle_nn::ParamsAdamW;

use super::{ADAMW, ADAMW_RATES, Candidate, Run, Score};

/// Prints a row for each preset, and two for AdamW: its default learning rate, and the best.
pub fn print(candidates: &[Candidate], runs: &[Run], score: Score) {
    let rows: Vec<Row> = candidates.iter().enumerate().map(|row| Row::new(row, runs)).collect();
    let adamw = rows.iter().filter(|row| row.candidate.name == ADAMW);
    let best = adamw.min_by(|a, b| score.badness(a.mean).total_cmp(&score.badness(b.mean)));
    let best = best.map(|row| row.candidate.lr);
    let default = ParamsAdamW::default().lr;

    println!("| optimizer | lr | {} | gradients | seconds |", score.title());
    println!("|---|---|---|---|---|");
    for row in &rows {
        let Candidate { name, lr, preset } = row.candidate;
        let best_of = format!("best of {}", ADAMW_RATES.len());
        let origin = match (preset, *lr == default, best == Some(*lr)) {
            (Some(_), ..) | (None, true, false) => "its default".into(),
            (None, true, true) => format!("its default, and {best_of}"),
            (None, false, true) => best_of,
            (None, false, false) => continue,
        };
        println!(
            "| {name} | {lr}, {origin} | {} ({} to {}) | {:.0} | {:.1} |",
            score.format(row.mean),
            score.format(row.lowest),
            score.format(row.highest),
            row.gradients,
            row.seconds
        );
    }
}

/// The runs of a candidate: means, and the lowest and the highest of the scores.
struct Row<'a> {
    candidate: &'a Candidate,
    mean: f64,
    lowest: f64,
    highest: f64,
    gradients: f64,
    seconds: f64,
}

impl<'a> Row<'a> {
    fn new((number, candidate): (usize, &'a Candidate), runs: &[Run]) -> Self {
        let runs: Vec<&Run> = runs.iter().filter(|run| run.candidate == number).collect();
        let mean = |value: fn(&Run) -> f64| {
            runs.iter().map(|run| value(run)).sum::<f64>() / runs.len() as f64
        };
        let scores = || runs.iter().map(|run| run.score);
        Self {
            candidate,
            mean: mean(|run| run.score),
            lowest: scores().fold(f64::INFINITY, f64::min),
            highest: scores().fold(f64::NEG_INFINITY, f64::max),
            gradients: mean(|run| run.gradients as f64),
            seconds: mean(|run| run.seconds),
        }
    }
}

impl Score {
    fn title(self) -> &'static str {
        match self {
            Self::Accuracy => "held-out accuracy (lowest to highest)",
            Self::Nats => "held-out nats a character (lowest to highest)",
        }
    }

    fn format(self, score: f64) -> String {
        match self {
            Self::Accuracy => format!("{:.2}%", 100. * score),
            Self::Nats => format!("{score:.3}"),
        }
    }

    /// The lower, the better the score is; NaN is the worst.
    fn badness(self, score: f64) -> f64 {
        match self {
            _ if score.is_nan() => f64::INFINITY,
            Self::Accuracy => -score,
            Self::Nats => score,
        }
    }
}
