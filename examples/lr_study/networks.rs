//! Tasks that train networks by mini-batches.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::data::{self, CLASSES, PIXELS, Part};
use crate::mlp::{Mlp, WIDTHS};
use crate::random::{Stream, rng};
use crate::tasks::{Judged, Problem};
use crate::text::{Text, batch, even_batch};
use crate::transformer::{Config, Transformer};

const DEVICE: Device = Device::Cpu;

const DEEP: [usize; 6] = [PIXELS, 128, 128, 128, 128, CLASSES];

/// A perceptron with ReLU on handwritten digits, in mini-batches of 32.
pub struct Digits {
    mlp: Mlp,
    digits: data::Digits,
    rng: StdRng,
    batch: Part,
}

impl Digits {
    const BATCH: usize = 32;

    pub fn shallow(seed: u64) -> Result<Self> {
        Self::new(&WIDTHS, seed)
    }

    pub fn deep(seed: u64) -> Result<Self> {
        Self::new(&DEEP, seed)
    }

    fn new(widths: &[usize], seed: u64) -> Result<Self> {
        let mlp = Mlp::new(widths, seed, DType::F32, &DEVICE)?;
        let digits = data::Digits::load(seed, DType::F32, &DEVICE)?;
        let batch = digits.train.select(&[])?;
        Ok(Self { mlp, digits, rng: rng(seed, Stream::Epoch(0)), batch })
    }
}

impl Problem for Digits {
    fn varmap(&self) -> &VarMap {
        &self.mlp.varmap
    }

    fn draw(&mut self) -> Result<()> {
        let images = self.digits.train.len()? as u32;
        let rows: Vec<u32> = (0..Self::BATCH).map(|_| self.rng.random_range(0..images)).collect();
        self.batch = self.digits.train.select(&rows)?;
        Ok(())
    }

    fn loss(&self) -> Result<Tensor> {
        Ok(self.mlp.loss(&self.batch)?)
    }

    fn judge(&self) -> Result<Judged> {
        let loss = f64::from(self.mlp.loss(&self.digits.train)?.to_scalar::<f32>()?);
        Ok(Judged { loss, score: self.mlp.accuracy(&self.digits.held_out)? })
    }
}

/// A transformer that predicts the next character of Shakespeare's plays.
pub struct CharLm {
    transformer: Transformer,
    train: Vec<u32>,
    held_out: (Tensor, Tensor),
    rng: StdRng,
    batch: (Tensor, Tensor),
}

impl CharLm {
    const BATCH: usize = 16;
    const CONTEXT: usize = 32;

    /// The held-out loss is that of so many windows, the same ones for every seed.
    const WINDOWS: usize = 64;

    pub fn new(seed: u64, layers: usize, width: usize) -> Result<Self> {
        let text = Text::load()?;
        let vocabulary = text.alphabet.len();
        let config = Config { vocabulary, context: Self::CONTEXT, width, heads: 4, layers };
        let held_out = even_batch(&text.validation, Self::WINDOWS, Self::CONTEXT, &DEVICE)?;
        Ok(Self {
            transformer: Transformer::new(&config, seed, DType::F32, &DEVICE)?,
            train: text.train,
            batch: held_out.clone(),
            held_out,
            rng: rng(seed, Stream::Epoch(0)),
        })
    }
}

impl Problem for CharLm {
    fn varmap(&self) -> &VarMap {
        &self.transformer.varmap
    }

    fn draw(&mut self) -> Result<()> {
        self.batch = batch(&self.train, Self::BATCH, Self::CONTEXT, &mut self.rng, &DEVICE)?;
        Ok(())
    }

    fn loss(&self) -> Result<Tensor> {
        self.transformer.loss(&self.batch.0, &self.batch.1)
    }

    fn judge(&self) -> Result<Judged> {
        let (inputs, targets) = &self.held_out;
        let loss = f64::from(self.transformer.loss(inputs, targets)?.to_scalar::<f32>()?);
        Ok(Judged { loss, score: loss })
    }
}
