//! Schedules of the learning rate: PyTorch's values, what holds for any of them, and how an optimizer steps and saves them.
//!
//! `tests/golden/make_schedules.py` made the values in `tests/golden/schedules.json` with PyTorch.

mod common;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{Collective, LrSchedule, Measure, NonFinite, ParamsSrkl, Srkl, Threads};
use common::*;
use proptest::prelude::*;
use serde_json::Value;

/// Schedules by the names of `schedules.json`.
fn cases() -> Vec<(&'static str, LrSchedule)> {
    let constant = LrSchedule::constant;
    vec![
        ("constant", constant()),
        ("linear", LrSchedule::Linear { from: 1. / 3., to: 0.8, steps: 7 }),
        ("warmup", LrSchedule::warmup(5)),
        ("linear_decay", LrSchedule::linear_decay(10, 0.05)),
        ("cosine", LrSchedule::cosine(13, 0.07)),
        ("step", LrSchedule::step(3, 0.3)),
        ("exponential", LrSchedule::step(1, 0.9)),
        ("multi_step", constant().then(3, constant().scaled(0.1)).then(8, constant().scaled(0.01))),
        ("constant_lr", constant().scaled(1. / 3.).then(5, constant())),
        ("one_cycle", LrSchedule::one_cycle(5, 14, 1. / 25., 4e-6)),
        ("one_cycle_set", LrSchedule::one_cycle(9, 30, 0.1, 1e-3)),
        (
            "sequence",
            LrSchedule::Linear { from: 0.25, to: 1., steps: 4 }
                .then(4, LrSchedule::cosine(8, 0.1))
                .then(12, LrSchedule::step(2, 0.5)),
        ),
        (
            "product",
            LrSchedule::Linear { from: 0.5, to: 1., steps: 4 }.times(LrSchedule::step(3, 0.5)),
        ),
        ("stable_decay", LrSchedule::warmup_stable_decay(4, 6, 10, 0.1)),
        (
            "cosine_with_warmup",
            LrSchedule::Linear { from: 0., to: 1., steps: 5 }.then(5, LrSchedule::cosine(15, 0.)),
        ),
    ]
}

#[test]
fn pytorchs_values() {
    let golden: Value = serde_json::from_str(include_str!("golden/schedules.json")).unwrap();
    let cases = cases();
    assert_eq!(golden.as_object().unwrap().len(), cases.len());
    for (name, schedule) in cases {
        let expected = golden[name].as_array().unwrap();
        assert!(expected.len() > 5, "{name}");
        for (step, expected) in expected.iter().enumerate() {
            let (got, expected) = (schedule.factor(step as u64), expected.as_f64().unwrap());
            assert!(close(got, expected, 1e-12), "{name}, step {step}: {got}, not {expected}");
        }
    }
}

#[test]
fn ends_are_exact_and_last() {
    for steps in [0, 1, 3, 1000, u64::MAX] {
        for floor in [0., 0.1, 1. / 3.] {
            for schedule in
                [LrSchedule::cosine(steps, floor), LrSchedule::linear_decay(steps, floor)]
            {
                assert_eq!(schedule.factor(0), if steps == 0 { floor } else { 1. });
                assert_eq!([steps, u64::MAX].map(|step| schedule.factor(step)), [floor; 2]);
            }
        }
        assert_eq!(LrSchedule::warmup(steps).factor(steps), 1.);
    }
    assert_eq!(LrSchedule::warmup_stable_decay(0, 0, 0, 0.5).factor(0), 0.5);
    assert_eq!(LrSchedule::step(1, 0.).factor(u64::MAX), 0.);
    // Nor does rounding lead beyond the ends.
    let flat = LrSchedule::Linear { from: 0.1, to: 0.1, steps: 100 };
    assert!((0..100).all(|step| flat.factor(step) == 0.1));
    // A later part replaces those that would begin at it, or after it.
    let schedule = LrSchedule::constant().then(5, LrSchedule::step(1, 0.5));
    assert_eq!(schedule.then(0, LrSchedule::warmup(3)).factor(0), 0.25);
}

