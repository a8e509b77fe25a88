//! A small model of LLaMA's kind, with the names of its checkpoints.
//!
//! candle's fused `rms_norm`, `softmax_last_dim` and `rope` have no gradient, and say so nowhere: what is
//! below them would not be trained. Here are the slow ones.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::{rms_norm_slow, silu, softmax};
use candle_nn::rotary_emb::rope_slow;
use candle_nn::{
    Embedding, Init, Linear, Module, VarBuilder, VarMap, embedding, linear_no_bias as linear,
};

use crate::compare::draw_weights;

const WIDTH: usize = 64;
const HIDDEN: usize = 176;
const LAYERS: usize = 2;
const HEADS: usize = 4;
/// Heads of keys and values: each serves `HEADS / KV_HEADS` heads of queries.
const KV_HEADS: usize = 2;
const HEAD_WIDTH: usize = WIDTH / HEADS;
const ROPE_BASE: f32 = 10_000.;
const EPS: f32 = 1e-5;
/// The standard deviation of the initial weights.
const SPREAD: f64 = 0.02;

pub struct Llama {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    places: Places,
}

struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
}

/// SwiGLU.
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

struct RmsNorm {
    weight: Tensor,
}

/// What depends on the places in the context alone.
struct Places {
    /// Of the rotations, `(length, HEAD_WIDTH / 2)`.
    cos: Tensor,
    sin: Tensor,
    /// What is added to the attention that each place pays to each: 0, or -inf for what comes later.
    mask: Tensor,
}

impl Llama {
    /// For texts of `length` tokens, with its variables. Weights are normal, by the seed.
    pub fn new(vocabulary: usize, length: usize, seed: u64) -> Result<(VarMap, Self)> {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let model = vb.pp("model");
        let layer = |i: usize| Layer::new(model.pp("layers").pp(i));
        let llama = Self {
            embed_tokens: embedding(vocabulary, WIDTH, model.pp("embed_tokens"))?,
            layers: (0..LAYERS).map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::new(model.pp("norm"))?,
            lm_head: linear(WIDTH, vocabulary, vb.pp("lm_head"))?,
            places: Places::new(length)?,
        };
        draw_weights(&varmap, seed, |_, _| SPREAD)?;
        Ok((varmap, llama))
    }

    /// Of tokens `(texts, length)`, for each place the scores of what comes next: `(texts * length,
    /// vocabulary)`.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        // One row for each place of each text: gradients of what rows share are summed fastest so.
        let mut x = self.embed_tokens.forward(&tokens.flatten_all()?)?;
        for layer in &self.layers {
            x = layer.forward(&x, &self.places)?;
        }
        Ok(self.lm_head.forward(&self.norm.forward(&x)?)?)
    }
}

impl Layer {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            input_layernorm: RmsNorm::new(vb.pp("input_layernorm"))?,
            self_attn: Attention::new(vb.pp("self_attn"))?,
            post_attention_layernorm: RmsNorm::new(vb.pp("post_attention_layernorm"))?,
            mlp: Mlp::new(vb.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor, places: &Places) -> Result<Tensor> {
        let x = (x + self.self_attn.forward(&self.input_layernorm.forward(x)?, places)?)?;
        Ok((&x + self.mlp.forward(&self.post_attention_layernorm.forward(&x)?)?)?)
    }
}

impl Attention {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            q_proj: linear(WIDTH, HEADS * HEAD_WIDTH, vb.pp("q_proj"))?,
            k_proj: linear(WIDTH, KV_HEADS * HEAD_WIDTH, vb.pp("k_proj"))?,
            v_proj: linear(WIDTH, KV_HEADS * HEAD_WIDTH, vb.pp("v_proj"))?,
            o_proj: linear(HEADS * HEAD_WIDTH, WIDTH, vb.pp("o_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor, places: &Places) -> Result<Tensor> {
        let length = places.mask.dim(0)?;
        // (texts, heads, length, HEAD_WIDTH)
        let heads = |projection: &Linear, heads| -> Result<Tensor> {
            let x = projection.forward(x)?.reshape(((), length, heads, HEAD_WIDTH))?;
            Ok(x.transpose(1, 2)?.contiguous()?)
        };
        let q = places.rotate(&heads(&self.q_proj, HEADS)?)?;
        let k = repeated(&places.rotate(&heads(&self.k_proj, KV_HEADS)?)?)?;
        let v = repeated(&heads(&self.v_proj, KV_HEADS)?)?;

        let scores = (q.matmul(&k.t()?)? / (HEAD_WIDTH as f64).sqrt())?;
        let shares = softmax(&scores.broadcast_add(&places.mask)?, D::Minus1)?;
        let mixed = shares.matmul(&v)?.transpose(1, 2)?.reshape(x.shape())?;
        Ok(self.o_proj.forward(&mixed)?)
    }
}

/// Each head of keys or values as often as there are heads of queries for it.
fn repeated(x: &Tensor) -> Result<Tensor> {
    let (texts, heads, length, width) = x.dims4()?;
    let times = HEADS / KV_HEADS;
    let x = x.unsqueeze(2)?.broadcast_as((texts, heads, times, length, width))?;
    Ok(x.reshape((texts, HEADS, length, width))?)
}

impl Mlp {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            gate_proj: linear(WIDTH, HIDDEN, vb.pp("gate_proj"))?,
            up_proj: linear(WIDTH, HIDDEN, vb.pp("up_proj"))?,
            down_proj: linear(HIDDEN, WIDTH, vb.pp("down_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gated = (silu(&self.gate_proj.forward(x)?)? * self.up_proj.forward(x)?)?;
        Ok(self.down_proj.forward(&gated)?)
    }
}

impl RmsNorm {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints(WIDTH, "weight", Init::Const(1.))? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm_slow(x, &self.weight, EPS)?)
    }
}

impl Places {
    fn new(length: usize) -> Result<Self> {
        let device = &Device::Cpu;
        let half = HEAD_WIDTH / 2;
        let angle = |place, i| place as f32 * ROPE_BASE.powf(-(i as f32) / half as f32);
        let angles = (0..length).flat_map(|place| (0..half).map(move |i| angle(place, i)));
        let angles = Tensor::from_vec(angles.collect(), (length, half), device)?;
        let later = |i, j| if j > i { f32::NEG_INFINITY } else { 0. };
        let mask = (0..length).flat_map(|i| (0..length).map(move |j| later(i, j)));
        let mask = Tensor::from_vec(mask.collect(), (length, length), device)?;
        Ok(Self { cos: angles.cos()?, sin: angles.sin()?, mask })
    }

    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rope_slow(x, &self.cos, &self.sin)?)
    }
}
