//! The study in numbers, in Markdown.

use std::fmt::Write;

use anyhow::Result;

use crate::optimizers::Rule;
use crate::results::Results;
use crate::run::{Job, Run};
use crate::tasks::{Kind, Plan, Target, Task};

/// How an optimizer did on a task.
pub struct Summary {
    pub rule: Rule,
    /// For each learning rate of the grid the median of the seeds' scores, or `None` if that run has
    /// diverged; of an even number of seeds the worse one of the middle two.
    pub scores: Vec<(f64, Option<f64>)>,
    /// The learning rate and its score, if any has one.
    pub best: Option<(f64, f64)>,
    at_default: Option<f64>,
    /// The share of runs of the grid that diverged.
    diverged: f64,
    evaluations_per_step: f64,
    seconds_per_step: f64,
}

impl Summary {
    pub fn new(results: &Results, task: Task, full: bool, rule: Rule, seeds: u64) -> Self {
        let runs = |lr| -> Vec<&Run> {
            let job = |seed| Job { task, full, rule, lr, seed };
            (0..seeds).filter_map(|seed| results.find(job(seed))).collect()
        };
        let kind = task.kind();
        let grid = task.plan(full).grid();
        let scores: Vec<_> = grid.iter().map(|&lr| (lr, median(kind, &runs(lr)))).collect();
        let reached = scores.iter().filter_map(|&(lr, score)| Some((lr, score?)));
        let best = reached.min_by(|a, b| kind.badness(a.1).total_cmp(&kind.badness(b.1)));

        let all: Vec<&Run> = grid.iter().flat_map(|&lr| runs(lr)).collect();
        let steps = all.iter().map(|run| run.steps).sum::<usize>() as f64;
        Self {
            rule,
            scores,
            best,
            at_default: median(kind, &runs(rule.default_lr())),
            diverged: all.iter().filter(|run| run.diverged).count() as f64 / all.len() as f64,
            evaluations_per_step: all.iter().map(|run| run.evaluations).sum::<usize>() as f64
                / steps,
            seconds_per_step: all.iter().map(|run| run.seconds).sum::<f64>() / steps,
        }
    }

    /// The longest row of neighbours in the grid with such a score, in decades: each counts for the
    /// distance to the next.
    fn decades(&self, plan: &Plan, good: impl Fn(f64) -> bool) -> f64 {
        let good = self.scores.iter().map(|&(_, score)| score.is_some_and(&good));
        let (mut longest, mut row) = (0, 0);
        for good in good {
            row = if good { row + 1 } else { 0 };
            longest = longest.max(row);
        }
        longest as f64 * plan.spacing()
    }
}

fn median(kind: Kind, runs: &[&Run]) -> Option<f64> {
    let badness = |run: &&Run| if run.diverged { f64::INFINITY } else { kind.badness(run.score) };
    let mut runs = runs.to_vec();
    runs.sort_by(|a, b| badness(a).total_cmp(&badness(b)));
    let middle = runs.get(runs.len() / 2)?;
    (!middle.diverged).then_some(middle.score)
}

/// What all numbers mean, a table for each task, and one of the default learning rates.
pub fn markdown(
    studies: &[(Task, Vec<Summary>)],
    full: bool,
    seeds: Option<u64>,
) -> Result<String> {
    let mut text = LEGEND.to_string();
    for (task, summaries) in studies {
        section(&mut text, *task, summaries, full, seeds)?;
    }
    defaults(&mut text, studies)?;
    Ok(text)
}

const LEGEND: &str = "\
Every gradient is charged: a step that measures costs two, and a run ends when its budget is spent.
*best*: the best score of a learning rate (`at lr`), where a learning rate's score is the median of its
seeds (a diverged run is the worst; of an even number, the worse of the middle two). *near best* and
*target*: the longest row of neighbouring learning rates whose score is that good, in decades, where each
counts for the distance to the next. *diverged*: the share of the grid's runs that met a loss that was not
finite, or ended with a loss above that at their start. *at default*: the score at the optimizer's own default
learning rate; SGD has none, and gets AdamW's. The best is picked by the same held-out data that it is reported
on, for every optimizer alike. AdamW is candle's, without weight decay, as all others are; *averaged* is
judged by averages of the weights (c = 0.98). Milliseconds are those of runs side by side, on a thread each.
";