fn simple() -> impl Strategy<Value = LrSchedule> {
    let factor = || prop_oneof![Just(0.), 0.0..2f64, (-300f64..100.).prop_map(|x| 10f64.powf(x))];
    let ends = move || (factor(), factor(), prop_oneof![0..50u64, any::<u64>()]);
    prop_oneof![
        factor().prop_map(LrSchedule::Constant),
        ends().prop_map(|(from, to, steps)| LrSchedule::Linear { from, to, steps }),
        ends().prop_map(|(from, to, steps)| LrSchedule::Cosine { from, to, steps }),
        (1..20u64, 0.0..=1f64).prop_map(|(every, gamma)| LrSchedule::step(every, gamma)),
    ]
}

fn any_schedule() -> impl Strategy<Value = LrSchedule> {
    simple().prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            (inner.clone(), 0..40u64, inner.clone()).prop_map(|(a, at, b)| a.then(at, b)),
            (inner.clone(), inner, 0.0..2f64).prop_map(|(a, b, factor)| a.times(b).scaled(factor)),
        ]
    })
}

/// An optimizer of one parameter, `lr` 1.
fn plain() -> Srkl {
    Srkl::new(vec![var(&[1.], DType::F64).unwrap()], ParamsSrkl::sgd(1.)).unwrap()
}

proptest! {
    /// What an optimizer takes never gives a NaN, an infinity or a negative number; and a file gives it back exactly.
    #[test]
    fn factors_are_finite_and_files_exact(
        schedule in any_schedule(),
        steps in proptest::collection::vec(prop_oneof![0..100u64, any::<u64>()], 20),
    ) {
        let mut opt = plain();
        // Products of large numbers alone are refused.
        prop_assume!(opt.set_schedule(Some(schedule.clone())).is_ok());
        for step in steps {
            let factor = schedule.factor(step);
            prop_assert!(factor.is_finite() && factor >= 0., "{factor} in step {step}");
        }
        opt.set_schedule_step(7).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        opt.save(file.path()).unwrap();
        let mut resumed = plain();
        resumed.load(file.path()).unwrap();
        prop_assert_eq!(resumed.schedule(), Some(&schedule));
        prop_assert_eq!(resumed.schedule_step(), Some(7));
        prop_assert_eq!(resumed.learning_rate().to_bits(), schedule.factor(7).to_bits());
    }

    /// A line and a cosine never leave their ends, never turn, and have no jumps.
    #[test]
    fn between_the_ends(from in 0.0..2f64, to in 0.0..2f64, steps in 1..500u64) {
        for schedule in [
            LrSchedule::Linear { from, to, steps },
            LrSchedule::Cosine { from, to, steps },
        ] {
            let factors: Vec<f64> = (0..steps + 3).map(|step| schedule.factor(step)).collect();
            prop_assert_eq!(factors[0], from);
            for pair in factors.windows(2) {
                let change = pair[1] - pair[0];
                prop_assert!(change * (to - from).signum() >= -1e-15, "{schedule:?}: {pair:?}");
                let most = 2. * (to - from).abs() / steps as f64;
                prop_assert!(change.abs() <= most + 1e-15, "{schedule:?}: {pair:?}");
                prop_assert!(pair.iter().all(|f| *f >= from.min(to) && *f <= from.max(to)));
            }
        }
    }

    #[test]
    fn parts_and_products(a in simple(), b in simple(), at in 0..40u64, step in 0..100u64) {
        let of = |schedule: &LrSchedule, step| schedule.factor(step);
        let then = a.clone().then(at, b.clone());
        let expected = if step < at { of(&a, step) } else { of(&b, step - at) };
        prop_assert_eq!(of(&then, step), expected);
        prop_assert_eq!(of(&a.clone().times(b.clone()), step), of(&a, step) * of(&b, step));
        prop_assert!(close(of(&a.clone().scaled(0.5), step), of(&a, step) * 0.5, 1e-15));
    }

    /// Joins of what ends at 1 with what begins there are no jumps.
    #[test]
    fn joins(rise in 1..50u64, stable in 0..50u64, fall in 1..50u64, floor in 0.0..1f64) {
        let most = 1.6 / rise.min(fall) as f64;
        for schedule in [
            LrSchedule::warmup_stable_decay(rise, stable, fall, floor),
            LrSchedule::one_cycle(rise, fall, floor, floor),
            LrSchedule::warmup(rise).then(rise + stable, LrSchedule::cosine(fall, floor)),
        ] {
            for step in 0..rise + stable + fall + 2 {
                let change = schedule.factor(step + 1) - schedule.factor(step);
                prop_assert!(change.abs() <= most, "{schedule:?}, step {step}: {change}");
            }
        }
    }
}

