//! Schedule-Free AdamW: an average of the steps in the place of a schedule that must know the training's
//! length (Defazio and others, 2024, arXiv 2405.15682).

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use candle_nn::Optimizer;

#[derive(Clone, Debug)]
pub struct ParamsScheduleFree {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
}

impl Default for ParamsScheduleFree {
    /// Those of its authors' package `schedulefree`.
    fn default() -> Self {
        Self { lr: 2.5e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// Steps a sequence `z`, averages it in `x`, and takes gradients at `y`, between the two:
///
/// ```text
/// v <- beta2 v + (1 - beta2) g^2, where g is the gradient at y
/// z <- z - lr g / (sqrt(v / (1 - beta2^t)) + eps)
/// x <- (1 - c) x + c z
/// y = (1 - beta1) z + beta1 x
/// ```
///
/// at step `t` from 1. The parameters hold `y`; [`averages`](Self::averages) are `x`, to evaluate at. A step counts
/// in the average by the square of the largest lr so far, `c` being its share of all: 1 / t without a warm-up. That is
/// the package's step without weight decay, with its defaults `r = 0` and `weight_lr_power = 2`. A warm-up is the
/// caller's, by `set_learning_rate`; the package's own, `warmup_steps`, comes to the same.
pub struct ScheduleFreeAdamW {
    params: ParamsScheduleFree,
    slots: Vec<Slot>,
    largest_lr: f64,
    /// Of all steps' weights in the average.
    weights: f64,
    steps: i32,
}

struct Slot {
    y: Var,
    x: Tensor,
    z: Tensor,
    v: Tensor,
}

impl ScheduleFreeAdamW {
    /// In the order of the parameters.
    pub fn averages(&self) -> Vec<Tensor> {
        self.slots.iter().map(|slot| slot.x.clone()).collect()
    }
}

impl Optimizer for ScheduleFreeAdamW {
    type Config = ParamsScheduleFree;

    fn new(vars: Vec<Var>, params: ParamsScheduleFree) -> Result<Self> {
        let slot = |y: Var| {
            let x = y.as_detached_tensor().copy()?;
            Ok(Slot { z: x.clone(), v: x.zeros_like()?, x, y })
        };
        let slots = vars.into_iter().map(slot).collect::<Result<_>>()?;
        Ok(Self { params, slots, largest_lr: 0., weights: 0., steps: 0 })
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let ParamsScheduleFree { lr, beta1, beta2, eps } = self.params;
        self.steps += 1;
        self.largest_lr = self.largest_lr.max(lr);
        let weight = self.largest_lr.powi(2);
        self.weights += weight;
        let c = if weight > 0. { weight / self.weights } else { 0. };
        let correction = 1. - beta2.powi(self.steps);
        for Slot { y, x, z, v } in &mut self.slots {
            let Some(g) = grads.get(y) else { continue };
            *v = ((&*v * beta2)? + (g.sqr()? * (1. - beta2))?)?;
            let direction = (g / ((&*v / correction)?.sqrt()? + eps)?)?;
            *z = (&*z - (direction * lr)?)?;
            *x = ((&*x * (1. - c))? + (&*z * c)?)?;
            y.set(&((&*z * (1. - beta1))? + (&*x * beta1)?)?)?;
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
