//! The optimizers of others in `examples/lr_study`, against their authors' packages: `tests/golden/make_peers.py` made the
//! values in `tests/golden/peers.json`. And the study's schedules and averages.

#[path = "../examples/lr_study/average.rs"]
mod average;
mod common;
#[path = "../examples/lr_study/peers/mod.rs"]
mod peers;
#[path = "../examples/lr_study/schedule.rs"]
mod schedule;

use average::{Average, Share, swapped};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use candle_srkl::{ParamsSrkl, Srkl};
use common::*;
use peers::{ParamsProdigy, ParamsScheduleFree, Prodigy, ScheduleFreeAdamW};
use schedule::Schedule;
use serde_json::Value;

const NAMES: [&str; 2] = ["a", "b"];
const STEPS: usize = 20;
const COSINE: Schedule = Schedule { warm_up: 0., cosine: true };
const WARM_UP: Schedule = Schedule { warm_up: 0.2, cosine: false };
const WARM_UP_AND_COSINE: Schedule = Schedule { warm_up: 0.2, cosine: true };

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/peers.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Takes the steps of a case, and compares the way from the start after each; `also` compares what else there is.
fn check<O: Optimizer>(
    case: &str,
    schedule: Schedule,
    new: impl FnOnce(Vec<Var>) -> Result<O>,
    also: impl Fn(&O, &Value, &dyn Fn(&Tensor, &str, &Value)),
) -> Result<()> {
    let golden = golden();
    let steps = golden["cases"][case].as_array().unwrap();
    assert_eq!(steps.len(), STEPS, "{case}");
    let vars = NAMES.map(|name| var(&numbers(&golden["start"][name]), DType::F64).unwrap());
    let mut opt = new(vars.to_vec())?;
    let lr = opt.learning_rate();
    for (step, expected) in steps.iter().enumerate() {
        let mut store = grads([]);
        let missing = |name| name == "b" && step == 2 && !case.starts_with("adamw");
        for (name, var) in NAMES.iter().zip(&vars).filter(|(name, _)| !missing(**name)) {
            store.insert(var, tensor(&numbers(&golden["gradients"][step][name]), DType::F64)?);
        }
        opt.set_learning_rate(lr * schedule.factor(step, STEPS));
        opt.step(&store)?;

        let compare = |got: &Tensor, name: &str, exact: &Value| {
            let start = numbers(&golden["start"][name]);
            for ((got, exact), start) in
                values(got).unwrap().into_iter().zip(numbers(exact)).zip(start)
            {
                let tolerance = 1e-9 * (exact - start).abs() + 4. * f64::EPSILON;
                assert!(
                    (got - exact).abs() <= tolerance,
                    "{case}, step {step}, {name}: {got}, not {exact}"
                );
            }
        };
        for (name, var) in NAMES.iter().zip(&vars) {
            compare(var, name, &expected["params"][name]);
        }
        also(&opt, expected, &compare);
    }
    Ok(())
}

#[test]
fn prodigy_is_its_authors() -> Result<()> {
    for (case, lr, schedule) in [
        ("prodigy 1", 1., Schedule::CONSTANT),
        ("prodigy 4", 4., Schedule::CONSTANT),
        ("prodigy 4, cosine", 4., COSINE),
        ("prodigy 4, warm-up and cosine", 4., WARM_UP_AND_COSINE),
    ] {
        let params = ParamsProdigy { lr, ..ParamsProdigy::default() };
        check(
            case,
            schedule,
            |vars| Prodigy::new(vars, params),
            |opt, expected, _| {
                let d = expected["d"].as_f64().unwrap();
                assert!((opt.d() - d).abs() <= 1e-9 * d, "{case}: d is {}, not {d}", opt.d());
            },
        )?;
    }
    Ok(())
}

#[test]
fn schedule_free_is_its_authors() -> Result<()> {
    assert_eq!(ParamsScheduleFree::default().lr, 0.0025);
    for (case, lr, schedule) in [
        ("schedule-free 0.0025", 0.0025, Schedule::CONSTANT),
        ("schedule-free 0.3", 0.3, Schedule::CONSTANT),
        ("schedule-free 0.3, warm-up", 0.3, WARM_UP),
    ] {
        let params = ParamsScheduleFree { lr, ..ParamsScheduleFree::default() };
        check(
            case,
            schedule,
            |vars| ScheduleFreeAdamW::new(vars, params),
            |opt, expected, compare| {
                for (average, name) in opt.averages().iter().zip(NAMES) {
                    compare(average, name, &expected["averages"][name]);
                }
            },
        )?;
    }
    Ok(())
}

/// `LinearLR` and `CosineAnnealingLR`, by candle's AdamW.
#[test]
fn schedules_are_pytorchs() -> Result<()> {
    let params = ParamsAdamW { lr: 0.01, weight_decay: 0., ..ParamsAdamW::default() };
    check(
        "adamw 0.01, warm-up and cosine",
        WARM_UP_AND_COSINE,
        |vars| AdamW::new(vars, params),
        |_, _, _| {},
    )
}

#[test]
fn schedules_span_the_budget() {
    let schedule = Schedule { warm_up: 0.1, cosine: true };
    for (spent, factor) in [(0, 0.02), (24, 0.5), (49, 1.), (50, 1.), (275, 0.5), (500, 0.)] {
        assert_close(schedule.factor(spent, 500), factor, 1e-12);
    }
    assert_eq!(Schedule::CONSTANT.factor(0, 500), 1.);
    assert_eq!(Schedule::CONSTANT.factor(499, 500), 1.);
}

/// Both kinds, beside those that `Srkl` keeps of the same steps.
#[test]
fn averages_are_srkls() -> anyhow::Result<()> {
    let kinds = [
        (Share::Exponential(0.98), candle_srkl::Average::Exponential(0.98)),
        (Share::Polynomial(8.), candle_srkl::Average::Polynomial(8.)),
    ];
    for (share, theirs) in kinds {
        let ours = [var(&[1., -2., 3.], DType::F64)?];
        let reference = ours[0].as_detached_tensor().copy()?;
        let reference = Var::from_tensor(&reference)?;
        let params = ParamsAdamW { lr: 0.1, weight_decay: 0., ..ParamsAdamW::default() };
        let mut adamw = AdamW::new(ours.to_vec(), params)?;
        let mut average = Average::new(share);
        let params =
            ParamsSrkl { average: Some(theirs), weight_decay: 0., ..ParamsSrkl::adamw(0.1) };
        let mut srkl = Srkl::new(vec![reference.clone()], params)?;
        for _ in 0..10 {
            adamw.backward_step(&ours[0].sqr()?.sum_all()?)?;
            average.update(&ours)?;
            srkl.backward_step(&reference.sqr()?.sum_all()?)?;
            let weights = values(&ours[0])?;
            let averages = swapped(&ours, average.averages(), || Ok(values(&ours[0])?))?;
            assert_eq!(values(&ours[0])?, weights, "they are back");
            let _averaged = srkl.swap_averaged()?;
            for (a, b) in averages.iter().zip(values(&reference)?) {
                assert_close(*a, b, 1e-6); // Srkl's averages are f32.
            }
        }
    }
    Ok(())
}
