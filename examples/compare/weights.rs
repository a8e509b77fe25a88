//! Initial weights.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use anyhow::{Result, anyhow};
use candle_core::{Tensor, Var};
use candle_nn::VarMap;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Draws all matrices and kernels anew, by the seed, and sets biases to 0: candle's own random values on
/// the CPU can't be seeded. Weights are normal, of the standard deviation that `spread` gives for a name
/// and the number of inputs. Vectors of other names keep what they have.
pub fn draw_weights(varmap: &VarMap, seed: u64, spread: impl Fn(&str, usize) -> f64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let vars = varmap.data().lock().map_err(|_| anyhow!("another thread panicked"))?;
    // In the order of their names: that of a hash map is another one each time.
    let vars: BTreeMap<&String, &Var> = vars.iter().collect();
    for (name, var) in vars {
        if var.rank() >= 2 {
            let spread = spread(name, var.dims()[1..].iter().product());
            let values = (0..var.elem_count()).map(|_| (spread * normal(&mut rng)) as f32);
            var.set(&Tensor::from_vec(values.collect(), var.shape(), var.device())?)?;
        } else if name.ends_with("bias") {
            var.set(&var.zeros_like()?)?;
        }
    }
    Ok(())
}

/// A normal number, by Box and Muller's method.
fn normal(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2. * (1. - u).ln()).sqrt() * (TAU * v).cos()
}
