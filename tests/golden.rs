//! The optimizer in a training loop, against PyTorch's autograd and the rule written there.
//!
//! `tests/golden/make_golden.py` made the values in `tests/golden/golden.json` with PyTorch in
//! float64: 8 steps of a small network for each of six settings, with the parameters, phi and H
//! after every step. Its head has the command and the version. Here candle builds the same network
//! from the same start and differentiates it, and [`Srkl`] steps it.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{Beta, ParamsSrkl, Scope, Srkl};
use common::{minus, values};
use serde_json::Value;

/// The error of a parameter that roundings may add up to, relative to the largest of its tensor.
/// A gradient, being a small difference of larger numbers, and what follows from it (H, phi, the
/// norm) may have ten times that.
const TOLERANCES: [(DType, f64); 2] = [(DType::F64, 1e-13), (DType::F32, 1e-6)];

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/golden.json")).unwrap()
}

fn cases(golden: &Value) -> &[Value] {
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 6);
    cases
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn settings(case: &Value) -> ParamsSrkl {
    let beta = match case["beta"].as_f64() {
        Some(beta) => Beta::Fixed(beta),
        None => Beta::Tied(case["gamma"].as_f64().unwrap()),
    };
    let scope = match case["scope"].as_str().unwrap() {
        "tensor" => Scope::Tensor,
        "global" => Scope::Global,
        "element" => Scope::Element,
        scope => panic!("no scope {scope}"),
    };
    ParamsSrkl {
        lr: case["lr"].as_f64().unwrap(),
        beta,
        scope,
        weight_decay: case["weight_decay"].as_f64().unwrap(),
        max_grad_norm: case["max_grad_norm"].as_f64(),
        ..ParamsSrkl::reference()
    }
}

fn matrix(rows: &Value, dtype: DType) -> Result<Tensor> {
    let rows: Vec<Vec<f64>> = rows.as_array().unwrap().iter().map(numbers).collect();
    Tensor::new(rows, &Device::Cpu)?.to_dtype(dtype)
}

/// The names and variables that training starts with.
fn start(golden: &Value, dtype: DType) -> Result<Vec<(String, Var)>> {
    let variable = |entry: &Value| {
        let shape: Vec<usize> = numbers(&entry["shape"]).into_iter().map(|n| n as usize).collect();
        let w = Tensor::from_vec(numbers(&entry["values"]), shape, &Device::Cpu)?;
        let name = entry["name"].as_str().unwrap().to_string();
        Ok((name, Var::from_tensor(&w.to_dtype(dtype)?)?))
    };
    golden["start"].as_array().unwrap().iter().map(variable).collect()
}

/// The largest relative errors of one training run.
#[derive(Debug, Default)]
struct Errors {
    parameters: f64,
    /// Of phi, H and the norm before clipping.
    telemetry: f64,
    /// Of the loss and the norms of the gradients: candle's own.
    backward: f64,
}

/// Raises `worst` to the error of `got`, relative to the largest of `expected`.
fn compare(worst: &mut f64, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected_here) in got.iter().zip(expected) {
        // A NaN must not get lost in `max`.
        assert!(got.is_finite(), "{got}, not {expected_here}");
        *worst = worst.max((got - expected_here).abs() / largest(expected));
    }
}

fn largest(numbers: &[f64]) -> f64 {
    numbers.iter().fold(0., |largest, x| x.abs().max(largest))
}

