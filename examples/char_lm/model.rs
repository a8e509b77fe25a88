//! A transformer that predicts the next character.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Init, Linear, Module, VarMap};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The standard deviation of the initial weights.
const SPREAD: f64 = 0.02;

/// The sizes of a [`Transformer`].
pub struct Config {
    /// How many characters there are.
    pub vocabulary: usize,
    /// How many characters it sees at most.
    pub context: usize,
    /// Values for each character between the layers: a multiple of `heads`.
    pub width: usize,
    /// Attention heads in a layer.
    pub heads: usize,
    pub layers: usize,
}

/// Each layer normalizes what it reads, and adds to it what it makes of that: attention to the
/// characters so far, then a perceptron. Only the norms have biases.
pub struct Transformer {
    pub varmap: VarMap,
    /// Of each token, one a row.
    tokens: Tensor,
    /// Of each place in the context, one a row.
    positions: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
    /// What is added to the attention that each place pays to each: 0, or -inf for what comes later.
    mask: Tensor,
}

struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

struct Attention {
    /// Queries, keys and values of all heads by one product.
    qkv: Linear,
    out: Linear,
    heads: usize,
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl Transformer {
    /// The initial weights are those of the seed.
    pub fn new(config: &Config, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let &Config { vocabulary, context, width, heads, layers } = config;
        ensure!(
            vocabulary > 0 && context > 0 && width > 0 && heads > 0 && layers > 0,
            "a transformer has no size of 0"
        );
        ensure!(width % heads == 0, "a width of {width} can't be split among {heads} heads");

        let rng = StdRng::seed_from_u64(seed);
        let mut init = Initial { varmap: VarMap::new(), rng, dtype, device };
        // So that the sum of all that the layers add does not grow with their number.
        let small = SPREAD / (2. * layers as f64).sqrt();
        let tokens = init.random((vocabulary, width), "token.weight", SPREAD)?;
        let positions = init.random((context, width), "position.weight", SPREAD)?;
        let mut blocks = vec![];
        for i in 0..layers {
            let name = |part| format!("block{i}.{part}");
            let attention = Attention {
                qkv: init.linear(width, 3 * width, &name("attention.qkv"), SPREAD)?,
                out: init.linear(width, width, &name("attention.out"), small)?,
                heads,
            };
            blocks.push(Block {
                norm1: init.norm(width, &name("norm1"))?,
                attention,
                norm2: init.norm(width, &name("norm2"))?,
                up: init.linear(width, 4 * width, &name("mlp.up"), SPREAD)?,
                down: init.linear(4 * width, width, &name("mlp.down"), small)?,
            });
        }
        let norm = init.norm(width, "norm")?;
        let head = init.linear(width, vocabulary, "head", SPREAD)?;

        let later = |i, j| if j > i { f32::NEG_INFINITY } else { 0. };
        let mask = (0..context).flat_map(|i| (0..context).map(move |j| later(i, j))).collect();
        let mask = Tensor::from_vec(mask, (context, context), device)?;
        Ok(Self { varmap: init.varmap, tokens, positions, blocks, norm, head, mask })
    }

    /// Of tokens `(batch, length)`, for each place the scores of what comes next: `(batch, length,
    /// vocabulary)`.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, length) = tokens.dims2()?;
        let context = self.positions.dim(0)?;
        ensure!(length <= context, "{length} characters, but a context of {context}");

        // One row for each place of each text: gradients of what rows share are summed fastest so.
        let x =
            self.tokens.index_select(&tokens.flatten_all()?, 0)?.reshape((batch, length, ()))?;
        let mut x = x.broadcast_add(&self.positions.narrow(0, 0, length)?)?.flatten_to(1)?;
        let mask = self.mask.narrow(0, 0, length)?.narrow(1, 0, length)?;
        for block in &self.blocks {
            x = (&x + block.attention.forward(&block.norm1.forward(&x)?, batch, &mask)?)?;
            let hidden = block.up.forward(&block.norm2.forward(&x)?)?.relu()?;
            x = (x + block.down.forward(&hidden)?)?;
        }
        Ok(self.head.forward(&self.norm.forward(&x)?)?.reshape((batch, length, ()))?)
    }

    /// The mean cross entropy in nats a character, in f32 whatever the model's dtype.
    pub fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let logits = self.logits(inputs)?.flatten_to(1)?.to_dtype(DType::F32)?;
        Ok(candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?)
    }
}

impl Attention {
    fn forward(&self, x: &Tensor, batch: usize, mask: &Tensor) -> Result<Tensor> {
        let (length, width) = (mask.dim(0)?, x.dim(1)?);
        let qkv = self.qkv.forward(x)?;
        let part = |i| {
            let part = qkv.narrow(D::Minus1, i * width, width)?;
            let heads = part.reshape((batch, length, self.heads, width / self.heads))?;
            heads.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scale = (self.heads as f64 / width as f64).sqrt();
        let scores = (q * scale)?.matmul(&k.t()?)?.to_dtype(DType::F32)?;
        let shares = softmax(&scores.broadcast_add(mask)?)?.to_dtype(x.dtype())?;
        let mixed = shares.matmul(&v)?.transpose(1, 2)?.reshape((batch * length, width))?;
        Ok(self.out.forward(&mixed)?)
    }
}

/// Over the last dimension. (candle's `softmax_last_dim` has no gradient; its `softmax` has one of
/// the maximum too, which cancels.)
fn softmax(x: &Tensor) -> Result<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

impl LayerNorm {
    /// In f32 whatever the dtype. (candle's own has no gradient.)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = x.to_dtype(DType::F32)?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(variance + 1e-5)?.sqrt()?)?.to_dtype(dtype)?;
        Ok(x.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?)
    }
}

/// Makes the variables. (candle's random initial values on the CPU can't be seeded.)
struct Initial<'a> {
    varmap: VarMap,
    rng: StdRng,
    dtype: DType,
    device: &'a Device,
}

impl Initial<'_> {
    fn linear(&mut self, inputs: usize, outputs: usize, name: &str, spread: f64) -> Result<Linear> {
        let weight = self.random((outputs, inputs), &format!("{name}.weight"), spread)?;
        Ok(Linear::new(weight, None))
    }

    fn norm(&mut self, width: usize, name: &str) -> Result<LayerNorm> {
        let weight = self.constant(width, &format!("{name}.weight"), 1.)?;
        let bias = self.constant(width, &format!("{name}.bias"), 0.)?;
        Ok(LayerNorm { weight, bias })
    }

    /// Uniform around 0, of this standard deviation.
    fn random(&mut self, shape: (usize, usize), name: &str, spread: f64) -> Result<Tensor> {
        let var = self.varmap.get(shape, name, Init::Const(0.), self.dtype, self.device)?;
        let bound = (3f64.sqrt() * spread) as f32;
        let values = (0..shape.0 * shape.1).map(|_| self.rng.random_range(-bound..bound)).collect();
        let values = Tensor::from_vec::<_, f32>(values, shape, self.device)?;
        self.varmap.set_one(name, values.to_dtype(self.dtype)?)?;
        Ok(var)
    }

    fn constant(&mut self, size: usize, name: &str, value: f64) -> Result<Tensor> {
        Ok(self.varmap.get(size, name, Init::Const(value), self.dtype, self.device)?)
    }
}
