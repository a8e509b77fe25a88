//! Training by one of the three optimizers, and the search for its learning rate.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::time::Instant;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device};
use candle_nn::{AdamW, Optimizer, SGD};
use candle_srkl::{Beta, ParamsSrkl, Srkl};
use indicatif::ProgressBar;
use rand::seq::SliceRandom;

use crate::data::Part;
use crate::model::{Mlp, WIDTHS};
use crate::random::{Stream, rng};

/// The learning rates that tuning tries, half a decade apart.
pub const GRID: [f64; 9] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1., 3., 10.];

/// How long it trains with each of them.
pub const TUNING_EPOCHS: usize = 15;

#[derive(Clone, Copy)]
pub enum Rule {
    Srkl,
    Sgd,
    AdamW,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Srkl => "SRKL",
            Self::Sgd => "SGD",
            Self::AdamW => "AdamW",
        })
    }
}

/// What a training depends on beside its rule, learning rate and length.
#[derive(Clone)]
pub struct Settings {
    /// SRKL's; the other rules have none.
    pub beta: f64,
    pub batch: NonZeroUsize,
    pub dtype: DType,
    pub seed: u64,
}

pub struct Training {
    pub model: Mlp,
    pub optimizer: AnyOptimizer,
    pub settings: Settings,
}

pub enum AnyOptimizer {
    Srkl(Srkl),
    Sgd(SGD),
    AdamW(AdamW),
}

/// A value for each epoch: the number of epochs done, and the value.
pub type Curve = Vec<(f64, f64)>;

/// The course of a training.
#[derive(Default)]
pub struct History {
    /// The mean over each epoch of the batches' losses, each taken before its step.
    pub loss: Curve,
    /// The mean over each epoch of `phi / lr`, for each parameter tensor; empty for rules without a
    /// brake.
    pub brake: BTreeMap<String, Curve>,
    /// How many gradients were computed.
    pub evaluations: usize,
    pub seconds: f64,
}

/// How a learning rate did on the validation part.
pub struct Trial {
    pub lr: f64,
    pub accuracy: f64,
    pub loss: f64,
}

/// What has come of a final training.
pub struct Outcome {
    pub rule: Rule,
    pub lr: f64,
    /// On the held-out part.
    pub accuracy: f64,
    pub history: History,
}

impl Training {
    pub fn new(rule: Rule, lr: f64, settings: &Settings, device: &Device) -> Result<Self> {
        let model = Mlp::new(&WIDTHS, settings.seed, settings.dtype, device)?;
        let optimizer = match rule {
            Rule::Srkl => {
                let beta = Beta::Fixed(settings.beta);
                let params = ParamsSrkl { lr, beta, ..ParamsSrkl::reference() };
                AnyOptimizer::Srkl(Srkl::from_varmap(&model.varmap, params)?)
            }
            Rule::Sgd => AnyOptimizer::Sgd(SGD::new(model.varmap.all_vars(), lr)?),
            Rule::AdamW => AnyOptimizer::AdamW(AdamW::new_lr(model.varmap.all_vars(), lr)?),
        };
        Ok(Self { model, optimizer, settings: settings.clone() })
    }

    /// Trains for these epochs, counted from 0 at the initial weights.
    pub fn run(&mut self, part: &Part, epochs: Range<usize>, bar: &ProgressBar) -> Result<History> {
        let start = Instant::now();
        let mut history = History::default();
        for epoch in epochs {
            let done = (epoch + 1) as f64;
            let mut rows: Vec<u32> = (0..part.len()? as u32).collect();
            rows.shuffle(&mut rng(self.settings.seed, Stream::Epoch(epoch)));
            let mut loss = Mean::default();
            let mut brake: BTreeMap<String, Mean> = BTreeMap::new();
            for batch in rows.chunks(self.settings.batch.get()) {
                loss.add(self.step(&part.select(batch)?)?);
                for (name, relative) in self.optimizer.brake()? {
                    brake.entry(name).or_default().add(relative);
                }
                history.evaluations += 1;
            }
            bar.set_message(format!("loss {:.2e}", loss.value()));
            bar.inc(1);
            history.loss.push((done, loss.value()));
            for (name, mean) in brake {
                history.brake.entry(name).or_default().push((done, mean.value()));
            }
        }
        history.seconds = start.elapsed().as_secs_f64();
        Ok(history)
    }

    /// Returns the loss before the step.
    fn step(&mut self, batch: &Part) -> Result<f64> {
        let loss = self.model.loss(batch)?;
        self.optimizer.step(&loss.backward()?)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }
}

impl AnyOptimizer {
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        match self {
            Self::Srkl(srkl) => srkl.step(grads),
            Self::Sgd(sgd) => sgd.step(grads),
            Self::AdamW(adamw) => adamw.step(grads),
        }
    }

    /// `phi / lr` of each parameter tensor that the last step moved.
    fn brake(&self) -> Result<Vec<(String, f64)>> {
        let Self::Srkl(srkl) = self else { return Ok(vec![]) };
        let lr = srkl.learning_rate();
        let moved = srkl.telemetry()?.into_iter();
        Ok(moved.filter_map(|block| Some((block.name, block.phi? / lr))).collect())
    }
}

#[derive(Default)]
struct Mean {
    sum: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1.;
    }

    fn value(&self) -> f64 {
        self.sum / self.count
    }
}

/// Tries every learning rate of the grid, in its order.
pub fn tune(
    rule: Rule,
    settings: &Settings,
    train: &Part,
    bar: &ProgressBar,
) -> Result<Vec<Trial>> {
    let (train, validation) = train.split_validation()?;
    let mut trials = vec![];
    for lr in GRID {
        let mut training = Training::new(rule, lr, settings, train.images.device())?;
        training.run(&train, 0..TUNING_EPOCHS, bar)?;
        let accuracy = training.model.accuracy(&validation)?;
        let loss = f64::from(training.model.loss(&validation)?.to_scalar::<f32>()?);
        trials.push(Trial { lr, accuracy, loss });
    }
    Ok(trials)
}

/// The trial of the highest accuracy and, among equals, of the lowest loss. `None` if all have
/// diverged.
pub fn best(trials: &[Trial]) -> Option<&Trial> {
    let finite = trials.iter().filter(|trial| trial.loss.is_finite());
    finite.max_by(|a, b| a.accuracy.total_cmp(&b.accuracy).then(b.loss.total_cmp(&a.loss)))
}
