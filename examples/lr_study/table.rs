//! The study in numbers, in Markdown.

use std::fmt::Write;
use std::ops::{Range, RangeInclusive};

use anyhow::Result;

use crate::optimizers::Rule;
use crate::results::Results;
use crate::run::{Job, Run};
use crate::tasks::{GRID, Kind, Plan, Target, Task};

/// The learning rates that the mean excess is of: those of Wortsman and others.
const EXCESS: RangeInclusive<f64> = 3e-4..=3e-1;

/// What is compared on a task.
pub struct Study {
    pub task: Task,
    pub full: bool,
    /// The learning rates that every row has.
    pub rates: Vec<f64>,
    /// Whether a row also has others, of [`GRID`], that all its seeds were run at.
    pub more_rates: bool,
    pub seeds: Range<u64>,
}

impl Study {
    pub fn job(&self, rule: Rule, lr: f64, seed: u64) -> Job {
        Job::new(self.task, self.full, rule, lr, seed)
    }

    /// The one whose course is drawn.
    pub fn drawn(&self, rule: Rule) -> Job {
        self.job(rule, rule.default_lr(), self.seeds.start)
    }

    fn plan(&self) -> Plan {
        self.task.plan(self.full)
    }

    fn runs<'a>(&self, results: &'a Results, rule: Rule, lr: f64) -> Vec<&'a Run> {
        self.seeds.clone().filter_map(|seed| results.find(self.job(rule, lr, seed))).collect()
    }

    /// Those of a row.
    fn rates_of(&self, results: &Results, rule: Rule) -> Vec<f64> {
        let complete =
            |lr| self.runs(results, rule, lr).len() as u64 == self.seeds.end - self.seeds.start;
        let has = |lr: &f64| self.rates.contains(lr) || self.more_rates && complete(*lr);
        GRID.into_iter().filter(has).collect()
    }
}

/// How an optimizer did on a task.
pub struct Summary {
    pub rule: Rule,
    task: Task,
    plan: Plan,
    /// For each learning rate of the row the median of the seeds' scores, or `None` if that run has
    /// diverged; of an even number of seeds the worse one of the middle two.
    pub scores: Vec<(f64, Option<f64>)>,
    /// The learning rate and its score, if any has one.
    pub best: Option<(f64, f64)>,
    at_default: Option<f64>,
    /// By how much seeds differ at a learning rate near the best: the median of the standard deviations.
    spread: Option<f64>,
    /// Of each learning rate of all rows in [`EXCESS`] the mean over seeds.
    losses: Vec<f64>,
    /// The share of runs, at the learning rates of all rows, that diverged.
    diverged: f64,
    evaluations_per_step: f64,
    seconds_per_step: f64,
    time: Option<Time>,
}

/// The medians over seeds at the default learning rate.
struct Time {
    seconds_per_step: f64,
    /// Of a whole run.
    seconds: f64,
}

impl Time {
    /// `None` if no run came to its end.
    fn new(runs: &[&Run], budget: usize) -> Option<Self> {
        // The last gradient stays unspent where a step needs two.
        let whole: Vec<_> = runs.iter().filter(|run| run.evaluations + 1 >= budget).collect();
        let seconds = middle(whole.iter().map(|run| run.seconds))?;
        let seconds_per_step = middle(whole.iter().map(|run| run.seconds / run.steps as f64))?;
        Some(Self { seconds_per_step, seconds })
    }
}

impl Summary {
    pub fn new(results: &Results, study: &Study, rule: Rule) -> Self {
        let runs = |lr| study.runs(results, rule, lr);
        let (task, plan) = (study.task, study.plan());
        let kind = task.kind();
        let rates = study.rates_of(results, rule);
        let scores: Vec<_> = rates.iter().map(|&lr| (lr, median(kind, &runs(lr)))).collect();
        let reached = scores.iter().filter_map(|&(lr, score)| Some((lr, score?)));
        let best = reached.clone().min_by(|a, b| kind.badness(a.1).total_cmp(&kind.badness(b.1)));
        let near = reached.filter(|&(_, score)| best.is_some_and(|b| kind.is_near(score, b.1)));
        let spreads = near.filter_map(|(lr, _)| spread(kind, &runs(lr)));
        let in_range = study.rates.iter().filter(|lr| EXCESS.contains(lr));

        let all: Vec<&Run> = study.rates.iter().flat_map(|&lr| runs(lr)).collect();
        let steps = all.iter().map(|run| run.steps).sum::<usize>() as f64;
        let at_default = runs(rule.default_lr());
        Self {
            rule,
            task,
            at_default: median(kind, &at_default),
            spread: middle(spreads),
            losses: in_range.map(|&lr| mean(runs(lr).into_iter().map(capped_loss))).collect(),
            scores,
            best,
            diverged: all.iter().filter(|run| run.diverged).count() as f64 / all.len() as f64,
            evaluations_per_step: all.iter().map(|run| run.evaluations).sum::<usize>() as f64
                / steps,
            seconds_per_step: all.iter().map(|run| run.seconds).sum::<f64>() / steps,
            time: Time::new(&at_default, plan.evaluations),
            plan,
        }
    }

