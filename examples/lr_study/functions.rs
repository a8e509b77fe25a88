//! Tasks without batches: functions of one vector.

use std::f64::consts::TAU;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarMap};
use rand::{Rng, RngExt};

use crate::random::{Stream, rng};
use crate::tasks::{Judged, Problem};

type Value = dyn Fn(&Tensor) -> candle_core::Result<Tensor>;

pub struct Function {
    varmap: VarMap,
    w: Tensor,
    value: Box<Value>,
}

impl Function {
    fn new(
        start: &[f64],
        dtype: DType,
        value: impl Fn(&Tensor) -> candle_core::Result<Tensor> + 'static,
    ) -> Result<Self> {
        let device = Device::Cpu;
        let mut varmap = VarMap::new();
        let w = varmap.get(start.len(), "w", Init::Const(0.), dtype, &device)?;
        varmap.set_one("w", Tensor::new(start, &device)?.to_dtype(dtype)?)?;
        Ok(Self { varmap, w, value: Box::new(value) })
    }
}

impl Problem for Function {
    fn varmap(&self) -> &VarMap {
        &self.varmap
    }

    fn loss(&self) -> Result<Tensor> {
        Ok((self.value)(&self.w)?)
    }

    fn judge(&self) -> Result<Judged> {
        let loss = self.loss()?.to_dtype(DType::F64)?.to_scalar()?;
        Ok(Judged { loss, score: loss })
    }
}

/// `w' H w / 2` in f64, where the eigenvalues of `H` go from 0.01 to 100, evenly in their logarithms,
/// and its eigenvectors are random.
pub fn quadratic(seed: u64) -> Result<Function> {
    const N: usize = 50;
    let mut rng = rng(seed, Stream::Weights);
    let eigenvectors = orthonormal(N, &mut rng);
    // The rows of sqrt(L) V', so that H = V L V' is `root' root`.
    let mut root = vec![];
    for (i, eigenvector) in eigenvectors.iter().enumerate() {
        let eigenvalue = 10f64.powf(4. * i as f64 / (N - 1) as f64 - 2.);
        root.extend(eigenvector.iter().map(|x| eigenvalue.sqrt() * x));
    }
    let root = Tensor::from_vec(root, (N, N), &Device::Cpu)?;
    let start = normal(N, &mut rng);
    Function::new(&start, DType::F64, move |w| {
        root.matmul(&w.unsqueeze(1)?)?.sqr()?.sum_all()? * 0.5
    })
}

/// `(1 - x)^2 + 100 (y - x^2)^2` in f64.
pub fn rosenbrock() -> Result<Function> {
    Function::new(&[-1.2, 1.], DType::F64, |w| {
        let (x, y) = (w.get(0)?, w.get(1)?);
        let slope = x.affine(-1., 1.)?.sqr()?;
        let valley = (y - x.sqr()?)?.sqr()?;
        slope + (valley * 100.)?
    })
}

/// The mean over 200 points in 10 dimensions of `ln(1 + exp(-margin))`, in f32. A plane through 0
/// separates the classes, so that the loss and with it the curvature vanish as `w` grows: there is
/// no minimum.
pub fn logistic(seed: u64) -> Result<Function> {
    const POINTS: usize = 200;
    const N: usize = 10;
    let mut rng = rng(seed, Stream::Weights);
    let plane = normal(N, &mut rng);
    let mut signed = vec![];
    for _ in 0..POINTS {
        let point = normal(N, &mut rng);
        // A point of class -1, mirrored, is one of class 1.
        let class = dot(&point, &plane).signum();
        signed.extend(point.iter().map(|x| (class * x) as f32));
    }
    let signed = Tensor::from_vec(signed, (POINTS, N), &Device::Cpu)?;
    let first = Tensor::zeros(POINTS, DType::U32, &Device::Cpu)?;
    Function::new(&[0.; N], DType::F32, move |w| {
        let margin = signed.matmul(&w.unsqueeze(1)?)?;
        // Of the two classes' logits, the margin and 0: no exponential overflows, and the gradient
        // is right at a margin of 0 too.
        candle_nn::loss::cross_entropy(&margin.pad_with_zeros(1, 0, 1)?, &first)
    })
}

/// Random vectors, each of length 1 and perpendicular to all before it (Gram and Schmidt).
fn orthonormal(n: usize, rng: &mut impl Rng) -> Vec<Vec<f64>> {
    let mut vectors: Vec<Vec<f64>> = vec![];
    for _ in 0..n {
        let mut vector = normal(n, rng);
        for earlier in &vectors {
            let along = dot(&vector, earlier);
            vector.iter_mut().zip(earlier).for_each(|(x, e)| *x -= along * e);
        }
        let length = dot(&vector, &vector).sqrt();
        vector.iter_mut().for_each(|x| *x /= length);
        vectors.push(vector);
    }
    vectors
}

/// Normally distributed numbers (Box and Muller).
fn normal(n: usize, rng: &mut impl Rng) -> Vec<f64> {
    let mut number = || {
        let (u, v): (f64, f64) = (rng.random(), rng.random());
        (-2. * (1. - u).ln()).sqrt() * (TAU * v).cos()
    };
    (0..n).map(|_| number()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
