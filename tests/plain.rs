//! The plain optimizers, without a brake: SGD and AdamW, against PyTorch's and candle's.
//!
//! `tests/golden/make_plain.py` made the values in `tests/golden/plain.json` with PyTorch in float64, and
//! `make_directions.py` those in `directions.json` with PyTorch, optax and NumPy.

mod common;

use approx::abs_diff_eq;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};
use candle_srkl::{Average, Beta, Curvature, Direction, NonFinite, ParamsSrkl, Scope, Srkl};
use common::*;
use serde_json::Value;

const MOMENTUM: Direction = Direction::Sgd { momentum: 0.9, nesterov: false };
const NESTEROV: Direction = Direction::Sgd { momentum: 0.9, nesterov: true };

/// Settings by the names of `plain.json`.
fn cases() -> [(&'static str, ParamsSrkl); 4] {
    [
        ("sgd", ParamsSrkl::sgd(0.1)),
        ("momentum", ParamsSrkl { direction: MOMENTUM, ..ParamsSrkl::sgd(0.05) }),
        ("nesterov", ParamsSrkl { direction: NESTEROV, ..ParamsSrkl::sgd(0.05) }),
        ("adamw", ParamsSrkl::adamw(0.01)),
    ]
}

/// And of `directions.json`.
fn more_cases() -> [(&'static str, ParamsSrkl); 4] {
    let (beta1, beta2, eps) = (0.9, 0.999, 1e-8);
    let adamw = |direction| ParamsSrkl { direction, ..ParamsSrkl::adamw(0.01) };
    [
        ("amsgrad", adamw(Direction::AmsGrad { beta1, beta2: 0.9, eps })),
        ("nesterov adam", adamw(Direction::NesterovAdam { beta1, beta2, eps })),
        ("lion", ParamsSrkl::lion(0.01)),
        ("cautious", ParamsSrkl { cautious: true, ..ParamsSrkl::adamw(0.01) }),
    ]
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// PyTorch's values after each step, in f64 and f32 to some roundings, and in bf16 and f16, whose masters are f32, to the
/// parameter's own rounding beside these.
#[test]
fn pytorchs_values() -> Result<()> {
    as_golden(include_str!("golden/plain.json"), &cases(), Some(2))
}

#[test]
fn others_values() -> Result<()> {
    as_golden(include_str!("golden/directions.json"), &more_cases(), None)
}

/// `missing`: the step at which `b` has no gradient.
fn as_golden(golden: &str, cases: &[(&str, ParamsSrkl)], missing: Option<usize>) -> Result<()> {
    let golden: Value = serde_json::from_str(golden).unwrap();
    let names = ["a", "b"];
    for (case, params) in cases {
        let steps = golden["cases"][*case].as_array().unwrap();
        assert_eq!(steps.len(), 8, "{case}");
        for dtype in FLOATS {
            let vars = names.map(|name| var(&numbers(&golden["start"][name]), dtype).unwrap());
            let named = names.map(String::from).into_iter().zip(vars.clone());
            let mut opt = Srkl::builder().default_group(params.clone()).build(named)?;
            for (step, expected) in steps.iter().enumerate() {
                let mut store = grads([]);
                for (name, var) in names
                    .iter()
                    .zip(&vars)
                    .filter(|(name, _)| Some(step) != missing || **name != "b")
                {
                    store.insert(
                        var,
                        tensor(&numbers(&golden["gradients"][step][name]), DType::F64)?,
                    );
                }
                opt.step(&store)?;
                for (name, var) in names.iter().zip(&vars) {
                    for (got, exact) in values(var)?.into_iter().zip(numbers(&expected[name])) {
                        let computed = if dtype == DType::F64 { 1e-14 } else { 2e-6 };
                        let stored = half_ulp(exact, dtype);
                        assert!(
                            abs_diff_eq!(got, exact, epsilon = computed + stored),
                            "{case} {dtype:?} step {step}, {name}: {got}, not {exact}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// As candle's own optimizers, by nothing but another type's name.
#[test]
fn candles_values() -> Result<()> {
    fn train<O: Optimizer>(mut opt: O, vars: &[Var]) -> Result<Vec<f64>> {
        let x = Tensor::new(&[[0.3f32, -1.2], [0.7, 0.1], [-0.4, 0.9]], &Device::Cpu)?;
        for step in 0..20 {
            if step == 10 {
                opt.set_learning_rate(opt.learning_rate() / 3.);
            }
            let x = x.to_dtype(vars[0].dtype())?;
            let loss = x.matmul(&vars[0])?.tanh()?.matmul(&vars[1])?.sqr()?.sum_all()?;
            opt.backward_step(&loss)?;
        }
        all_values(vars)
    }
    let vars = |dtype| -> Result<Vec<Var>> {
        Ok(vec![
            Var::from_tensor(&noisy_matrix((2, 9), 0.8, 1, dtype)?)?,
            Var::from_tensor(&noisy_matrix((9, 2), 0.8, 2, dtype)?)?,
        ])
    };
    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 2e-5)] {
        let (ours, theirs) = (vars(dtype)?, vars(dtype)?);
        let ours = train(Srkl::new(ours.clone(), ParamsSrkl::sgd(0.05))?, &ours)?;
        let theirs = train(SGD::new(theirs.clone(), 0.05)?, &theirs)?;
        ours.iter().zip(&theirs).for_each(|(a, b)| assert_close(*a, *b, tolerance));

        let (ours, theirs) = (vars(dtype)?, vars(dtype)?);
        let params = ParamsAdamW { lr: 0.01, ..ParamsAdamW::default() };
        let ours = train(Srkl::new(ours.clone(), ParamsSrkl::adamw(0.01))?, &ours)?;
        let theirs = train(AdamW::new(theirs.clone(), params)?, &theirs)?;
        ours.iter().zip(&theirs).for_each(|(a, b)| assert_close(*a, *b, tolerance));
    }
    Ok(())
}

/// On `h w^2 / 2` momentum is stable for `lr h < 2 (1 + mu)`, and Nesterov's for `lr h < 2 (1 + mu) / (1 + 2 mu)`.
#[test]
fn stable_up_to_the_limits_of_theory() -> Result<()> {
    for mu in [0.3, 0.9] {
        for (nesterov, limit) in [(false, 2. * (1. + mu)), (true, 2. * (1. + mu) / (1. + 2. * mu))]
        {
            for (share, stable) in [(0.98, true), (1.02, false)] {
                let w = var(&[1.], DType::F64)?;
                let direction = Direction::Sgd { momentum: mu, nesterov };
                let params = ParamsSrkl { direction, ..ParamsSrkl::sgd(share * limit / 3.) };
                let mut opt = Srkl::new(vec![w.clone()], params)?;
                for _ in 0..2000 {
                    opt.backward_step(&(w.sqr()? * 1.5)?)?;
                }
                let size = values(&w)?[0].abs();
                assert!(
                    if stable { size < 1e-3 } else { size > 1e3 },
                    "{mu} {nesterov} {share}: {size}"
                );
            }
        }
    }
    Ok(())
}

/// There is no curvature, and nothing is measured: `phi` is the learning rate, whatever `beta` is.
#[test]
fn without_curvature_there_is_no_brake() -> Result<()> {
    for direction in [Direction::Gradient, NESTEROV] {
        for scope in [Scope::Tensor, Scope::Global] {
            let w = var(&[1., -2.], DType::F32)?;
            let params =
                ParamsSrkl { direction, scope, beta: Beta::Fixed(1e9), ..ParamsSrkl::sgd(0.5) };
            let mut opt = Srkl::new(vec![w.clone()], params)?;
            assert!(!opt.measuring());
            assert_eq!(opt.measure(), None);
            opt.set_learning_rate(0.25);
            opt.backward_step_with(|| w.sqr()?.sum_all())?;
            let told = opt.telemetry()?.remove(0);
            assert_eq!((told.phi, told.curvature), (Some(0.25), None));
            assert!(!opt.measuring());
            assert_eq!(opt.measurements()?.taken, 0);
        }
    }
    Ok(())
}

/// Gradients that are not finite are met by the policies, as with any curvature.
#[test]
fn policies_hold_without_curvature() -> Result<()> {
    for (nonfinite, moves) in
        [(NonFinite::SkipStep, 0), (NonFinite::SkipBlock, 1), (NonFinite::Propagate, 2)]
    {
        let vars = [var(&[1.; 5], DType::F32)?, var(&[1.; 5], DType::F32)?];
        let mut opt = Srkl::new(vars.to_vec(), ParamsSrkl { nonfinite, ..ParamsSrkl::adamw(0.1) })?;
        let bad = tensor(&[1., 1., f64::NAN, 1., 1.], DType::F32)?;
        opt.step(&grads([(&vars[0], bad), (&vars[1], vars[1].ones_like()?)]))?;
        let moved = vars.iter().filter(|var| values(var).unwrap()[0] != 1.).count();
        assert_eq!(moved, moves, "{nonfinite:?}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let sgd = || ParamsSrkl::sgd(0.1);
    let momentum = |momentum| Direction::Sgd { momentum, nesterov: true };
    for (text, params) in [
        ("`momentum`", ParamsSrkl { direction: momentum(1.), ..sgd() }),
        ("`momentum`", ParamsSrkl { direction: momentum(-0.1), ..sgd() }),
        ("`Curvature::None`", ParamsSrkl { scope: Scope::Element, ..sgd() }),
        ("Curvature::Hutchinson", ParamsSrkl { scope: Scope::Mixed(0.5), ..sgd() }),
    ] {
        assert_error(params.validate(), &[text]);
    }
    // A momentum of one kind is no momentum of the other.
    let w = var(&[1.], DType::F32)?;
    let mut opt = Srkl::new(vec![w], ParamsSrkl { direction: MOMENTUM, ..sgd() })?;
    let other = ParamsSrkl { direction: Direction::Momentum { mu: 0.9 }, ..sgd() };
    assert_error(opt.set_params("default", other), &["`direction`", "kind"]);
    opt.set_params("default", ParamsSrkl { direction: NESTEROV, ..sgd() })?;
    // Nor is an average of one kind one of the other.
    let w = var(&[1.], DType::F32)?;
    let averaged = |average| ParamsSrkl { average: Some(average), ..sgd() };
    let mut averaging = Srkl::new(vec![w], averaged(Average::Polynomial(8.)))?;
    let exponential = averaged(Average::Exponential(0.9));
    assert_error(averaging.set_params("default", exponential), &["`average`", "kind"]);
    averaging.set_params("default", averaged(Average::Polynomial(2.)))?;
    // A brake may come, and go.
    let curvature = Curvature::GradSquare;
    opt.set_params("default", ParamsSrkl { direction: NESTEROV, curvature, ..sgd() })
}
