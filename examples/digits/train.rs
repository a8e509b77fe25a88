//! Training by one of the three optimizers, and the search for its learning rate.

use std::fmt;
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
use crate::model::Mlp;
use crate::random::{Stream, rng};

/// The learning rates that are tried, half a decade apart.
pub const GRID: [f64; 9] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1., 3., 10.];

/// The length of a training that tries a learning rate.
pub const TUNING_EPOCHS: usize = 15;

#[derive(Clone, Copy, PartialEq, Eq)]
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
    pub batch: usize,
    pub dtype: DType,
    pub seed: u64,
}

pub struct Training {
    pub model: Mlp,
    pub optimizer: AnyOptimizer,
    settings: Settings,
}

pub enum AnyOptimizer {
    Srkl(Srkl),
    Sgd(SGD),
    AdamW(AdamW),
}

/// The course of a training.
pub struct History {
    /// Counted from 0.
    pub epochs: Range<usize>,
    /// The mean training loss of each epoch, of every batch before its step.
    pub loss: Vec<f64>,
    /// For each parameter tensor; empty for rules without a brake.
    pub brake: Vec<Brake>,
    /// Gradients taken.
    pub evaluations: usize,
    pub seconds: f64,
}

pub struct Brake {
    pub name: String,
    /// The mean of `phi / lr` over the steps of each epoch.
    pub mean: Vec<f64>,
}

/// What tuning saw of a learning rate.
pub struct Trial {
    pub lr: f64,
    pub accuracy: f64,
    pub loss: f64,
}

impl Training {
    pub fn new(rule: Rule, lr: f64, settings: &Settings, device: &Device) -> Result<Self> {
        let model = Mlp::new(settings.seed, settings.dtype, device)?;
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

    pub fn run(&mut self, part: &Part, epochs: Range<usize>, bar: &ProgressBar) -> Result<History> {
        let start = Instant::now();
        let mut history = History {
            epochs: epochs.clone(),
            loss: vec![],
            brake: vec![],
            evaluations: 0,
            seconds: 0.,
        };
        for epoch in epochs {
            let mut order: Vec<u32> = (0..part.len()? as u32).collect();
            order.shuffle(&mut rng(self.settings.seed, Stream::Epoch(epoch)));
            let mut sum = 0.;
            for rows in order.chunks(self.settings.batch) {
                let loss = self.model.loss(&part.select(rows)?)?;
                self.optimizer.step(&loss.backward()?)?;
                sum += f64::from(loss.to_scalar::<f32>()?) * rows.len() as f64;
            }
            history.loss.push(sum / order.len() as f64);
            bar.inc(1);
        }
        history.seconds = start.elapsed().as_secs_f64();
        Ok(history)
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
}

/// Tries every learning rate of the grid.
pub fn tune(
    rule: Rule,
    settings: &Settings,
    train: &Part,
    bar: &ProgressBar,
) -> Result<Vec<Trial>> {
    let (train, validation) = train.without_validation()?;
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