#[test]
fn settings_out_of_range() {
    let linear = |from, to| LrSchedule::Linear { from, to, steps: 3 };
    let cosine = |from, to| LrSchedule::Cosine { from, to, steps: 3 };
    let deep = (0..70).fold(LrSchedule::constant(), |inner, _| LrSchedule::Product(vec![inner]));
    for (schedule, parts) in [
        (LrSchedule::constant().scaled(-1.), vec!["LrSchedule::Constant", "0 or above", "-1"]),
        (LrSchedule::constant().scaled(f64::NAN), vec!["LrSchedule::Constant", "NaN"]),
        (linear(f64::INFINITY, 1.), vec!["`from (LrSchedule::Linear)`", "inf"]),
        (linear(1., -0.5), vec!["`to (LrSchedule::Linear)`", "-0.5"]),
        (cosine(f64::NAN, 1.), vec!["`from (LrSchedule::Cosine)`", "NaN"]),
        (LrSchedule::warmup(3).then(3, cosine(1., -1.)), vec!["`to (LrSchedule::Cosine)`", "-1"]),
        (LrSchedule::step(0, 0.5), vec!["`every`", "1 or above", "got 0"]),
        (LrSchedule::step(3, 1.5), vec!["`gamma`", "from 0 to 1", "1.5"]),
        (LrSchedule::Sequence(vec![]), vec!["LrSchedule::Sequence", "[]"]),
        (
            LrSchedule::Sequence(vec![
                (0, linear(0., 1.)),
                (3, linear(1., 0.)),
                (3, linear(0., 0.)),
            ]),
            vec!["LrSchedule::Sequence", "[0, 3, 3]"],
        ),
        (
            LrSchedule::warmup(3).scaled(1e200).scaled(1e200),
            vec!["largest multiplier", "finite", "inf"],
        ),
        (deep, vec!["64"]),
    ] {
        let mut opt = plain();
        opt.set_schedule(Some(LrSchedule::step(1, 0.5))).unwrap();
        assert_error(opt.set_schedule(Some(schedule)), &[&["schedule"], &parts[..]].concat());
        assert_eq!(opt.schedule(), Some(&LrSchedule::step(1, 0.5)));
        assert_eq!(opt.learning_rate(), 1.);
    }
    // By the learning rates of the groups.
    let mut opt = Srkl::new(vec![var(&[1.], DType::F64).unwrap()], ParamsSrkl::sgd(10.)).unwrap();
    let large = LrSchedule::constant().scaled(1e308);
    assert_error(opt.set_schedule(Some(large)), &["group `default`", "`lr`", "finite"]);
    assert_error(opt.set_schedule_step(3), &["no schedule", "set_schedule"]);
    assert_eq!((opt.schedule(), opt.schedule_step(), opt.learning_rate()), (None, None, 10.));
}

/// The multiplier is of `phi`, behind the brake, in every group; and setting it by hand is the same.
#[test]
fn phi_is_multiplied() -> Result<()> {
    let schedule = LrSchedule::warmup(2).then(2, LrSchedule::cosine(4, 0.25));
    let run = |by_hand: bool| -> Result<_> {
        let vars = noisy_vars(&[20, 30], 1., DType::F64)?;
        let named = ["a", "b"].map(String::from).into_iter().zip(vars.clone());
        let mut opt = Srkl::builder()
            .default_group(ParamsSrkl { lr: 0.5, ..ParamsSrkl::reference() })
            .group("b", ParamsSrkl { lr: 2., ..ParamsSrkl::reference() }, |name, _| name == "b")
            .build(named)?;
        if !by_hand {
            opt.set_schedule(Some(schedule.clone()))?;
        }
        for step in 0..9 {
            let s = schedule.factor(step);
            if by_hand {
                opt.set_learning_rate(0.5 * s);
            }
            assert_eq!(opt.learning_rate(), s * 0.5);
            assert_eq!(opt.schedule_step(), (!by_hand).then_some(step));
            let grads = grads(vars.iter().map(|var| {
                let g = noise(var.elem_count(), 1., 7 + step);
                (var, tensor(&g, DType::F64).unwrap())
            }));
            opt.step(&grads)?;
            for (telemetry, lr) in opt.telemetry()?.iter().zip([0.5, 2.]) {
                let phi = s * lr / (1. + 0.1 * telemetry.curvature.unwrap());
                assert_close(telemetry.phi.unwrap(), phi, 1e-14);
            }
        }
        all_values(&vars)
    };
    assert_eq!(run(false)?, run(true)?);
    Ok(())
}

