//! The plays of `data/shakespeare.txt.gz` as tokens, one for each character.

use std::collections::BTreeSet;
use std::io::Read;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use rand::{Rng, RngExt};

static PLAYS: &[u8] = include_bytes!("../../data/shakespeare.txt.gz");

/// One in so many characters is held out: the last ones.
const HELD_OUT: usize = 10;

pub struct Text {
    /// What each token stands for, in ascending order.
    pub alphabet: Vec<char>,
    pub train: Vec<u32>,
    pub validation: Vec<u32>,
}

impl Text {
    pub fn load() -> Result<Self> {
        let mut plays = String::new();
        GzDecoder::new(PLAYS).read_to_string(&mut plays).context("data/shakespeare.txt.gz")?;
        let alphabet = plays.chars().collect::<BTreeSet<_>>().into_iter().collect();
        let mut text = Self { alphabet, train: vec![], validation: vec![] };
        text.train = text.encode(&plays)?;
        text.validation = text.train.split_off(text.train.len() - text.train.len() / HELD_OUT);
        Ok(text)
    }

    /// Leaves out tokens that stand for nothing.
    pub fn decode(&self, tokens: &[u32]) -> String {
        tokens.iter().filter_map(|&token| self.alphabet.get(token as usize)).collect()
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let token = |c| {
            let place = self.alphabet.binary_search(&c).ok();
            Ok(place.with_context(|| format!("{c:?} is not in the plays"))? as u32)
        };
        text.chars().map(token).collect()
    }
}

/// Windows of `length` characters from random places, `(batch, length)`: the inputs, and the
/// targets, which are one character further.
pub fn batch(
    tokens: &[u32],
    batch: usize,
    length: usize,
    rng: &mut impl Rng,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    ensure!(length < tokens.len(), "windows of {length} characters of {}", tokens.len());
    let starts = (0..batch).map(|_| rng.random_range(0..tokens.len() - length));
    windows(tokens, starts, length, device)
}

/// As [`batch`], from places evenly spaced over all of the tokens.
pub fn even_batch(
    tokens: &[u32],
    batch: usize,
    length: usize,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    ensure!(length < tokens.len(), "windows of {length} characters of {}", tokens.len());
    let starts = (0..batch).map(|i| i * (tokens.len() - length) / batch);
    windows(tokens, starts, length, device)
}

fn windows(
    tokens: &[u32],
    starts: impl Iterator<Item = usize>,
    length: usize,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let (mut inputs, mut targets) = (vec![], vec![]);
    for start in starts {
        inputs.extend_from_slice(&tokens[start..start + length]);
        targets.extend_from_slice(&tokens[start + 1..start + 1 + length]);
    }
    let shape = (inputs.len() / length, length);
    let inputs = Tensor::from_vec(inputs, shape, device)?;
    Ok((inputs, Tensor::from_vec(targets, shape, device)?))
}
