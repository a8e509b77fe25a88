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
use common::values;
use serde_json::Value;

/// Largest relative error of a number, f64 and f32. The largest move of any tensor in any step is
/// at least `MOVE`, so a step that is a hundredth wrong is outside of both.
const TOLERANCE: f64 = 1e-12;
const TOLERANCE_F32: f64 = 2e-6;
const MOVE: f64 = 3e-4;

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

/// Raises `worst` to the relative error of `got`.
fn compare(worst: &mut f64, got: f64, expected: f64) {
    // A NaN must not get lost in `max`.
    assert!(got.is_finite(), "{got}, not {expected}");
    *worst = worst.max((got - expected).abs() / expected.abs());
}

/// Trains as `case` says but with `params`, from golden values on.
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
        compare(&mut errors.backward, values(&loss)?[0], step["loss"].as_f64().unwrap());
        for (var, expected) in vars.iter().zip(numbers(&step["grad_norms"])) {
            let norm = common::norm(&values(grads.get(var).unwrap())?);
            compare(&mut errors.backward, norm, expected);
        }
        if let Some(missing) = step["missing"].as_str() {
            let (_, var) = named.iter().find(|(name, _)| name == missing).unwrap();
            grads.remove(var).unwrap();
        }

        opt.set_learning_rate(step["s"].as_f64().unwrap() * lr);
        opt.step(&grads)?;

        if case["max_grad_norm"].is_number() {
            let norm = common::norm(&numbers(&step["grad_norms"]));
            compare(&mut errors.telemetry, opt.grad_norm().unwrap(), norm);
        }
        for (i, (var, t)) in vars.iter().zip(opt.telemetry()).enumerate() {
            for (got, expected) in [(t.phi, &step["phi"][i]), (t.curvature, &step["curvature"][i])] {
                assert_eq!(got.is_some(), expected.is_number(), "{}: {got:?}", t.name);
                if let Some(got) = got {
                    compare(&mut errors.telemetry, got, expected.as_f64().unwrap());
                }
            }
            let expected = numbers(&step["parameters"][i]);
            let got = values(var)?;
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.into_iter().zip(expected) {
                compare(&mut errors.parameters, got, expected);
            }
        }
    }
    Ok(errors)
}

fn check(dtype: DType, tolerance: f64) -> Result<()> {
    let golden = golden();
    for case in cases(&golden) {
        let errors = train(&golden, case, settings(case), dtype)?;
        println!("{} in {dtype:?}: {errors:?}", case["name"]);
        let Errors { parameters, telemetry, backward } = errors;
        for error in [parameters, telemetry, backward] {
            assert!(error <= tolerance, "{} in {dtype:?}: {errors:?}", case["name"]);
        }
    }
    Ok(())
}

#[test]
fn trains_as_pytorch_does_in_f64() -> Result<()> {
    check(DType::F64, TOLERANCE)
}

#[test]
fn trains_as_pytorch_does_in_f32() -> Result<()> {
    check(DType::F32, TOLERANCE_F32)
}

/// The f32 tolerance sees less than a hundredth of any step, so that no step is compared in vain.
#[test]
fn tolerances_are_far_below_a_step() -> Result<()> {
    let golden = golden();
    for case in cases(&golden) {
        let first = golden["start"].as_array().unwrap().iter().map(|p| numbers(&p["values"]));
        let mut before: Vec<Vec<f64>> = first.collect();
        for step in case["steps"].as_array().unwrap() {
            let after: Vec<Vec<f64>> =
                step["parameters"].as_array().unwrap().iter().map(numbers).collect();
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                let moves = before.iter().zip(after).map(|(b, a)| (a - b).abs() / b.abs());
                let largest = moves.fold(0f64, f64::max);
                if step["missing"].as_str() == golden["start"][i]["name"].as_str() {
                    assert_eq!(largest, 0.);
                } else {
                    assert!(largest >= MOVE, "{}: {largest}", case["name"]);
                }
            }
            before = after;
        }
    }
    assert!(TOLERANCE < TOLERANCE_F32 && TOLERANCE_F32 < MOVE / 100.);
    Ok(())
}

/// Any setting that is 1% wrong, or left out, is noticed in the parameters, in either dtype.
#[test]
fn a_wrong_setting_is_noticed() -> Result<()> {
    let golden = golden();
    for case in cases(&golden) {
        let right = settings(case);
        let beta = match right.beta {
            Beta::Fixed(beta) => Beta::Fixed(1.01 * beta),
            Beta::Tied(gamma) => Beta::Tied(1.01 * gamma),
        };
        let mut wrong = vec![
            ParamsSrkl { lr: 1.01 * right.lr, ..right.clone() },
            ParamsSrkl { beta, ..right.clone() },
            ParamsSrkl { weight_decay: 1.01 * right.weight_decay + 1e-2, ..right.clone() },
        ];
        if let Some(max) = right.max_grad_norm {
            wrong.push(ParamsSrkl { max_grad_norm: Some(1.01 * max), ..right.clone() });
        }
        for params in wrong {
            for (dtype, tolerance) in [(DType::F64, TOLERANCE), (DType::F32, TOLERANCE_F32)] {
                let errors = train(&golden, case, params.clone(), dtype)?;
                let place = format!("{} in {dtype:?}: {params:?}: {errors:?}", case["name"]);
                println!("{place}");
                assert!(errors.parameters > 2. * tolerance, "{place}");
            }
        }
    }
    Ok(())
}
