//! What the tests share: tensors of any dtype, and the rule written in f64 from its formula.
#![allow(dead_code)] // Each test file uses its part.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_srkl::{Beta, ParamsSrkl, Scope};

pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

/// Sizes around lanes (1024), chunks (8192) and the pieces that threads take (131072).
pub const SIZES: [usize; 15] =
    [0, 1, 3, 7, 64, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 131_073];

/// A variable that holds `values` rounded to `dtype`.
pub fn var(values: &[f64], dtype: DType) -> Result<Var> {
    Var::from_tensor(&tensor(values, dtype)?)
}

pub fn tensor(values: &[f64], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(dtype)
}

/// The values of a tensor of any float dtype, exactly.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// The bits of a tensor, so that -0 is not +0 and a NaN is itself.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let tensor = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => tensor.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        DType::F32 => tensor.to_vec1::<f32>()?.into_iter().map(|x| x.to_bits() as u64).collect(),
        DType::BF16 => {
            tensor.to_vec1::<half::bf16>()?.into_iter().map(|x| x.to_bits() as u64).collect()
        }
        DType::F16 => {
            tensor.to_vec1::<half::f16>()?.into_iter().map(|x| x.to_bits() as u64).collect()
        }
        dtype => panic!("no bits of {dtype:?}"),
    })
}

pub fn grads<'a>(pairs: impl IntoIterator<Item = (&'a Var, Tensor)>) -> GradStore {
    let mut grads = GradStore::default();
    for (var, grad) in pairs {
        grads.insert(var, grad);
    }
    grads
}

/// Normal numbers times `scale`; `salt` makes lists differ.
pub fn noise(n: usize, scale: f64, salt: u64) -> Vec<f64> {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    let mut rng = StdRng::seed_from_u64(salt);
    // Twelve uniform numbers make a normal one, nearly.
    (0..n).map(|_| ((0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.) * scale).collect()
}

/// `||g * g||_2`, as it is defined.
pub fn curvature(g: &[f64]) -> f64 {
    // By the largest element, so that nothing overflows.
    let max = g.iter().fold(0f64, |max, g| max.max(g.abs()));
    if max == 0. {
        return 0.;
    }
    max * max * sum(g.iter().map(|g| (g / max).powi(4))).sqrt()
}

pub fn norm(g: &[f64]) -> f64 {
    sum(g.iter().map(|g| g * g)).sqrt()
}

/// Kahan's sum: right to the last digits for any number of positive terms.
fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0., 0.);
    for term in terms {
        let term = term - lost;
        let next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    }
    sum
}

/// One step of the rule on a list of blocks in f64, from the formula alone; `schedule` is its `s`.
pub fn oracle(
    params: &ParamsSrkl,
    schedule: f64,
    grad_scale: f64,
    blocks: &mut [(Vec<f64>, Vec<f64>)],
) -> Vec<f64> {
    let all: Vec<f64> = blocks.iter().flat_map(|(_, g)| g.iter().map(|g| g / grad_scale)).collect();
    let clip = match params.max_grad_norm {
        Some(max) if norm(&all) > max => max / norm(&all),
        _ => 1.,
    };
    let all: Vec<f64> = all.iter().map(|g| g * clip).collect();
    let beta = match params.beta {
        Beta::Fixed(beta) => beta,
        Beta::Tied(gamma) => gamma * params.lr,
    };
    let phi_at = |h: f64| schedule * params.lr / (1. + beta * h);
    let mut phis = vec![];
    for (w, g) in blocks {
        let g: Vec<f64> = g.iter().map(|g| g / grad_scale * clip).collect();
        let h = if params.scope == Scope::Global { curvature(&all) } else { curvature(&g) };
        phis.push(phi_at(h));
        for (w, g) in w.iter_mut().zip(&g) {
            let phi = if params.scope == Scope::Element { phi_at(g * g) } else { phi_at(h) };
            *w = (1. - phi * params.weight_decay) * *w - phi * g;
        }
    }
    phis
}
