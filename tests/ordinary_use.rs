//! Programs that people write every day, by the presets' defaults: dropout, LoRA, one bad batch, frozen weights.

mod common;
#[path = "../examples/digits/data.rs"]
#[allow(dead_code, reason = "the example's")]
mod data;
#[path = "../examples/digits/random.rs"]
#[allow(dead_code, reason = "the example's")]
mod random;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use candle_srkl::{Curvature, ParamsSrkl, Srkl};
use common::*;
use data::{CLASSES, Digits, PIXELS, Part};

// -- Elements that have no gradient at first --

/// Steps until `(a b - 1)^2` is at most 1e-3, from a = 1 and this b.
fn steps_to_product_of_one(b: f64, lr: f64, most: usize) -> Result<usize> {
    let (a, b) = (var(&[1.], DType::F32)?, var(&[b], DType::F32)?);
    let params = ParamsSrkl { lr, ..ParamsSrkl::braked_adam() };
    let mut opt = Srkl::new(vec![a.clone(), b.clone()], params)?;
    let loss = || ((&*a * &*b)? - 1.)?.sqr()?.sum_all();
    for step in 0..most {
        if loss()?.to_scalar::<f32>()? <= 1e-3 {
            return Ok(step);
        }
        opt.backward_step_with(loss)?;
    }
    Ok(most)
}

#[test]
fn a_product_of_which_one_factor_is_zero() -> Result<()> {
    for b in [0., 1e-8, 1e-4, 1e-2] {
        for lr in [0.03, 1., 10., 1000.] {
            let steps = steps_to_product_of_one(b, lr, 1000)?;
            println!("b {b} lr {lr}: {steps}");
        }
    }
    Ok(())
}

// -- One bad measurement --

/// Steps until `(w - 1)^2` is at most 1e-3, from w = 3, where the measurement of this number is wrong by a factor.
fn steps_with_a_wrong_measurement(number: usize, factor: f64, params: ParamsSrkl) -> Result<usize> {
    let w = var(&[3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], params)?;
    let loss = || (&*w - 1.)?.sqr()?.sum_all();
    let mut measurements = 0;
    for step in 0..1000 {
        if loss()?.to_scalar::<f32>()? <= 1e-3 {
            return Ok(step);
        }
        let measures = opt.measuring();
        let first = loss()?.backward()?;
        opt.step(&first)?;
        if measures {
            let mut again = loss()?.backward()?;
            if measurements == number {
                let (g, g2) = (first.get(&w).unwrap(), again.get(&w).unwrap());
                let wrong = (g + ((g2 - g)? * factor)?)?;
                again.insert(&w, wrong);
            }
            opt.observe(&again)?;
            measurements += 1;
        }
    }
    Ok(1000)
}

#[test]
fn one_wrong_measurement_is_forgotten() -> Result<()> {
    for number in 0..13 {
        let mut all = vec![];
        for exponent in [0, 2, 3, 4, 5, 6, 8, 10, 12] {
            all.push(steps_with_a_wrong_measurement(number, 10f64.powi(exponent), ParamsSrkl::braked_adam())?);
        }
        println!("{number} {all:?}");
    }
    Ok(())
}

// -- LoRA --

/// `x W' + x A' B'`, twice, with a frozen `W` and B = 0 at first.
struct Lora {
    varmap: VarMap,
    frozen: Vec<Tensor>,
}

impl Lora {
    fn new(seed: u64, spread: f64) -> Result<Self> {
        let varmap = VarMap::new();
        let mut frozen = vec![];
        for (i, pair) in [PIXELS, 256, CLASSES].windows(2).enumerate() {
            let (inputs, outputs) = (pair[0], pair[1]);
            let scale = (2. / inputs as f64).sqrt();
            let matrix = |n: usize, m: usize, scale: f64, salt: u64| {
                tensor(&noise(n * m, scale, salt), DType::F32)?.reshape((n, m))
            };
            let salt = 100 * seed + 10 * i as u64;
            frozen.push(matrix(outputs, inputs, scale, salt)?);
            let a = matrix(8, inputs, 1. / (inputs as f64).sqrt(), salt + 1)?;
            let b = matrix(outputs, 8, spread, salt + 2)?;
            for (name, value) in [("a", a), ("b", b)] {
                let name = format!("{i}.{name}");
                varmap.data().lock().unwrap().insert(name, Var::from_tensor(&value)?);
            }
        }
        Ok(Self { varmap, frozen })
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let data = self.varmap.data().lock().unwrap();
        let layer = |x: &Tensor, i: usize| -> Result<Tensor> {
            let (a, b) = (&data[&format!("{i}.a")], &data[&format!("{i}.b")]);
            x.matmul(&self.frozen[i].t()?)? + x.matmul(&a.t()?)?.matmul(&b.t()?)?
        };
        layer(&layer(x, 0)?.relu()?, 1)
    }

    fn loss(&self, part: &Part) -> Result<Tensor> {
        candle_nn::loss::cross_entropy(&self.logits(&part.images)?, &part.classes)
    }

    fn accuracy(&self, part: &Part) -> Result<f64> {
        let right = self.logits(&part.images)?.argmax(D::Minus1)?.eq(&part.classes)?;
        Ok(right.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?)
    }
}

/// The numbers of rows of a batch.
fn batch(digits: &Digits, seed: u64, step: u64) -> Result<Part> {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    let mut rng = StdRng::seed_from_u64(seed << 32 | step);
    let n = digits.train.len().unwrap() as u32;
    let rows: Vec<u32> = (0..32).map(|_| rng.random_range(0..n)).collect();
    digits.train.select(&rows).map_err(|e| candle_core::Error::msg(e.to_string()))
}

const GRADIENTS: usize = 1000;

/// Held-out accuracy and training loss after as many gradients, of braked Adam, or of AdamW.
fn train_lora(seed: u64, lr: f64, braked: bool, digits: &Digits, spread: f64) -> Result<(f64, f64)> {
    let lora = Lora::new(seed, spread)?;
    let mut spent = 0;
    let mut step = 0;
    if braked {
        let params = ParamsSrkl { lr, ..ParamsSrkl::braked_adam() };
        let mut opt = Srkl::from_varmap(&lora.varmap, params)?;
        while spent < GRADIENTS {
            spent += 1 + opt.measuring() as usize;
            let part = batch(digits, seed, step)?;
            opt.backward_step_with(|| lora.loss(&part))?;
            step += 1;
        }
    } else {
        let params = ParamsAdamW { lr, weight_decay: 0., ..ParamsAdamW::default() };
        let mut opt = AdamW::new(lora.varmap.all_vars(), params)?;
        while spent < GRADIENTS {
            spent += 1;
            let part = batch(digits, seed, step)?;
            opt.backward_step(&lora.loss(&part)?)?;
            step += 1;
        }
    }
    let loss = lora.loss(&digits.train)?.to_scalar::<f32>()? as f64;
    Ok((lora.accuracy(&digits.held_out)?, loss))
}

#[test]
fn lora() -> Result<()> {
    let digits = Digits::load(0, DType::F32, &Device::Cpu).unwrap();
    for seed in 0..3 {
        for (name, braked, rates) in [
            ("AdamW", false, vec![1e-3, 3e-3, 1e-2, 3e-2]),
            ("braked", true, vec![0.03, 0.3, 1., 10., 100., 1000.]),
        ] {
            for lr in rates {
                let (accuracy, loss) = train_lora(seed, lr, braked, &digits, 0.)?;
                println!("{seed} {name} {lr}: {:.2} {loss:.4}", 100. * accuracy);
            }
        }
    }
    Ok(())
}