/// Steps that fail and measurements do not count, and skipped steps do; what is set by hand takes the schedule's place.
#[test]
fn what_counts() -> Result<()> {
    let w = var(&[1., 2.], DType::F64)?;
    let named = [("w".to_string(), w.clone())];
    let params = ParamsSrkl { nonfinite: NonFinite::SkipStep, ..ParamsSrkl::sgd(1.) };
    let mut opt = Srkl::builder().default_group(params.clone()).build(named)?;
    let of = |g: &[f64]| grads([(&w, tensor(g, DType::F64).unwrap())]);
    opt.step(&of(&[0.1, 0.1]))?;
    // It goes on from the number of the next step.
    let schedule = LrSchedule::linear_decay(10, 0.);
    opt.set_schedule(Some(schedule.clone()))?;
    let at = |opt: &Srkl| (opt.schedule_step().unwrap(), opt.learning_rate());
    assert_eq!(at(&opt), (1, 0.9));
    opt.step(&of(&[0.1, 0.1]))?;
    assert_eq!(at(&opt), (2, 0.8));
    let wrong = grads([(&w, tensor(&[1.; 3], DType::F64)?)]);
    assert_error(opt.step(&wrong), &["`w`"]);
    assert_eq!(at(&opt), (2, 0.8));
    opt.step(&of(&[f64::NAN, 0.]))?;
    assert_eq!(opt.skipped_steps()?, 1);
    assert_eq!(at(&opt), (3, schedule.factor(3)));
    for _ in 0..2 {
        opt.accumulate(&of(&[0.1, 0.1]))?;
    }
    opt.step_accumulated()?;
    assert_eq!(at(&opt), (4, schedule.factor(4)));
    opt.backward_step(&w.sqr()?.sum_all()?)?;
    assert_eq!(at(&opt), (5, 0.5));
    opt.set_schedule_step(0)?;
    assert_eq!(at(&opt), (0, 1.));
    opt.set_schedule_step(u64::MAX)?;
    opt.step(&of(&[0., 0.]))?;
    assert_eq!(at(&opt), (u64::MAX, 0.));
    opt.set_learning_rate(0.3);
    opt.step(&of(&[0., 0.]))?;
    assert_eq!((opt.schedule(), opt.learning_rate()), (None, 0.3));
    opt.set_schedule(Some(schedule))?;
    opt.set_schedule(None)?;
    assert_eq!((opt.schedule(), opt.learning_rate()), (None, 1.));
    Ok(())
}

/// A step and its measurement are one step of the schedule, of which the measured one uses the multiplier.
#[test]
fn measurements_belong_to_their_step() -> Result<()> {
    for preset in [ParamsSrkl::braked_adam(), ParamsSrkl::hessian()] {
        let w = var(&noise(10, 1., 1), DType::F64)?;
        let measure = Measure { every: 2, first: 1, ..Measure::default() };
        let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl { measure, ..preset })?;
        let lr = opt.learning_rate();
        let schedule = LrSchedule::linear_decay(20, 0.5);
        opt.set_schedule(Some(schedule.clone()))?;
        for step in 0..8 {
            assert_eq!(opt.learning_rate(), schedule.factor(step) * lr);
            if step % 3 == 0 {
                opt.backward_step_with(|| w.sqr()?.sum_all())?;
            } else if step % 3 == 1 {
                opt.backward_step_over(3, |_| w.sqr()?.sum_all())?;
            } else {
                measured_step(&mut opt, || w.sqr()?.sum_all()?.backward())?;
            }
            assert_eq!(opt.schedule_step(), Some(step + 1));
        }
        assert!(opt.measurements()?.taken > 3);
    }
    Ok(())
}