    /// The longest row of neighbours in the grid with such a score, in decades: each counts for the
    /// distance to the next.
    fn decades(&self, good: impl Fn(f64) -> bool) -> f64 {
        let place = |lr: f64| GRID.iter().position(|&of| of == lr).map_or(0., |i| i as f64 / 2.);
        let spacing = self.plan.spacing();
        let (mut longest, mut row) = (0f64, 0.);
        for (i, &(lr, score)) in self.scores.iter().enumerate() {
            let next = self.scores.get(i + 1).map(|&(next, _)| place(next) - place(lr));
            row = if score.is_some_and(&good) {
                row + next.unwrap_or(spacing).min(spacing)
            } else {
                0.
            };
            longest = longest.max(row);
            if next.is_some_and(|next| next > spacing) {
                row = 0.;
            }
        }
        longest
    }

    fn near_decades(&self) -> f64 {
        let near = |best| self.decades(|score| self.task.kind().is_near(score, best));
        self.best.map_or(0., |(_, best)| near(best))
    }

    fn target_decades(&self, target: f64) -> f64 {
        let kind = self.task.kind();
        self.decades(|score| kind.badness(score) <= kind.badness(target))
    }

    fn least_loss(&self) -> Option<f64> {
        self.losses.iter().copied().reduce(f64::min)
    }

    /// The mean over learning rates of what the loss is above this one.
    fn excess(&self, best: Option<f64>) -> Option<f64> {
        Some(mean(self.losses.iter().copied()) - best?)
    }
}

