//! Training by one of four optimizers, for a number of gradients.

use std::num::NonZeroUsize;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};
use candle_srkl::{Beta, ParamsSrkl, Srkl};
use clap::ValueEnum;
use rand::seq::SliceRandom;

use crate::data::Part;
use crate::model::{Mlp, WIDTHS};
use crate::random::{Stream, rng};
use crate::telemetry::Files;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rule {
    BrakedAdam,
    Adamw,
    Reference,
    Sgd,
}

impl Rule {
    pub fn name(self) -> &'static str {
        match self {
            Self::BrakedAdam => "braked Adam",
            Self::Adamw => "AdamW",
            Self::Reference => "reference",
            Self::Sgd => "SGD",
        }
    }

    /// The learning rate of those that need no search for it.
    pub fn default_lr(self) -> Option<f64> {
        (self == Self::BrakedAdam).then(|| ParamsSrkl::braked_adam().lr)
    }
}

/// What a training depends on beside its length.
#[derive(Clone)]
pub struct Settings {
    pub rule: Rule,
    pub lr: f64,
    /// The reference rule's; the others have none.
    pub beta: f64,
    pub batch: NonZeroUsize,
    pub dtype: DType,
    pub seed: u64,
}

impl Settings {
    /// How many make a pass over the images.
    pub fn batches(&self, part: &Part) -> Result<usize> {
        Ok(part.len()?.div_ceil(self.batch.get()))
    }
}

pub struct Training {
    pub settings: Settings,
    pub model: Mlp,
    pub optimizer: AnyOptimizer,
    pub steps: usize,
    /// How many were computed: a step that measures curvature takes two.
    pub gradients: usize,
    /// Files that are written while it runs.
    pub telemetry: Option<Files>,
}

pub enum AnyOptimizer {
    Srkl(Box<Srkl>),
    AdamW(AdamW),
    Sgd(SGD),
}

/// A step.
#[derive(Clone, Copy)]
pub struct Point {
    /// How many were computed up to its end.
    pub gradients: usize,
    /// Of the batch, before the step.
    pub loss: f64,
    /// The mean over tensors; `None` without a brake.
    pub phi: Option<f64>,
}

impl Training {
    pub fn new(settings: Settings, device: &Device) -> Result<Self> {
        let Settings { rule, lr, beta, dtype, seed, .. } = settings;
        let model = Mlp::new(&WIDTHS, seed, dtype, device)?;
        let optimizer = match rule {
            Rule::BrakedAdam => {
                let params = ParamsSrkl { lr, ..ParamsSrkl::braked_adam() };
                AnyOptimizer::Srkl(Box::new(Srkl::from_varmap(&model.varmap, params)?))
            }
            Rule::Reference => {
                let beta = Beta::Fixed(beta);
                let params = ParamsSrkl { lr, beta, ..ParamsSrkl::reference() };
                AnyOptimizer::Srkl(Box::new(Srkl::from_varmap(&model.varmap, params)?))
            }
            Rule::Adamw => {
                // No decay, as the others have none.
                let params = ParamsAdamW { lr, weight_decay: 0., ..ParamsAdamW::default() };
                AnyOptimizer::AdamW(AdamW::new(model.varmap.all_vars(), params)?)
            }
            Rule::Sgd => AnyOptimizer::Sgd(SGD::new(model.varmap.all_vars(), lr)?),
        };
        Ok(Self { settings, model, optimizer, steps: 0, gradients: 0, telemetry: None })
    }

    /// Trains until the budget, of gradients from the very first step on, can't pay for another one, or
    /// a loss is not finite.
    pub fn run(&mut self, part: &Part, budget: usize) -> Result<Vec<Point>> {
        let Settings { batch, seed, .. } = self.settings;
        let batches = self.settings.batches(part)?;
        let mut order = vec![];
        let mut points = vec![];
        while self.gradients + self.optimizer.next_cost() <= budget {
            let (epoch, place) = (self.steps / batches, self.steps % batches);
            if place == 0 || order.is_empty() {
                order = (0..part.len()? as u32).collect();
                order.shuffle(&mut rng(seed, Stream::Epoch(epoch)));
            }
            let end = order.len().min((place + 1) * batch.get());
            let loss = self.step(&part.select(&order[place * batch.get()..end])?)?;
            if let (Some(files), AnyOptimizer::Srkl(srkl)) = (&mut self.telemetry, &self.optimizer)
            {
                files.write(self.steps, srkl, loss)?;
            }
            points.push(Point { gradients: self.gradients, loss, phi: self.optimizer.phi()? });
            if !loss.is_finite() {
                break;
            }
        }
        Ok(points)
    }

    /// Returns the loss before the step.
    fn step(&mut self, batch: &Part) -> Result<f64> {
        let Self { model, optimizer, gradients, .. } = self;
        let loss = optimizer.step(|| {
            *gradients += 1;
            model.loss(batch)
        })?;
        self.steps += 1;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }
}

impl AnyOptimizer {
    /// How many gradients the next step needs.
    fn next_cost(&self) -> usize {
        match self {
            Self::Srkl(srkl) if srkl.measuring() => 2,
            _ => 1,
        }
    }

    /// One step; calls `loss` once for each gradient, and returns the first.
    fn step(
        &mut self,
        mut loss: impl FnMut() -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        match self {
            Self::Srkl(srkl) => srkl.backward_step_with(loss),
            Self::AdamW(adamw) => {
                let loss = loss()?;
                adamw.backward_step(&loss)?;
                Ok(loss)
            }
            Self::Sgd(sgd) => {
                let loss = loss()?;
                sgd.backward_step(&loss)?;
                Ok(loss)
            }
        }
    }

    fn phi(&self) -> Result<Option<f64>> {
        let Self::Srkl(srkl) = self else { return Ok(None) };
        let phis: Vec<f64> = srkl.telemetry()?.into_iter().filter_map(|block| block.phi).collect();
        Ok((!phis.is_empty()).then(|| phis.iter().sum::<f64>() / phis.len() as f64))
    }
}