/// A model of two groups, `braked_adam` with other settings in each, and its loss in step `i`.
fn two_groups() -> Result<(Vec<Var>, Srkl)> {
    let vars = noisy_vars(&[40, 25], 1., DType::F32)?;
    let named = ["a", "b"].map(String::from).into_iter().zip(vars.clone());
    let measure = Measure { every: 3, first: 2, ..Measure::default() };
    let a = ParamsSrkl { measure, ..ParamsSrkl::braked_adam() };
    let b = ParamsSrkl { lr: 0.01, weight_decay: 0.1, ..a.clone() };
    let mut opt =
        Srkl::builder().default_group(a).group("b", b, |name, _| name == "b").build(named)?;
    opt.set_seed(3);
    Ok((vars, opt))
}

fn train(vars: &[Var], opt: &mut Srkl, steps: std::ops::Range<u64>) -> Result<()> {
    for step in steps {
        let loss = || {
            let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu)?;
            for var in vars {
                let target = tensor(&noise(var.elem_count(), 0.5, step), DType::F32)?;
                sum = (sum + (var.as_tensor() - target)?.sqr()?.sqr()?.sum_all()?)?;
            }
            Ok::<_, candle_core::Error>(sum)
        };
        opt.backward_step_with(loss)?;
    }
    Ok(())
}

fn all(vars: &[Var], opt: &Srkl) -> Result<String> {
    let bits = vars.iter().map(|var| bits(var.as_tensor())).collect::<Result<Vec<_>>>()?;
    let phi: Vec<_> = opt.telemetry()?.iter().map(|t| t.phi.map(f64::to_bits)).collect();
    Ok(format!("{bits:x?} {phi:?} {} {:?}", opt.learning_rate(), opt.schedule_step()))
}

#[test]
fn resumed_runs_have_the_same_bits() -> Result<()> {
    let schedule = LrSchedule::warmup(4).then(7, LrSchedule::cosine(9, 0.1)).scaled(1. / 3.);
    for saved_at in [3, 9] {
        let file = tempfile::NamedTempFile::new()?;
        let (vars, mut opt) = two_groups()?;
        opt.set_schedule(Some(schedule.clone()))?;
        train(&vars, &mut opt, 0..saved_at)?;
        opt.save(file.path())?;
        let (resumed, mut resumed_opt) = two_groups()?;
        for (var, saved) in resumed.iter().zip(&vars) {
            var.set(&saved.copy()?)?;
        }
        // What was set before is replaced.
        resumed_opt.set_schedule(Some(LrSchedule::step(1, 0.5)))?;
        resumed_opt.load(file.path())?;
        assert_eq!(resumed_opt.schedule(), Some(&schedule));
        train(&vars, &mut opt, saved_at..16)?;
        train(&resumed, &mut resumed_opt, saved_at..16)?;
        assert_eq!(all(&resumed, &resumed_opt)?, all(&vars, &opt)?);
        // The schedule matters.
        let (other, mut other_opt) = two_groups()?;
        train(&other, &mut other_opt, 0..16)?;
        assert_ne!(bits(&other[0])?, bits(&vars[0])?);
    }
    Ok(())
}

/// The file of `from`, with this entry, or without one.
fn with_entry(from: &Path, to: &Path, entry: Option<&str>) {
    let bytes = std::fs::read(from).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    match entry {
        Some(entry) => metadata.insert("lr_schedule".to_string(), entry.to_string()),
        None => metadata.remove("lr_schedule"),
    };
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    safetensors::serialize_to_file(tensors.tensors(), Some(metadata), to).unwrap();
}

