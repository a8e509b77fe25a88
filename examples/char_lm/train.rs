//! Training: what a step of it does, whichever the optimizer.

use std::f64::consts::PI;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, AverageFormat, Collective, MasterWeights, Measure, ParamsSrkl, Rounding, Srkl,
    StateFormat,
};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::model::{Config, Transformer};
use crate::text::{Text, batch, even_batch};

/// All that a training depends on.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Which optimizer to train by
    #[arg(long, value_enum, default_value = "braked-muon-averaged")]
    pub optimizer: Rule,
    /// Learning rate at its peak [default: the preset's; 0.01 for muon, 0.003 for adamw, 0.3 for
    /// reference]
    #[arg(long, value_parser = positive, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Weight decay of the matrices; norms are not decayed [default: 0.1 for muon and adamw; else 0]
    #[arg(long, value_parser = not_negative, allow_negative_numbers = true)]
    weight_decay: Option<f64>,
    /// Norm of all gradients above which they are scaled down to it
    #[arg(long, value_parser = positive, allow_negative_numbers = true)]
    clip: Option<f64>,
    /// Evaluate an average of the weights: k of a polynomial one, over about the last 1/k of the
    /// training [default: as the preset has it]
    #[arg(long, value_parser = not_negative, allow_negative_numbers = true)]
    average: Option<f64>,
    /// Type of the parameters and activations; with bf16 the optimizer keeps master weights. Slow on the CPU
    #[arg(long, default_value = "f32", value_parser = dtype())]
    dtype: DType,
    /// How master weights of bf16 are kept: in f32, as the 16 bits that the parameter lacks, or not at all, with random
    /// rounding
    #[arg(long, value_enum, default_value = "f32")]
    masters: Masters,
    /// Keep moments in 8 bits each, and averages in bf16
    #[arg(long)]
    compact: bool,
    /// Characters that the model sees at most
    #[arg(long, default_value = "64", value_parser = size)]
    pub context: usize,
    /// Values for each character between the layers
    #[arg(long, default_value = "64", value_parser = size)]
    width: usize,
    /// Attention heads in a layer
    #[arg(long, default_value = "4", value_parser = size)]
    heads: usize,
    /// Layers
    #[arg(long, default_value = "2", value_parser = size)]
    layers: usize,
    /// Pieces of text in a batch
    #[arg(long, default_value = "16", value_parser = size)]
    batch: usize,
    /// Batches to a step: their gradients are added up, one batch in memory at a time, and those of all ranks
    #[arg(long, default_value = "1", value_parser = size)]
    pub accumulate: usize,
    /// Steps in all
    #[arg(long, default_value = "4000")]
    pub steps: u64,
    /// Steps over which the learning rate rises to its peak [default: a tenth of all for muon, adamw and
    /// reference; else none]
    #[arg(long)]
    warm_up: Option<u64>,
    /// What it then falls to by a cosine, as a share of the peak [default: 0 for muon, adamw and
    /// reference; else 1, no schedule]
    #[arg(long, value_parser = not_negative, allow_negative_numbers = true)]
    last_lr: Option<f64>,
    /// Seed of the initial weights and of the batches
    #[arg(long, default_value = "0")]
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Rule {
    BrakedMuonAveraged,
    BrakedMuon,
    BrakedAdamAveraged,
    BrakedAdam,
    Kinetic,
    Hessian,
    Reference,
    /// Without a brake
    Muon,
    /// Without a brake
    Adamw,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Masters {
    F32,
    Split,
    None,
}

/// A training after so many steps.
pub struct Training<'a> {
    pub model: Transformer,
    pub optimizer: Srkl,
    pub settings: Settings,
    pub step: u64,
    text: &'a Text,
    device: Device,
}

/// Inputs and targets.
type Batch = (Tensor, Tensor);

