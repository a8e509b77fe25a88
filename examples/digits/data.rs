//! The handwritten digits of `data/digits.csv.gz`, split into a training and a held-out part.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use flate2::read::GzDecoder;
use rand::seq::SliceRandom;

use crate::random::{Stream, rng};

static DIGITS: &[u8] = include_bytes!("../../data/digits.csv.gz");

/// 8 by 8 grey levels.
pub const PIXELS: usize = 64;
pub const CLASSES: usize = 10;
const DARKEST: f32 = 16.;

/// Of the 1797 images; the rest is the training part.
const HELD_OUT: usize = 360;
/// Of the training part, to choose learning rates by.
const VALIDATION: usize = 237;

/// Some of the images, one a row, with grey levels of 0 to 1.
pub struct Part {
    pub images: Tensor,
    pub classes: Tensor,
}

pub struct Digits {
    pub train: Part,
    pub held_out: Part,
}

impl Digits {
    /// Splits the images at random, by the seed.
    pub fn load(seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let all = read(dtype, device).context("data/digits.csv.gz")?;
        let mut order: Vec<u32> = (0..all.len()? as u32).collect();
        order.shuffle(&mut rng(seed, Stream::Split));
        let (held_out, train) = order.split_at(HELD_OUT);
        Ok(Self { train: all.select(train)?, held_out: all.select(held_out)? })
    }
}

impl Part {
    pub fn len(&self) -> Result<usize> {
        Ok(self.classes.dim(0)?)
    }

    /// The images of these row numbers.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        let rows = Tensor::new(rows, self.images.device())?;
        Ok(Self {
            images: self.images.index_select(&rows, 0)?,
            classes: self.classes.index_select(&rows, 0)?,
        })
    }

    /// Takes a validation part off: what is left to train on, and that. The rows are in random order
    /// already.
    pub fn split_validation(&self) -> Result<(Self, Self)> {
        let rest = self.len()? - VALIDATION;
        Ok((self.narrow(0, rest)?, self.narrow(rest, VALIDATION)?))
    }

    fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self {
            images: self.images.narrow(0, start, len)?,
            classes: self.classes.narrow(0, start, len)?,
        })
    }
}

fn read(dtype: DType, device: &Device) -> Result<Part> {
    let mut csv = csv::ReaderBuilder::new().has_headers(false).from_reader(GzDecoder::new(DIGITS));
    let (mut greys, mut classes) = (vec![], vec![]);
    for row in csv.records() {
        let row = row?;
        ensure!(row.len() == PIXELS + 1, "expected {} columns, got {}", PIXELS + 1, row.len());
        for grey in row.iter().take(PIXELS) {
            greys.push(grey.parse::<f32>()? / DARKEST);
        }
        classes.push(row[PIXELS].parse::<u32>()?);
    }
    Ok(Part {
        images: Tensor::from_vec(greys, (classes.len(), PIXELS), device)?.to_dtype(dtype)?,
        classes: Tensor::new(classes, device)?,
    })
}