#[test]
fn files_with_and_without_a_schedule() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (good, changed) = (folder.path().join("good"), folder.path().join("changed"));
    let mut opt = plain();
    opt.set_schedule(Some(LrSchedule::step(3, 0.5)))?;
    opt.set_schedule_step(4)?;
    opt.save(&good)?;
    assert_eq!(contents(&good)?.0["lr_schedule"], "4 step 3 0.5");
    // As older files: the multiplier, and no schedule.
    with_entry(&good, &changed, None);
    let mut older = plain();
    older.set_schedule(Some(LrSchedule::constant()))?;
    older.load(&changed)?;
    assert_eq!((older.schedule(), older.learning_rate()), (None, 0.5));

    let before = LrSchedule::cosine(9, 0.1);
    let deep = format!("0 {}constant 1.0", "product 1 ".repeat(100_000));
    for (entry, parts) in [
        ("", vec!["expected a number"]),
        ("4", vec!["expected a kind"]),
        ("x step 3 0.5", vec!["expected a number", "\"x\""]),
        ("-1 step 3 0.5", vec!["expected a number", "\"-1\""]),
        ("4 stairs 3 0.5", vec!["kind of schedule", "stairs"]),
        ("4 step 3", vec!["expected a number behind"]),
        ("4 step 3 0.5 7", vec!["nothing behind", "\"7\""]),
        ("4 step 0 0.5", vec!["`every`"]),
        ("4 step 3 NaN", vec!["`gamma`", "NaN"]),
        ("4 constant inf", vec!["Constant", "inf"]),
        ("4 linear 1.0 -1.0 5", vec!["`to (LrSchedule::Linear)`"]),
        ("4 sequence 2 0 constant 1.0", vec!["expected a number behind"]),
        ("4 sequence 18446744073709551615 0 constant 1.0", vec!["expected a number behind"]),
        ("4 sequence 1 5 constant 1.0", vec!["begin at step 0", "[5]"]),
        (&deep, vec!["64"]),
    ] {
        with_entry(&good, &changed, Some(entry));
        let mut opt = plain();
        opt.set_schedule(Some(before.clone()))?;
        assert_error(opt.load(&changed), &[&["`lr_schedule`", "changed"], &parts[..]].concat());
        assert_eq!((opt.schedule(), opt.schedule_step()), (Some(&before), Some(0)));
    }
    Ok(())
}

/// The same bits for two ranks as for one; and ranks with different schedules get the same error.
#[test]
fn ranks() -> Result<()> {
    let run = |other: Option<LrSchedule>| -> Vec<Result<Vec<f64>>> {
        let schedule = LrSchedule::warmup(3).then(3, LrSchedule::linear_decay(5, 0.2));
        std::thread::scope(|scope| {
            let workers = Threads::new(2).into_iter().map(|collective| {
                let (mut schedule, other) = (schedule.clone(), other.clone());
                scope.spawn(move || {
                    let rank = collective.rank();
                    let w = var(&noise(30, 1., 1), DType::F32)?;
                    let mut opt = Srkl::builder()
                        .default_group(ParamsSrkl::adamw(0.1))
                        .collective(collective)
                        .build([("w".to_string(), w.clone())])?;
                    if let (Some(other), 1) = (other, rank) {
                        schedule = other;
                    }
                    opt.set_schedule(Some(schedule))?;
                    for _ in 0..8 {
                        opt.backward_step(&w.sqr()?.sum_all()?)?;
                    }
                    values(&w)
                })
            });
            let workers: Vec<_> = workers.collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        })
    };
    let w = var(&noise(30, 1., 1), DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.1))?;
    opt.set_schedule(Some(LrSchedule::warmup(3).then(3, LrSchedule::linear_decay(5, 0.2))))?;
    for _ in 0..8 {
        opt.backward_step(&w.sqr()?.sum_all()?)?;
    }
    for ranks in run(None) {
        assert_eq!(ranks?, values(&w)?);
    }
    for ranks in run(Some(LrSchedule::warmup(3))) {
        assert_error(ranks, &["the ranks differ", "multiplier is 0.84"]);
    }
    Ok(())
}

#[cfg(feature = "serde")]
#[test]
fn schedules_survive_json() {
    for (name, schedule) in cases() {
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<LrSchedule>(&json).unwrap(), schedule, "{name}");
    }
    let json = r#"{"Linear": {"from": 0.0, "to": 1.0, "step": 3}}"#;
    let error = serde_json::from_str::<LrSchedule>(json).unwrap_err();
    assert!(error.to_string().contains("unknown field"), "{error}");
}
