//! One run: a task, an optimizer, a learning rate and a seed.

use std::fmt;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Error};

use crate::optimizers::{AnyOptimizer, Rule, Variant};
use crate::tasks::{Judged, Task};

/// How many points a curve has.
const POINTS: usize = 200;

#[derive(Clone, Copy, PartialEq)]
pub struct Job {
    pub task: Task,
    /// With the full study's budget, where that is another.
    pub full: bool,
    pub rule: Rule,
    pub lr: f64,
    pub seed: u64,
}

pub struct Run {
    pub job: Job,
    /// As [`Task::score`] says. Of averaged weights, if the optimizer keeps them.
    pub score: f64,
    pub initial_loss: f64,
    pub final_loss: f64,
    /// A loss was not finite, or the final one is above the initial one.
    pub diverged: bool,
    /// How many gradients were computed.
    pub evaluations: usize,
    pub steps: usize,
    /// That the steps took, with their gradients.
    pub seconds: f64,
}

/// What happened up to a number of evaluations.
pub struct Point {
    pub evaluations: usize,
    /// The mean since the last point of the batches' losses, each taken before its step.
    pub loss: f64,
    /// Of the last step.
    pub brake: Option<f64>,
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { task, rule, lr, seed, .. } = self;
        write!(f, "{}, {}, lr {lr:?}, seed {seed}", task.title(), rule.name())
    }
}

impl Job {
    pub fn new(task: Task, full: bool, rule: Rule, lr: f64, seed: u64) -> Self {
        Self { task, full: full && task.grows(), rule, lr, seed }
    }

    /// Trains until the budget can't pay for another step, or a loss is not finite.
    pub fn run(self, variant: &Variant) -> Result<(Run, Vec<Point>)> {
        let budget = self.task.plan(self.full).evaluations;
        let mut problem = self.task.begin(self.seed)?;
        let mut optimizer =
            AnyOptimizer::new(self.rule, self.lr, budget, self.seed, variant, problem.varmap())?;
        let initial = problem.judge()?;

        let start = Instant::now();
        let (mut evaluations, mut steps) = (0, 0);
        let mut curve = vec![];
        let mut losses = vec![];
        while evaluations + optimizer.next_cost() <= budget {
            problem.draw()?;
            let loss = optimizer.step(|| {
                evaluations += 1;
                problem.loss().map_err(|err| Error::msg(format!("{err:#}")))
            })?;
            steps += 1;
            losses.push(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?);
            if !losses[losses.len() - 1].is_finite() {
                break;
            }
            if evaluations * POINTS >= (curve.len() + 1) * budget {
                let loss = losses.iter().sum::<f64>() / losses.len() as f64;
                curve.push(Point { evaluations, loss, brake: optimizer.brake()? });
                losses.clear();
            }
        }
        let seconds = start.elapsed().as_secs_f64();

        let Judged { loss, score } = optimizer.judged(self.rule, || problem.judge())?;
        let broke_off = losses.last().is_some_and(|loss| !loss.is_finite());
        let run = Run {
            job: self,
            score,
            initial_loss: initial.loss,
            final_loss: loss,
            diverged: broke_off || loss.is_nan() || loss > initial.loss,
            evaluations,
            steps,
            seconds,
        };
        Ok((run, curve))
    }
}