/// Trains as `case` says, but with the settings `params`.
fn train(golden: &Value, case: &Value, params: ParamsSrkl, dtype: DType) -> Result<Errors> {
    let (input, target) = (matrix(&golden["input"], dtype)?, matrix(&golden["target"], dtype)?);
    let named = start(golden, dtype)?;
    let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
    let [w1, b1, w2, b2] = vars.as_slice() else { panic!("4 parameters") };
    let lr = params.lr;
    let mut opt = Srkl::builder().default_group(params).build(named.clone())?;
    let mut errors = Errors::default();
    let steps = case["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 8);
    for step in steps {
        let hidden = input.matmul(&w1.t()?)?.broadcast_add(b1)?.tanh()?;
        let loss = (hidden.matmul(&w2.t()?)?.broadcast_add(b2)? - &target)?.sqr()?.mean_all()?;
        let mut grads = loss.backward()?;
        compare(&mut errors.backward, &values(&loss)?, &[step["loss"].as_f64().unwrap()]);
        let grad_norms = numbers(&step["grad_norms"]);
        for (var, &expected) in vars.iter().zip(&grad_norms) {
            let norm = common::norm(&values(grads.get(var).unwrap())?);
            compare(&mut errors.backward, &[norm], &[expected]);
        }
        if let Some(missing) = step["missing"].as_str() {
            let (_, var) = named.iter().find(|(name, _)| name == missing).unwrap();
            grads.remove(var).unwrap();
        }

        opt.set_learning_rate(step["s"].as_f64().unwrap() * lr);
        opt.step(&grads)?;

        if case["max_grad_norm"].is_number() {
            let norm = opt.grad_norm()?.unwrap();
            compare(&mut errors.telemetry, &[norm], &[common::norm(&grad_norms)]);
        }
        for (i, (var, t)) in vars.iter().zip(opt.telemetry()?).enumerate() {
            for (got, key) in [(t.phi, "phi"), (t.curvature, "curvature")] {
                match (got, step[key][i].as_f64()) {
                    (Some(got), Some(expected)) => {
                        compare(&mut errors.telemetry, &[got], &[expected]);
                    }
                    (None, None) => (),
                    _ => errors.telemetry = f64::INFINITY,
                }
            }
            compare(&mut errors.parameters, &values(var)?, &numbers(&step["parameters"][i]));
        }
    }
    Ok(errors)
}

#[test]
fn trains_as_pytorch_does() -> Result<()> {
    let golden = golden();
    for case in cases(&golden) {
        for (dtype, tolerance) in TOLERANCES {
            let errors = train(&golden, case, settings(case), dtype)?;
            println!("{} in {dtype:?}: {errors:?}", case["name"]);
            let Errors { parameters, telemetry, backward } = errors;
            assert!(parameters <= tolerance, "{parameters}");
            assert!(telemetry <= 10. * tolerance, "{telemetry}");
            assert!(backward <= 10. * tolerance, "{backward}");
        }
    }
    Ok(())
}

/// Every step moves every tensor by over a hundred times the tolerances, so none is compared in
/// vain.
#[test]
fn tolerances_are_far_below_a_step() {
    let golden = golden();
    for case in cases(&golden) {
        let start = golden["start"].as_array().unwrap();
        let mut before: Vec<Vec<f64>> = start.iter().map(|w| numbers(&w["values"])).collect();
        for step in case["steps"].as_array().unwrap() {
            for (i, before) in before.iter_mut().enumerate() {
                let after = numbers(&step["parameters"][i]);
                let moves = minus(&after, before);
                if step["missing"] == start[i]["name"] {
                    assert_eq!(largest(&moves), 0.);
                } else {
                    let moved = largest(&moves) / largest(&after);
                    for (dtype, tolerance) in TOLERANCES {
                        assert!(moved > 100. * tolerance, "{} in {dtype:?}: {moved}", case["name"]);
                    }
                }
                *before = after;
            }
        }
    }
}

/// A setting that is 1% wrong, or another scope, shows in the parameters.
#[test]
fn a_wrong_setting_is_noticed() -> Result<()> {
    let golden = golden();
    for case in cases(&golden) {
        let right = settings(case);
        let beta = match right.beta {
            Beta::Fixed(beta) => Beta::Fixed(1.01 * beta),
            Beta::Tied(gamma) => Beta::Tied(1.01 * gamma),
            other => panic!("no such beta here: {other:?}"),
        };
        let scope = if right.scope == Scope::Global { Scope::Tensor } else { Scope::Global };
        let mut wrong = vec![
            ParamsSrkl { lr: 1.01 * right.lr, ..right.clone() },
            ParamsSrkl { beta, ..right.clone() },
            ParamsSrkl { scope, ..right.clone() },
        ];
        if right.weight_decay > 0. {
            wrong.push(ParamsSrkl { weight_decay: 1.01 * right.weight_decay, ..right.clone() });
        }
        if let Some(max) = right.max_grad_norm {
            wrong.push(ParamsSrkl { max_grad_norm: Some(1.01 * max), ..right.clone() });
        }
        for params in wrong {
            for (dtype, tolerance) in TOLERANCES {
                let error = train(&golden, case, params.clone(), dtype)?.parameters;
                println!("{} in {dtype:?}: {error:e} by {params:?}", case["name"]);
                assert!(error > 10. * tolerance, "{error:e}");
            }
        }
    }
    Ok(())
}