impl Rule {
    /// Settings whose learning rate and decay suit this model, if the optimizer needs them.
    fn preset(self) -> ParamsSrkl {
        match self {
            Self::BrakedMuonAveraged => ParamsSrkl::braked_muon_averaged(),
            Self::BrakedMuon => ParamsSrkl::braked_muon(),
            Self::BrakedAdamAveraged => ParamsSrkl::braked_adam_averaged(),
            Self::BrakedAdam => ParamsSrkl::braked_adam(),
            Self::Kinetic => ParamsSrkl::kinetic(),
            Self::Hessian => {
                // A wider difference than the preset's: for networks of ReLU, and for bf16.
                let preset = ParamsSrkl::hessian();
                ParamsSrkl { measure: Measure { delta: 1e-2, ..preset.measure }, ..preset }
            }
            Self::Reference => ParamsSrkl { lr: 0.3, ..ParamsSrkl::reference() },
            Self::Muon => ParamsSrkl::muon(0.01),
            Self::Adamw => ParamsSrkl { weight_decay: 0.1, ..ParamsSrkl::adamw(0.003) },
        }
    }

    /// Whether its learning rate needs a schedule.
    fn is_scheduled(self) -> bool {
        matches!(self, Self::Muon | Self::Adamw | Self::Reference)
    }
}

impl Settings {
    pub fn params(&self) -> ParamsSrkl {
        let preset = self.optimizer.preset();
        ParamsSrkl {
            lr: self.lr.unwrap_or(preset.lr),
            weight_decay: self.weight_decay.unwrap_or(preset.weight_decay),
            max_grad_norm: self.clip,
            average: self.average.map(Average::Polynomial).or(preset.average),
            measure: Measure { seed: self.seed, ..preset.measure },
            state: if self.compact { StateFormat::Compact } else { StateFormat::F32 },
            average_format: if self.compact { AverageFormat::BF16 } else { AverageFormat::F32 },
            master_weights: match self.masters {
                Masters::F32 => MasterWeights::Auto,
                Masters::Split => MasterWeights::Split,
                Masters::None => MasterWeights::None,
            },
            rounding: Rounding::Stochastic,
            ..preset
        }
    }

    fn warm_up(&self) -> u64 {
        let default = if self.optimizer.is_scheduled() { self.steps / 10 } else { 0 };
        self.warm_up.unwrap_or(default)
    }

    fn last_lr(&self) -> f64 {
        self.last_lr.unwrap_or(if self.optimizer.is_scheduled() { 0. } else { 1. })
    }

    /// All of it, in words, to tell two trainings apart.
    pub fn describe(&self) -> String {
        let (warm_up, last_lr) = (Some(self.warm_up()), Some(self.last_lr()));
        format!("{:?} {:?}", Self { warm_up, last_lr, ..self.clone() }, self.params())
    }

    /// The learning rate of a step: a linear warm-up, then half a period of a cosine.
    fn lr_of(&self, step: u64) -> f64 {
        let warm_up = self.warm_up();
        let share = if step < warm_up {
            (step + 1) as f64 / warm_up as f64
        } else {
            let done = (step - warm_up) as f64 / (self.steps - warm_up).max(1) as f64;
            self.last_lr() + (1. - self.last_lr()) * (1. + (PI * done).cos()) / 2.
        };
        share * self.params().lr
    }
}

impl<'a> Training<'a> {
    /// `rank`: of several that train together.
    pub fn new(
        settings: &Settings,
        text: &'a Text,
        device: &Device,
        rank: Option<(Box<dyn Collective>, bool)>,
    ) -> Result<Self> {
        let &Settings { context, width, heads, layers, seed, dtype, .. } = settings;
        let vocabulary = text.alphabet.len();
        let config = Config { vocabulary, context, width, heads, layers };
        let model = Transformer::new(&config, seed, dtype, device)?;
        let optimizer = optimizer(settings, &model, rank)?;
        let settings = settings.clone();
        Ok(Self { model, optimizer, settings, step: 0, text, device: device.clone() })
    }

