//! Averaged weights, for optimizers that don't keep any.

use anyhow::Result;
use candle_core::{Tensor, Var};

/// Which share of the way to the weights an average goes in a step.
#[derive(Clone, Copy, Debug)]
pub enum Share {
    /// `(1 - c) / (1 - c^t)` at step `t` from 1: the weights of the steps fall as `c` to the power of their age.
    Exponential(f64),
    /// `(1 + k) / (t + k)`: about the last `1 / k` of a training, whatever its length (Shamir and Zhang, 2013).
    Polynomial(f64),
}

impl Share {
    fn of_step(self, t: u32) -> f64 {
        match self {
            Self::Exponential(c) => (1. - c) / (1. - c.powi(t as i32)),
            Self::Polynomial(k) => (1. + k) / (f64::from(t) + k),
        }
    }
}

/// `a <- a + share * (w - a)`: the first average is the weights themselves.
pub struct Average {
    share: Share,
    averages: Vec<Tensor>,
    steps: u32,
}

impl Average {
    pub fn new(share: Share) -> Self {
        Self { share, averages: vec![], steps: 0 }
    }

    /// Call it after each step.
    pub fn update(&mut self, vars: &[Var]) -> candle_core::Result<()> {
        self.steps += 1;
        if self.averages.is_empty() {
            self.averages = copies(vars)?;
            return Ok(());
        }
        let share = self.share.of_step(self.steps);
        for (average, var) in self.averages.iter_mut().zip(vars) {
            // Detached: an average must not keep all those before it for a backward pass.
            *average = (&*average + ((var.as_detached_tensor() - &*average)? * share)?)?;
        }
        Ok(())
    }

    /// None before the first step.
    pub fn averages(&self) -> &[Tensor] {
        &self.averages
    }
}

/// Calls `judge` while `vars` have these values.
pub fn swapped<T>(vars: &[Var], values: &[Tensor], judge: impl FnOnce() -> Result<T>) -> Result<T> {
    let weights = copies(vars)?;
    set(vars, values)?;
    let judged = judge();
    set(vars, &weights)?;
    judged
}

fn copies(vars: &[Var]) -> candle_core::Result<Vec<Tensor>> {
    vars.iter().map(|var| var.as_detached_tensor().copy()).collect()
}

fn set(vars: &[Var], values: &[Tensor]) -> candle_core::Result<()> {
    vars.iter().zip(values).try_for_each(|(var, value)| var.set(value))
}
