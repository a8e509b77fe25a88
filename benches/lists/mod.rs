//! The parameter lists that the benches step.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_srkl::{MasterWeights, ParamsSrkl, StateFormat};

/// A list of parameter tensors.
pub struct List {
    pub name: &'static str,
    pub dtype: DType,
    pub shapes: Vec<Vec<usize>>,
}

impl List {
    pub fn all() -> [Self; 6] {
        let list = |name, dtype, shapes| Self { name, dtype, shapes };
        [
            list("16M f32", DType::F32, vec![vec![1 << 24]]),
            list("16M bf16", DType::BF16, vec![vec![1 << 24]]),
            list("GPT-2 small f32", DType::F32, gpt2_small()),
            list("GPT-2 small bf16", DType::BF16, gpt2_small()),
            list("4 layers of 256 f32", DType::F32, layers(4, 256)),
            list("10000 x 64 f32", DType::F32, vec![vec![64]; 10_000]),
        ]
    }

    pub fn parameters(&self) -> usize {
        self.shapes.iter().map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// Variables and their gradients: small numbers, none alike. In memory the gradients lie behind
    /// the variables, last one first, as after a backward pass.
    pub fn tensors(&self, device: &Device) -> anyhow::Result<(Vec<Var>, GradStore)> {
        let noise =
            |shape: &[usize]| Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(self.dtype);
        let mut vars = vec![];
        for shape in &self.shapes {
            vars.push(Var::from_tensor(&noise(shape)?)?);
        }
        let mut grads = GradStore::default();
        for var in vars.iter().rev() {
            grads.insert(var, noise(var.dims())?);
        }
        Ok((vars, grads))
    }
}

/// Moments in 2 bytes, and bf16 masters in 2 bytes.
pub fn packed(params: ParamsSrkl) -> ParamsSrkl {
    let (state, master_weights) = (StateFormat::Compact, MasterWeights::Split);
    ParamsSrkl { state, master_weights, ..params }
}

/// Hidden layers of a transformer.
fn layers(count: usize, d: usize) -> Vec<Vec<usize>> {
    let attention = [vec![d], vec![3 * d, d], vec![3 * d], vec![d, d], vec![d]];
    let mlp = [vec![d], vec![4 * d, d], vec![4 * d], vec![d, 4 * d], vec![d]];
    (0..count).flat_map(|_| attention.clone().into_iter().chain(mlp.clone())).collect()
}

/// The parameters of GPT-2 small: 124 million in 148 tensors.
fn gpt2_small() -> Vec<Vec<usize>> {
    let d = 768;
    let mut shapes = vec![vec![50257, d], vec![1024, d]];
    for _ in 0..12 {
        shapes.extend([vec![d], vec![d], vec![d, 3 * d], vec![3 * d], vec![d, d], vec![d]]);
        shapes.extend([vec![d], vec![d], vec![d, 4 * d], vec![4 * d], vec![4 * d, d], vec![d]]);
    }
    shapes.extend([vec![d], vec![d]]);
    shapes
}