    /// Takes a step, and returns the loss before it, which stays on the device.
    pub fn step(&mut self) -> Result<Tensor> {
        let batches = self.batches()?;
        self.optimizer.set_learning_rate(self.settings.lr_of(self.step));
        // Each rank has a run of neighbours.
        let each = batches.len() / self.optimizer.world_size();
        let own = &batches[self.optimizer.rank() * each..][..each];
        let losses = self.optimizer.backward_step_over(each, |i| {
            let (inputs, targets) = &own[i];
            self.model.loss(inputs, targets)
        })?;
        self.step += 1;
        Ok(self.optimizer.mean_over_ranks(&losses)?)
    }

    /// Those of the next step, of all ranks. They depend on the seed and the step alone: a resumed training goes on
    /// with the same.
    fn batches(&self) -> Result<Vec<Batch>> {
        let Settings { batch: size, context, accumulate, seed, .. } = self.settings;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.step.to_le_bytes());
        let mut rng = StdRng::from_seed(key);
        let batches =
            (0..accumulate).map(|_| batch(&self.text.train, size, context, &mut rng, &self.device));
        batches.collect()
    }

    /// Calls `f` with the model, of averaged weights if they are averaged.
    pub fn evaluate<T>(&mut self, f: impl FnOnce(&Transformer) -> Result<T>) -> Result<T> {
        let averages = self.optimizer.averages();
        let _averaged = averages.then(|| self.optimizer.swap_averaged()).transpose()?;
        f(&self.model)
    }

    /// The loss on all of the text that was held out, in pieces of a whole context.
    pub fn held_out(&mut self) -> Result<f64> {
        let Settings { batch, context, .. } = self.settings;
        let pieces = self.text.validation.len() / context;
        let (inputs, targets) = even_batch(&self.text.validation, pieces, context, &self.device)?;
        self.evaluate(|model| {
            let mut sum = 0.;
            for start in (0..pieces).step_by(batch) {
                let size = batch.min(pieces - start);
                let (inputs, targets) =
                    (inputs.narrow(0, start, size)?, targets.narrow(0, start, size)?);
                let loss = model.loss(&inputs, &targets)?.to_scalar::<f32>()?;
                sum += f64::from(loss) * size as f64;
            }
            Ok(sum / pieces as f64)
        })
    }

    /// The mean over all parameter tensors of what the last step multiplied their directions by.
    pub fn phi(&self) -> Result<Option<f64>> {
        let phi: Vec<f64> =
            self.optimizer.telemetry()?.iter().filter_map(|block| block.phi).collect();
        Ok((!phi.is_empty()).then(|| phi.iter().sum::<f64>() / phi.len() as f64))
    }

    /// How many gradients were computed, each of the `accumulate` batches of a step.
    pub fn gradients(&self) -> Result<u64> {
        Ok(self.step + self.optimizer.measurements()?.taken)
    }
}

/// Norms and biases don't decay.
fn optimizer(
    settings: &Settings,
    model: &Transformer,
    rank: Option<(Box<dyn Collective>, bool)>,
) -> Result<Srkl> {
    let params = settings.params();
    let no_decay = ParamsSrkl { weight_decay: 0., ..params.clone() };
    let mut builder = Srkl::builder().default_group(params);
    if let Some((rank, sharded)) = rank {
        builder = builder.collective(rank).sharded(sharded);
    }
    Ok(builder.group("no_decay", no_decay, |_, var| var.rank() < 2).build_varmap(&model.varmap)?)
}

pub fn positive(text: &str) -> Result<f64> {
    let number: f64 = text.parse()?;
    ensure!(number > 0. && number.is_finite(), "expected a finite number above 0");
    Ok(number)
}

fn not_negative(text: &str) -> Result<f64> {
    let number: f64 = text.parse()?;
    ensure!(number >= 0. && number.is_finite(), "expected a finite number, 0 or above");
    Ok(number)
}

fn size(text: &str) -> Result<usize> {
    let number: usize = text.parse()?;
    ensure!(number > 0, "expected a number above 0");
    Ok(number)
}

fn dtype() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f32", "bf16"]).try_map(|name| name.parse::<DType>())
}
