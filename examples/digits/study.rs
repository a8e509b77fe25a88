//! Trainings side by side, and how each optimizer did.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::Device;

use crate::data::{Digits, Part};
use crate::train::{Point, Rule, Training};

/// What has come of a training.
pub struct Run {
    pub training: Training,
    pub points: Vec<Point>,
    pub seconds: f64,
    pub train_loss: f64,
    pub validation: Judged,
    pub held_out: Judged,
}

/// How good a model is on some images.
pub struct Judged {
    pub accuracy: f64,
    pub loss: f64,
}

impl Run {
    /// Trains for so many passes' worth of gradients in all. The validation images are left out also
    /// where nothing is chosen by them, so that all optimizers see the same.
    pub fn new(mut training: Training, passes: usize, device: &Device) -> Result<Self> {
        let settings = training.settings.clone();
        let digits = Digits::load(settings.seed, settings.dtype, device)?;
        let (train, validation) = digits.train.split_validation()?;
        let start = Instant::now();
        let points = training.run(&train, passes * settings.batches(&train)?)?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(!points.is_empty(), "--epochs: {passes} leave nothing to do");
        let judge = |part: &Part| -> Result<Judged> {
            let loss = f64::from(training.model.loss(part)?.to_scalar::<f32>()?);
            Ok(Judged { accuracy: training.model.accuracy(part)?, loss })
        };
        let train_loss = judge(&train)?.loss;
        let (validation, held_out) = (judge(&validation)?, judge(&digits.held_out)?);
        Ok(Self { training, points, seconds, train_loss, validation, held_out })
    }

    pub fn broke_off(&self) -> bool {
        self.points.last().is_some_and(|point| !point.loss.is_finite())
    }
}

/// Does the work on all of these, so many at a time, and keeps their order.
pub fn in_parallel<T: Sync, U: Send>(
    jobs: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<U> + Sync,
) -> Result<Vec<U>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(vec![]);
    let worker = || -> Result<()> {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(i) else { return Ok(()) };
            let result = work(job)?;
            done.lock().map_err(|_| anyhow!("another thread panicked"))?.push((i, result));
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => Err(anyhow!("a run panicked")),
        })
    })?;
    let mut done = done.into_inner().map_err(|_| anyhow!("a run panicked"))?;
    done.sort_by_key(|(i, _)| *i);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// An optimizer at the learning rates it has been tried at, in their order.
pub struct Study<'a> {
    pub rule: Rule,
    pub rows: Vec<Row<'a>>,
    /// Which of the rows stands for the optimizer.
    shown: usize,
}

/// The runs at a learning rate, one for each seed.
pub struct Row<'a> {
    pub lr: f64,
    pub runs: Vec<&'a Run>,
}

impl<'a> Study<'a> {
    pub fn new(rule: Rule, runs: &'a [Run]) -> Result<Self> {
        let mut rows: Vec<Row> = vec![];
        for run in runs.iter().filter(|run| run.training.settings.rule == rule) {
            let lr = run.training.settings.lr;
            match rows.iter_mut().find(|row| row.lr == lr) {
                Some(row) => row.runs.push(run),
                None => rows.push(Row { lr, runs: vec![run] }),
            }
        }
        rows.sort_by(|a, b| a.lr.total_cmp(&b.lr));
        let shown = match rule.default_lr() {
            _ if rows.len() == 1 => Some(0),
            Some(lr) => rows.iter().position(|row| row.lr == lr),
            None => best(&rows),
        };
        let shown = shown.with_context(|| format!("{} diverged at every lr", rule.name()))?;
        Ok(Self { rule, rows, shown })
    }

    /// At its default learning rate, where it has one, or else at the best.
    pub fn shown(&self) -> &Row<'a> {
        &self.rows[self.shown]
    }

    /// Whether it took all rows to find the one that is shown.
    pub fn searched(&self) -> bool {
        self.rows.len() > 1 && self.rule.default_lr().is_none()
    }

    /// Where the learning rate of that one comes from.
    pub fn origin(&self) -> String {
        match self.rule.default_lr() {
            _ if self.searched() => format!("best of {}", self.rows.len()),
            Some(default) if default == self.shown().lr => "its default".into(),
            _ => "as given".into(),
        }
    }
}

/// The row of the highest validation accuracy and, among equals, of the lowest validation loss.
/// `None` if all have diverged.
fn best(rows: &[Row]) -> Option<usize> {
    let finite = (0..rows.len()).filter(|&i| !rows[i].broke_off());
    finite.max_by(|&a, &b| {
        let [a, b] = [&rows[a], &rows[b]];
        let accuracy = |row: &Row| row.mean(|run| run.validation.accuracy);
        let loss = |row: &Row| row.mean(|run| run.validation.loss);
        accuracy(a).total_cmp(&accuracy(b)).then(loss(b).total_cmp(&loss(a)))
    })
}

impl Row<'_> {
    /// Over the seeds.
    pub fn mean(&self, value: impl Fn(&Run) -> f64) -> f64 {
        self.runs.iter().map(|run| value(run)).sum::<f64>() / self.runs.len() as f64
    }

    /// The standard deviation over the seeds; `None` of a single one.
    pub fn deviation(&self, value: impl Fn(&Run) -> f64) -> Option<f64> {
        let mean = self.mean(&value);
        let squares = self.runs.iter().map(|run| (value(run) - mean).powi(2)).sum::<f64>();
        let n = self.runs.len();
        (n > 1).then(|| (squares / (n - 1) as f64).sqrt())
    }

    /// Whether any run did.
    pub fn broke_off(&self) -> bool {
        self.runs.iter().any(|run| run.broke_off())
    }
}