/// A diverged run has come nowhere.
fn capped_loss(run: &Run) -> f64 {
    if run.diverged { run.initial_loss } else { run.final_loss }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// The median; of an even number of values the greater one of the middle two.
fn middle(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The standard deviation over seeds; `None` of a single run, or where one has diverged.
fn spread(kind: Kind, runs: &[&Run]) -> Option<f64> {
    if runs.len() < 2 || runs.iter().any(|run| run.diverged) {
        return None;
    }
    let values = runs.iter().map(|run| kind.scaled(run.score));
    let center = mean(values.clone());
    let squares = values.map(|value| (value - center).powi(2)).sum::<f64>();
    Some((squares / (runs.len() - 1) as f64).sqrt())
}

fn median(kind: Kind, runs: &[&Run]) -> Option<f64> {
    let badness = |run: &&Run| if run.diverged { f64::INFINITY } else { kind.badness(run.score) };
    let mut runs = runs.to_vec();
    runs.sort_by(|a, b| badness(a).total_cmp(&badness(b)));
    let middle = runs.get(runs.len() / 2)?;
    (!middle.diverged).then_some(middle.score)
}

/// What all numbers mean, an overview, a table for each task, and those of the default learning rates and of time.
pub fn markdown(studies: &[(Study, Vec<Summary>)]) -> Result<String> {
    let mut text = LEGEND.to_string();
    overview(&mut text, studies)?;
    for (study, summaries) in studies {
        section(&mut text, study, summaries)?;
    }
    defaults(&mut text, studies)?;
    times(&mut text, studies)?;
    Ok(text)
}

const LEGEND: &str = "\
Every gradient is charged: a step that measures costs two, and a run ends when its budget is spent.

- *best*: the best score of a learning rate (`at lr`), where a learning rate's score is the median of its
  seeds (a diverged run is the worst; of an even number, the worse of the middle two). It is picked by the same
  held-out data that it is reported on, for every optimizer alike.
- *spread*: the noise of a single run's score: the standard deviation over seeds, which differ in all that is
  random, at a learning rate near best; the median of these. (Learning rates where a run diverged have none.) Of
  losses that come near 0 it is that of their logarithms, as a factor.
- *near best* and *target*: the longest row of neighbouring learning rates whose score is that good, in
  decades, where each counts for the distance to the next.
- *diverged*: the share of the grid's runs that met a loss that was not finite, or ended with a loss above that
  at their start. (It and the mean excess are of the learning rates that all rows have.)
- *mean excess*: what a learning rate costs that is not the best: the mean over those of the grid from 3e-4 to
  3e-1 of the loss above the least of these learning rates', where a diverged run counts with its loss at the start.
  It is the LR sensitivity of Wortsman and others (2023, arXiv 2309.14322), by the optimizer's own least loss as
  there. *over best of all*: the same above the least loss of all optimizers here, since one that is equally
  bad everywhere has no excess over itself. The loss is the cross entropy over the training images for digits, over
  held-out text for the transformer, and the score itself for the others; of several seeds it is the mean.
- *at default*: the score at the optimizer's own default learning rate; SGD has none, and gets AdamW's.

AdamW is candle's, without weight decay, as all others are; *averaged* is judged by exponential averages of the
weights (c = 0.98), *polynomial average* by polynomial ones (k = 8). *Cosine*: down to 0 over the budget, for AdamW
after a linear warm-up over a tenth of it. Prodigy (Mishchenko and Defazio, 2023, arXiv 2306.06101) has its authors'
options `safeguard_warmup` and `use_bias_correction`. Schedule-Free AdamW (Defazio and others, 2024, arXiv 2405.15682)
has a warm-up over a twentieth of the budget, as several trainings in its paper. Milliseconds are those of runs side by
side, on a thread each.
";

/// A row for each optimizer, a column for each task.
fn overview(text: &mut String, studies: &[(Study, Vec<Summary>)]) -> Result<()> {
    let Some((_, first)) = studies.first() else { return Ok(()) };
    // What a step costs is that on this task.
    let deep = studies.iter().find(|(study, _)| study.task == Task::Deep);
    let (study, costs) = deep.unwrap_or(&studies[0]);
    writeln!(
        text,
        "\n### Overview\n\nEach cell: best / near best, decades / target, decades (the target is in the head) / \
         diverged / mean excess.\n"
    )?;
    write!(text, "| |")?;
    for (Study { task, .. }, summaries) in studies {
        let target = format(*task, target(*task, summaries));
        write!(text, " {}; {target} |", task.title())?;
    }
    writeln!(text, " gradients a step | ms a step, {} |", study.task.title())?;
    writeln!(text, "|---|{}---|---|", "---|".repeat(studies.len()))?;
    for (i, Summary { rule, .. }) in first.iter().enumerate() {
        write!(text, "| {} |", rule.name())?;
        for (Study { task, .. }, summaries) in studies {
            let summary = &summaries[i];
            let reached = target(*task, summaries).map(|target| summary.target_decades(target));
            write!(
                text,
                " {} / {:?} / {} / {:.0}% / {} |",
                format(*task, summary.best.map(|(_, score)| score)),
                summary.near_decades(),
                reached.map_or("-".into(), |decades| format!("{decades:?}")),
                100. * summary.diverged,
                format_loss(*task, summary.excess(summary.least_loss())),
            )?;
        }
        let Summary { evaluations_per_step, seconds_per_step, .. } = costs[i];
        writeln!(text, " {evaluations_per_step:.2} | {:.2} |", 1e3 * seconds_per_step)?;
    }
    Ok(())
}

fn section(text: &mut String, study: &Study, summaries: &[Summary]) -> Result<()> {
    let Study { task, ref rates, ref seeds, .. } = *study;
    let (plan, kind) = (study.plan(), task.kind());
    let target = target(task, summaries);
    let more = summaries.iter().any(|summary| summary.scores.len() > rates.len());
    let from = if seeds.start == 0 { String::new() } else { format!(" from {} on", seeds.start) };
    writeln!(
        text,
        "\n### {}\n\nScore: {}; target {}{}. {} evaluations a run; {} learning rates from {:e} to {:e}{}; \
         seeds: {}{from}. Near best: within {}.\n",
        task.title(),
        task.score(),
        if kind == Kind::Accuracy { "at least " } else { "at most " },
        format(task, target),
        plan.evaluations,
        rates.len(),
        rates[0],
        rates[rates.len() - 1],
        if more { ", in some rows more between" } else { "" },
        seeds.end - seeds.start,
        kind.near(),
    )?;
    writeln!(
        text,
        "| optimizer | best | spread | at lr | near best, decades | target, decades | diverged \
         | mean excess | over best of all | at default | evaluations a step | ms a step |\n|{}",
        "---|".repeat(12)
    )?;
    let least = summaries.iter().filter_map(Summary::least_loss).reduce(f64::min);
    for summary in summaries {
        let reached = target.map(|target| summary.target_decades(target));
        writeln!(
            text,
            "| {} | {} | {} | {} | {:?} | {} | {:.0}% | {} | {} | {} ({:?}) | {:.2} | {:.2} |",
            summary.rule.name(),
            format(task, summary.best.map(|(_, score)| score)),
            summary.spread.map_or("-".into(), |spread| kind.format_spread(spread)),
            summary.best.map_or("-".into(), |(lr, _)| format!("{lr:?}")),
            summary.near_decades(),
            reached.map_or("-".into(), |decades| format!("{decades:?}")),
            100. * summary.diverged,
            format_loss(task, summary.excess(summary.least_loss())),
            format_loss(task, summary.excess(least)),
            summary.at_default.map_or("diverged".into(), |score| kind.format(score)),
            summary.rule.default_lr(),
            summary.evaluations_per_step,
            1e3 * summary.seconds_per_step,
        )?;
    }
    Ok(())
}

fn format(task: Task, score: Option<f64>) -> String {
    score.map_or("-".into(), |score| task.kind().format(score))
}

fn format_loss(task: Task, loss: Option<f64>) -> String {
    loss.map_or("-".into(), |loss| task.kind().format_loss(loss))
}

/// Each optimizer at its default learning rate, beside AdamW at the best of the grid.
fn defaults(text: &mut String, studies: &[(Study, Vec<Summary>)]) -> Result<()> {
    let Some((_, first)) = studies.first() else { return Ok(()) };
    writeln!(text, "\n### Default learning rates, beside tuned AdamW\n")?;
    let titles: Vec<&str> = studies.iter().map(|(study, _)| study.task.title()).collect();
    writeln!(text, "| optimizer | lr | {} |", titles.join(" | "))?;
    writeln!(text, "|---|---|{}", "---|".repeat(studies.len()))?;
    for (i, Summary { rule, .. }) in first.iter().enumerate() {
        write!(text, "| {} | {:?} |", rule.name(), rule.default_lr())?;
        for (Study { task, .. }, summaries) in studies {
            let score = summaries[i].at_default;
            let score = score.map_or("diverged".into(), |score| task.kind().format(score));
            write!(text, " {score} |")?;
        }
        writeln!(text)?;
    }
    if first.iter().any(|summary| summary.rule == Rule::Adamw) {
        write!(text, "| **AdamW, tuned** | |")?;
        for (Study { task, .. }, summaries) in studies {
            let best = adamw(summaries)
                .map_or("-".into(), |(lr, best)| format!("{} ({lr:?})", task.kind().format(best)));
            write!(text, " {best} |")?;
        }
        writeln!(text)?;
    }
    Ok(())
}

/// What whole steps take, beside AdamW's.
fn times(text: &mut String, studies: &[(Study, Vec<Summary>)]) -> Result<()> {
    let Some((_, first)) = studies.first() else { return Ok(()) };
    writeln!(
        text,
        "\n### Time of whole steps\n\nEach cell: milliseconds a step / seconds a run / these as a multiple of AdamW's. \
         A step is all of a training but judging: the batch, forward and backward passes, the second ones of a \
         step that measures, and the optimizer. A run spends the budget in gradients. Each number is the median over \
         seeds at the default learning rate. Runs side by side slow each other down, and so does whatever else a \
         machine does: for times to compare, take `--threads 1` on a machine that does nothing else, and an `--out` \
         of their own.\n"
    )?;
    let titles: Vec<&str> = studies.iter().map(|(study, _)| study.task.title()).collect();
    writeln!(text, "| optimizer | {} |", titles.join(" | "))?;
    writeln!(text, "|---|{}", "---|".repeat(studies.len()))?;
    for (i, Summary { rule, .. }) in first.iter().enumerate() {
        write!(text, "| {} |", rule.name())?;
        for (_, summaries) in studies {
            let Some(Time { seconds_per_step, seconds }) = summaries[i].time else {
                write!(text, " - |")?;
                continue;
            };
            let adamw = summaries.iter().find(|summary| summary.rule == Rule::Adamw);
            let adamw = adamw.and_then(|adamw| adamw.time.as_ref());
            let ratio = adamw.map_or("-".into(), |adamw| format!("{:.2}", seconds / adamw.seconds));
            write!(text, " {:.2} / {seconds:.2} / {ratio} |", 1e3 * seconds_per_step)?;
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