fn section(
    text: &mut String,
    task: Task,
    summaries: &[Summary],
    full: bool,
    seeds: Option<u64>,
) -> Result<()> {
    let (plan, kind) = (task.plan(full), task.kind());
    let target = target(task, summaries);
    let format = |score: Option<f64>| score.map_or("-".into(), |score| kind.format(score));
    let grid = plan.grid();
    writeln!(
        text,
        "\n### {}\n\nScore: {}; target {}{}. {} evaluations a run; {} learning rates from {:e} to {:e}; \
         seeds: {}. Near best: within {}.\n",
        task.title(),
        task.score(),
        if kind == Kind::Accuracy { "at least " } else { "at most " },
        format(target),
        plan.evaluations,
        grid.len(),
        grid[0],
        grid[grid.len() - 1],
        seeds.unwrap_or(plan.seeds),
        kind.near(),
    )?;
    writeln!(
        text,
        "| optimizer | best | at lr | near best, decades | target, decades | diverged | at default \
         | evaluations a step | ms a step |\n|---|---|---|---|---|---|---|---|---|"
    )?;
    for summary in summaries {
        let near = summary
            .best
            .map_or(0., |(_, best)| summary.decades(&plan, |score| kind.is_near(score, best)));
        let reached = target.map(|target| {
            summary.decades(&plan, |score| kind.badness(score) <= kind.badness(target))
        });
        writeln!(
            text,
            "| {} | {} | {} | {near:?} | {} | {:.0}% | {} ({:?}) | {:.2} | {:.2} |",
            summary.rule.name(),
            format(summary.best.map(|(_, score)| score)),
            summary.best.map_or("-".into(), |(lr, _)| format!("{lr:?}")),
            reached.map_or("-".into(), |decades| format!("{decades:?}")),
            100. * summary.diverged,
            summary.at_default.map_or("diverged".into(), |score| kind.format(score)),
            summary.rule.default_lr(),
            summary.evaluations_per_step,
            1e3 * summary.seconds_per_step,
        )?;
    }
    Ok(())
}

/// Each optimizer at its default learning rate, beside AdamW at the best of the grid.
fn defaults(text: &mut String, studies: &[(Task, Vec<Summary>)]) -> Result<()> {
    let Some((_, first)) = studies.first() else { return Ok(()) };
    writeln!(text, "\n### Default learning rates, beside tuned AdamW\n")?;
    let titles: Vec<&str> = studies.iter().map(|(task, _)| task.title()).collect();
    writeln!(text, "| optimizer | lr | {} |", titles.join(" | "))?;
    writeln!(text, "|---|---|{}", "---|".repeat(studies.len()))?;
    for (i, Summary { rule, .. }) in first.iter().enumerate() {
        write!(text, "| {} | {:?} |", rule.name(), rule.default_lr())?;
        for (task, summaries) in studies {
            let score = summaries[i].at_default;
            let score = score.map_or("diverged".into(), |score| task.kind().format(score));
            write!(text, " {score} |")?;
        }
        writeln!(text)?;
    }
    if first.iter().any(|summary| summary.rule == Rule::Adamw) {
        write!(text, "| **AdamW, tuned** | |")?;
        for (task, summaries) in studies {
            let best = adamw(summaries)
                .map_or("-".into(), |(lr, best)| format!("{} ({lr:?})", task.kind().format(best)));
            write!(text, " {best} |")?;
        }
        writeln!(text)?;
    }
    Ok(())
}

fn target(task: Task, summaries: &[Summary]) -> Option<f64> {
    match task.target() {
        Target::Score(score) => Some(score),
        Target::BesideAdamW(margin) => Some(adamw(summaries)?.1 + margin),
    }
}

/// Its best learning rate and score.
fn adamw(summaries: &[Summary]) -> Option<(f64, f64)> {
    summaries.iter().find(|summary| summary.rule == Rule::Adamw)?.best
}
