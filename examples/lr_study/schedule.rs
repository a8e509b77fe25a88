//! Learning rates that change over a training of known length.

use std::f64::consts::PI;

/// A linear warm-up, and then a constant learning rate or half a period of a cosine down to 0.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// The warm-up's share of the training.
    pub warm_up: f64,
    pub cosine: bool,
}

impl Schedule {
    pub const CONSTANT: Self = Self { warm_up: 0., cosine: false };

    /// The factor of the learning rate for the step that comes after `spent` gradients of `budget`. A warm-up of `n`
    /// goes from `1 / n` to 1, and a cosine from 1 to 0, which it would reach after the last step.
    pub fn factor(self, spent: usize, budget: usize) -> f64 {
        let (spent, budget) = (spent as f64, budget as f64);
        let warm_up = (self.warm_up * budget).round();
        if spent < warm_up {
            (spent + 1.) / warm_up
        } else if self.cosine {
            (1. + (PI * (spent - warm_up) / (budget - warm_up)).cos()) / 2.
        } else {
            1.
        }
    }
}
