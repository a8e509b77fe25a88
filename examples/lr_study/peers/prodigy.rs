//! Prodigy: Adam that estimates its own learning rate (Mishchenko and Defazio, 2023, arXiv 2306.06101).

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::Optimizer;

#[derive(Clone, Debug)]
pub struct ParamsProdigy {
    /// A factor of the estimated one: 1, or a schedule's.
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// The first estimate of `d`, far below any good one.
    pub d0: f64,
}

impl Default for ParamsProdigy {
    fn default() -> Self {
        Self { lr: 1., beta1: 0.9, beta2: 0.999, eps: 1e-8, d0: 1e-6 }
    }
}

/// `d` estimates from below how far the parameters have to go from their start `w0`, and is the step's length:
///
/// ```text
/// m <- beta1 m + (1 - beta1) d g
/// v <- beta2 v + (1 - beta2) (d g)^2
/// r <- sqrt(beta2) r + d eta <g, w0 - w>
/// s <- sqrt(beta2) s + d^2 g
/// d' = max(d, r / |s|_1)
/// w <- w - eta m / (sqrt(v) + d' eps)
/// ```
///
/// with `eta = d lr sqrt(1 - beta2^t) / (1 - beta1^t)` at step `t` from 1. `r` and `s` are of all parameters. This is
/// the paper's form for Adam, without weight decay, with two options of its authors' package `prodigyopt`:
/// `use_bias_correction`, the last factor of `eta`, and `safeguard_warmup`, `d^2` in `s` where otherwise `d eta` is, so
/// that a warm-up's short steps don't raise the estimate.
pub struct Prodigy {
    params: ParamsProdigy,
    slots: Vec<Slot>,
    d: f64,
    /// `r / d0`: as in the package, so that neither it nor `s` is too small for f32.
    r: f64,
    steps: i32,
}

struct Slot {
    w: Var,
    w0: Tensor,
    m: Tensor,
    v: Tensor,
    /// `s / d0`.
    s: Tensor,
}

impl Prodigy {
    /// The estimate after the last step.
    pub fn d(&self) -> f64 {
        self.d
    }
}

impl Optimizer for Prodigy {
    type Config = ParamsProdigy;

    fn new(vars: Vec<Var>, params: ParamsProdigy) -> Result<Self> {
        let slot = |w: Var| {
            let zeros = w.zeros_like()?.detach();
            let w0 = w.as_detached_tensor().copy()?;
            Ok(Slot { w, w0, m: zeros.clone(), v: zeros.clone(), s: zeros })
        };
        let slots = vars.into_iter().map(slot).collect::<Result<_>>()?;
        Ok(Self { d: params.d0, params, slots, r: 0., steps: 0 })
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let ParamsProdigy { lr, beta1, beta2, eps, d0 } = self.params;
        let beta3 = beta2.sqrt();
        let t = self.steps + 1;
        let d = self.d;
        let eta = d * lr * (1. - beta2.powi(t)).sqrt() / (1. - beta1.powi(t));

        let mut r = beta3 * self.r;
        let mut s_norm = 0.;
        for Slot { w, w0, m, v, s } in &mut self.slots {
            let Some(g) = grads.get(w) else { continue };
            r += d / d0 * eta * sum(&(g * (&*w0 - w.as_detached_tensor())?)?)?;
            *m = ((&*m * beta1)? + (g * (d * (1. - beta1)))?)?;
            *v = ((&*v * beta2)? + (g.sqr()? * (d * d * (1. - beta2)))?)?;
            *s = ((&*s * beta3)? + (g * (d / d0 * d))?)?;
            s_norm += sum(&s.abs()?)?;
        }
        if s_norm == 0. {
            return Ok(()); // There was no gradient yet but 0.
        }
        self.r = r;
        self.d = d.max(r / s_norm);
        self.steps = t;
        for Slot { w, m, v, .. } in &self.slots {
            if grads.get(w).is_some() {
                let direction = (m / (v.sqrt()? + self.d * eps)?)?;
                w.set(&(w.as_detached_tensor() - (direction * eta)?)?)?;
            }
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
    }
}

fn sum(tensor: &Tensor) -> Result<f64> {
    tensor.sum_all()?.to_dtype(DType::F64)?.to_scalar()
}
