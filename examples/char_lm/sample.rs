//! Text by the model.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, IndexOp, Tensor};
use rand::Rng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;

use crate::model::Transformer;

/// Goes on from `tokens` by `count` more, each drawn by its probability to the power of
/// `1 / temperature`. The model sees the last `context` of them.
pub fn extend(
    tokens: &mut Vec<u32>,
    count: usize,
    model: &Transformer,
    context: usize,
    temperature: f64,
    rng: &mut impl Rng,
    device: &Device,
) -> Result<()> {
    ensure!(!tokens.is_empty(), "an empty text can't be gone on with");
    for _ in 0..count {
        let seen = &tokens[tokens.len().saturating_sub(context)..];
        let logits = model.logits(&Tensor::new(seen, device)?.unsqueeze(0)?)?;
        let next = logits.i((0, seen.len() - 1))?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let most = next.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights = next.iter().map(|logit| ((logit - most) / temperature).exp());
        tokens.push(WeightedIndex::new(weights)?.sample(rng) as u32);
    }
    Ok(())
}
