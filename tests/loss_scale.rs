//! Dynamic loss scaling: PyTorch's sequence of scales, resumed anywhere, and one scale for all of a step.
//!
//! `tests/golden/make_scaler.py` made the values in `tests/golden/scaler.json` with PyTorch.

mod common;

use std::thread;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{GradScaler, Measure, NonFinite, ParamsSrkl, Srkl, Threads};
use common::*;
use serde_json::Value;

/// A gradient of three elements, of which `g` is the second.
fn gradient(w: &Var, g: f64) -> Result<GradStore> {
    Ok(grads([(w, tensor(&[1., g, 1.], DType::F32)?)]))
}

/// A step by finite gradients, or by an infinite one.
fn step(opt: &mut Srkl, w: &Var, bad: bool) -> Result<()> {
    opt.step(&gradient(w, if bad { f64::INFINITY } else { 1. })?)
}

fn build(scaler: GradScaler) -> Result<(Srkl, Var)> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let builder = Srkl::builder().default_group(ParamsSrkl::sgd(1e-9));
    let mut opt = builder.build([("w".to_string(), w.clone())])?;
    opt.set_grad_scaler(Some(scaler))?;
    Ok((opt, w))
}

/// In one go, and with a checkpoint between any two steps.
#[test]
fn pytorchs_scales() -> Result<()> {
    let golden: Value = serde_json::from_str(include_str!("golden/scaler.json")).unwrap();
    let file = tempfile::NamedTempFile::new()?;
    for (name, case) in golden["cases"].as_object().unwrap() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let scaler = GradScaler {
            init_scale: number("init_scale"),
            growth_factor: number("growth_factor"),
            backoff_factor: number("backoff_factor"),
            growth_interval: number("growth_interval") as u64,
            ..GradScaler::default()
        };
        for resumed in [false, true] {
            let (mut opt, mut w) = build(scaler)?;
            for (i, expected) in case["steps"].as_array().unwrap().iter().enumerate() {
                step(&mut opt, &w, expected[0] == 1)?;
                // Scales are f32; the parser may be off by a last bit of f64.
                let scale = f64::from(expected[1].as_f64().unwrap() as f32);
                assert_eq!(opt.grad_scale(), scale, "{name}, step {i}, resumed: {resumed}");
                if resumed {
                    opt.save(file.path())?;
                    (opt, w) = build(scaler)?;
                    opt.load(file.path())?;
                }
            }
        }
    }
    Ok(())
}

/// Looked at once in some steps, the scale falls once for all that were skipped; a checkpoint between has the count.
#[test]
fn steps_between_looks() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let scaler = GradScaler { check_every: 4, growth_interval: 6, ..GradScaler::default() };
    let (mut opt, mut w) = build(scaler)?;
    let mut scales = vec![];
    for i in 0..16 {
        step(&mut opt, &w, (1..3).contains(&i))?;
        scales.push(opt.grad_scale() / 65_536.);
        opt.save(file.path())?;
        (opt, w) = build(scaler)?;
        opt.load(file.path())?;
    }
    let expected = [vec![1.; 3], vec![0.5; 8], vec![1.; 5]].concat();
    assert_eq!(scales, expected);
    // Asked for between.
    step(&mut opt, &w, true)?;
    assert_eq!(opt.grad_scale(), 65_536.);
    opt.update_grad_scale()?;
    assert_eq!(opt.grad_scale(), 32_768.);
    opt.update_grad_scale()?;
    assert_eq!(opt.grad_scale(), 32_768.);
    Ok(())
}

#[test]
fn never_below_the_least() -> Result<()> {
    let (mut opt, w) = build(GradScaler { init_scale: 8., min_scale: 3., ..Default::default() })?;
    for expected in [4., 3., 3.] {
        step(&mut opt, &w, true)?;
        assert_eq!(opt.grad_scale(), expected);
    }
    let (mut opt, w) = build(GradScaler::default())?;
    (0..300).try_for_each(|_| step(&mut opt, &w, true))?;
    assert_eq!(opt.grad_scale(), f64::from(f32::MIN_POSITIVE));
    Ok(())
}

/// From a file without a scaler its own scale goes on; without one the file's is taken.
#[test]
fn files_of_others() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let (mut opt, w) = build(GradScaler::default())?;
    opt.set_grad_scaler(None)?;
    opt.set_grad_scale(7.)?;
    step(&mut opt, &w, true)?;
    assert_eq!(opt.grad_scale(), 7.);
    opt.save(file.path())?;
    let (mut other, w) = build(GradScaler::default())?;
    other.load(file.path())?;
    assert_eq!(other.grad_scale(), 65_536.);
    // The skipped step of the file is none of its own.
    step(&mut other, &w, false)?;
    assert_eq!(other.grad_scale(), 65_536.);
    step(&mut other, &w, true)?;
    other.save(file.path())?;
    opt.load(file.path())?;
    assert_eq!(opt.grad_scale(), 32_768.);
    Ok(())
}

/// Micro-batches of one step have one scale, and an infinity in any of them skips the step.
#[test]
fn accumulated_steps_are_whole() -> Result<()> {
    let (mut opt, w) = build(GradScaler { growth_interval: 2, ..GradScaler::default() })?;
    let mut scales = vec![];
    for bad in [true, false, false] {
        for i in 0..3 {
            let g = if bad && i == 1 { f64::NAN } else { 1. };
            opt.accumulate(&grads([(&w, tensor(&[g; 3], DType::F16)?)]))?;
            scales.push(opt.grad_scale() / 65_536.);
        }
        opt.step_accumulated()?;
    }
    assert_eq!(scales, [1., 1., 1., 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
    assert_eq!(opt.grad_scale(), 65_536.);
    Ok(())
}

/// Gradients that are 0 in f16 train with a scale, as in f64, through steps that are skipped for too large a one.
#[test]
fn small_gradients_of_f16() -> Result<()> {
    let train = |dtype, scaled: bool| -> Result<(Vec<f64>, u64)> {
        let w = var(&[1., -2., 3.], dtype)?;
        let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::sgd(1e7))?;
        if scaled {
            let init_scale = 2f64.powi(45);
            opt.set_grad_scaler(Some(GradScaler { init_scale, ..GradScaler::default() }))?;
        }
        for _ in 0..100 {
            // It is multiplied behind f16.
            let loss = (w.sqr()?.to_dtype(DType::F64)? * 1e-8)?.sum_all()?;
            opt.backward_step(&(loss * opt.grad_scale())?)?;
            if opt.steps()? == 10 {
                break;
            }
        }
        Ok((values(&w)?, opt.skipped_steps()?))
    };
    let (exact, _) = train(DType::F64, false)?;
    let (scaled, skipped) = train(DType::F16, true)?;
    assert!((1..50).contains(&skipped), "{skipped}");
    for (got, exact) in scaled.iter().zip(&exact) {
        assert!((got - exact).abs() < 2e-2 * exact.abs(), "{got}, not {exact}");
    }
    assert_eq!(train(DType::F16, false)?.0, [1., -2., 3.]);
    Ok(())
}

/// A second gradient that overflows is not taken for curvature, but a repeated one is; the scale changes when it is measured.
#[test]
fn infinite_second_gradients() -> Result<()> {
    for params in [ParamsSrkl::braked_adam(), ParamsSrkl::hessian()] {
        let w = var(&[1., -2., 3.], DType::F32)?;
        let mut opt = Srkl::new(vec![w.clone()], params.clone())?;
        opt.set_grad_scaler(Some(GradScaler::default()))?;
        let scale = opt.grad_scale();
        opt.backward_step_with(|| w.sqr()?.sum_all()? * scale)?;
        let before = opt.measurements()?;
        assert_eq!((before.taken, before.nonfinite), (1, 0));
        let probes = params == ParamsSrkl::hessian();
        let measure = |opt: &mut Srkl| -> Result<()> {
            assert!(opt.measuring());
            let first = (w.sqr()?.sum_all()? * opt.grad_scale())?.backward()?;
            let infinite = gradient(&w, f64::INFINITY)?;
            let scale = opt.grad_scale();
            if probes {
                opt.perturb(&first)?.observe(&infinite)?;
                assert_eq!(opt.grad_scale(), scale);
                opt.step(&first)
            } else {
                opt.step(&first)?;
                assert_eq!(opt.grad_scale(), scale);
                opt.observe(&infinite)
            }
        };
        opt.set_measure(Measure { every: 1000, first: 1, ..params.measure })?;
        opt.request_measurement();
        measure(&mut opt)?;
        assert_eq!(opt.grad_scale(), 32_768.);
        let (taken, nonfinite) = (opt.measurements()?.taken, opt.measurements()?.nonfinite);
        assert_eq!((taken, nonfinite), (1, 0), "{params:?}");
        assert_eq!(opt.measurements()?.last, before.last);
        // Asked for again, it counts.
        measure(&mut opt)?;
        assert_eq!(opt.grad_scale(), 32_768.);
        assert_eq!(opt.measurements()?.nonfinite, 1, "{params:?}");
    }
    Ok(())
}

/// The scale falls at once for a measurement that was given up for it, however rarely it is looked at otherwise.
#[test]
fn infinite_second_gradients_between_looks() -> Result<()> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    opt.set_grad_scaler(Some(GradScaler { check_every: 100, ..GradScaler::default() }))?;
    for (again, scale, taken, nonfinite) in
        [(f64::INFINITY, 32_768., 0, 0), (2., 32_768., 1, 0), (f64::INFINITY, 16_384., 1, 0)]
    {
        assert!(opt.measuring());
        opt.step(&gradient(&w, 1.)?)?;
        opt.observe(&gradient(&w, again)?)?;
        let found = opt.measurements()?;
        assert_eq!((opt.grad_scale(), found.taken, found.nonfinite), (scale, taken, nonfinite));
    }
    Ok(())
}

/// A step that was skipped, or will be, says nothing of its second gradient: the next infinite one is blamed on the scale.
#[test]
fn infinite_first_gradients_blame_nothing() -> Result<()> {
    for params in [ParamsSrkl::braked_adam(), ParamsSrkl::hessian()] {
        let w = var(&[1., -2., 3.], DType::F32)?;
        let mut opt = Srkl::new(vec![w.clone()], params.clone())?;
        opt.set_grad_scaler(Some(GradScaler::default()))?;
        for (first, scale) in [(f64::INFINITY, 32_768.), (1., 16_384.), (f64::NAN, 8_192.)] {
            opt.request_measurement();
            let first = gradient(&w, first)?;
            let infinite = gradient(&w, f64::INFINITY)?;
            if params == ParamsSrkl::hessian() {
                opt.perturb(&first)?.observe(&infinite)?;
                opt.step(&first)?;
            } else {
                opt.step(&first)?;
                opt.observe(&infinite)?;
            }
            assert_eq!(opt.grad_scale(), scale, "{params:?}");
            assert_eq!(opt.measurements()?.nonfinite, 0, "{params:?}");
        }
    }
    Ok(())
}

/// A measurement is repeated until a step is taken that it can be made along.
#[test]
fn repeated_measurements_of_skipped_steps() -> Result<()> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    opt.set_grad_scaler(Some(GradScaler::default()))?;
    opt.step(&gradient(&w, 1.)?)?;
    opt.observe(&gradient(&w, 2.)?)?;
    let measure = Measure { every: 1000, first: 1, ..Measure::default() };
    opt.set_measure(measure)?;
    opt.request_measurement();
    for (first, again, scale) in
        [(1., f64::INFINITY, 0.5), (f64::INFINITY, 1., 0.25), (1., 3., 0.25)]
    {
        assert!(opt.measuring(), "{first} {again}");
        opt.step(&gradient(&w, first)?)?;
        opt.observe(&gradient(&w, again)?)?;
        assert_eq!(opt.grad_scale(), 65_536. * scale);
    }
    assert!(!opt.measuring());
    assert_eq!((opt.measurements()?.taken, opt.measurements()?.nonfinite), (2, 0));
    // One that is given up is not repeated, and the next is a first one.
    opt.request_measurement();
    opt.step(&gradient(&w, 1.)?)?;
    opt.observe(&gradient(&w, f64::INFINITY)?)?;
    opt.step(&gradient(&w, 1.)?)?;
    opt.skip_measurement();
    assert!(!opt.measuring());
    opt.request_measurement();
    opt.step(&gradient(&w, 1.)?)?;
    opt.observe(&gradient(&w, f64::INFINITY)?)?;
    assert_eq!((opt.measurements()?.nonfinite, opt.measuring()), (0, true));
    Ok(())
}

/// What has been accumulated keeps its scale, and is no gradient of another optimizer's state.
#[test]
fn accumulated_gradients_keep_their_scale() -> Result<()> {
    let (mut opt, w) = build(GradScaler { growth_interval: 1, ..GradScaler::default() })?;
    let add = |opt: &mut Srkl| opt.accumulate(&gradient(&w, 1.)?);
    add(&mut opt)?;
    assert_error(opt.set_grad_scale(3.), &["`grad_scale`", "1 accumulated", "65536"]);
    assert_error(
        opt.set_grad_scaler(Some(GradScaler { init_scale: 2., ..Default::default() })),
        &["`grad_scale`"],
    );
    assert_eq!(opt.grad_scaler().map(|scaler| scaler.growth_interval), Some(1));
    // A step by other gradients would let it grow.
    step(&mut opt, &w, false)?;
    opt.update_grad_scale()?;
    assert_eq!(opt.grad_scale(), 65_536.);
    opt.step_accumulated()?;
    assert_eq!(opt.grad_scale(), 131_072.);

    let state = opt.snapshot()?;
    add(&mut opt)?;
    opt.restore(&state)?;
    assert_eq!(opt.accumulated(), 0);
    assert_error(opt.step_accumulated(), &["`step_accumulated`", "nothing"]);
    Ok(())
}

/// Second gradients of a measurement that is given up do not get into the next step.
#[test]
fn accumulated_second_gradients_are_given_up() -> Result<()> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    let add = |opt: &mut Srkl| opt.accumulate(&gradient(&w, 1.)?);
    (0..2).try_for_each(|_| add(&mut opt))?;
    opt.step_accumulated()?;
    add(&mut opt)?;
    opt.skip_measurement();
    assert_eq!(opt.accumulated(), 0);
    // Before a step what has been accumulated is that of the step.
    add(&mut opt)?;
    opt.skip_measurement();
    assert_eq!(opt.accumulated(), 1);
    Ok(())
}

/// A measuring step over micro-batches has one scale from the first to the last second gradient.
#[test]
fn measuring_micro_batches_have_one_scale() -> Result<()> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    opt.set_grad_scaler(Some(GradScaler { growth_interval: 1, ..GradScaler::default() }))?;
    let mut seen = vec![];
    for _ in 0..2 {
        for part in 0..2 {
            for _ in 0..2 {
                seen.push(opt.grad_scale() / 65_536.);
                opt.accumulate(&(w.sqr()?.sum_all()? * opt.grad_scale())?.backward()?)?;
            }
            if part == 0 { opt.step_accumulated()? } else { opt.observe_accumulated()? }
        }
    }
    assert_eq!(seen, [1., 1., 1., 1., 2., 2., 2., 2.]);
    assert_eq!(opt.measurements()?.taken, 2);
    Ok(())
}

/// A measurement that is given up ends its step.
#[test]
fn given_up_measurements() -> Result<()> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    opt.set_grad_scaler(Some(GradScaler::default()))?;
    step(&mut opt, &w, true)?;
    assert_eq!(opt.grad_scale(), 65_536.);
    assert_error(opt.update_grad_scale(), &["`observe`"]);
    assert_error(opt.set_grad_scaler(Some(GradScaler::default())), &["`observe`"]);
    opt.skip_measurement();
    assert_eq!(opt.grad_scale(), 32_768.);
    Ok(())
}

/// The scale is the same on all ranks, whichever has the infinity.
#[test]
fn ranks_have_one_scale() {
    for sharded in [false, true] {
        let run = |rank: Threads| -> Result<Vec<f64>> {
            let w = var(&[1., -2., 3.], DType::F32)?;
            let builder = Srkl::builder().default_group(ParamsSrkl::braked_adam());
            let builder = builder.collective(rank).sharded(sharded);
            let mut opt = builder.build([("w".to_string(), w.clone())])?;
            opt.set_grad_scaler(Some(GradScaler { growth_interval: 2, ..Default::default() }))?;
            let mut scales = vec![];
            for bad in [1, 2, 2, 0, 2, 2] {
                let bad = opt.rank() == bad;
                // Of the first two a second gradient alone, on rank 1.
                step(&mut opt, &w, bad && !scales.is_empty())?;
                let again = if scales.is_empty() && bad { f64::INFINITY } else { 1. };
                opt.observe(&grads([(&w, tensor(&[again; 3], DType::F32)?)]))?;
                scales.push(opt.grad_scale() / 65_536.);
            }
            Ok(scales)
        };
        let scales: Vec<_> = thread::scope(|scope| {
            let ranks = Threads::new(2).into_iter().map(|rank| scope.spawn(|| run(rank)));
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
        });
        let expected = [0.5, 0.5, 1., 0.5, 0.5, 1.];
        assert_eq!(scales, [expected, expected], "sharded: {sharded}");
    }
}

/// A scaler on one rank alone is an error of all, which names it.
#[test]
fn a_scaler_of_one_rank() {
    let run = |rank: Threads| -> Result<String> {
        let w = var(&[1., -2., 3.], DType::F32)?;
        let builder = Srkl::builder().default_group(ParamsSrkl::braked_adam()).collective(rank);
        let mut opt = builder.build([("w".to_string(), w.clone())])?;
        if opt.rank() == 0 {
            opt.set_grad_scaler(Some(GradScaler { init_scale: 1., ..Default::default() }))?;
        }
        Ok(step(&mut opt, &w, false).unwrap_err().to_string())
    };
    thread::scope(|scope| {
        let ranks = Threads::new(2).into_iter().map(|rank| scope.spawn(|| run(rank)));
        for rank in ranks.collect::<Vec<_>>() {
            let told = rank.join().unwrap().unwrap();
            assert!(told.contains("the scaler"), "{told}");
        }
    });
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let (mut opt, w) = build(GradScaler::default())?;
    let default = GradScaler::default;
    for (name, scaler) in [
        ("init_scale", GradScaler { init_scale: 0., ..default() }),
        ("init_scale", GradScaler { init_scale: 1e39, ..default() }),
        ("min_scale", GradScaler { min_scale: 0., ..default() }),
        // A f32, whose reciprocal is none.
        ("grad_scale", GradScaler { min_scale: 1e-39, ..default() }),
        ("min_scale", GradScaler { min_scale: 1e6, ..default() }),
        ("growth_factor", GradScaler { growth_factor: 1., ..default() }),
        ("growth_factor", GradScaler { growth_factor: f64::NAN, ..default() }),
        ("backoff_factor", GradScaler { backoff_factor: 1., ..default() }),
        ("growth_interval", GradScaler { growth_interval: 0, ..default() }),
        ("check_every", GradScaler { check_every: 0, ..default() }),
    ] {
        assert_error(opt.set_grad_scaler(Some(scaler)), &[name]);
        assert_eq!(opt.grad_scaler(), Some(&default()));
        assert_eq!(opt.grad_scale(), 65_536.);
    }
    let propagate = ParamsSrkl { nonfinite: NonFinite::Propagate, ..ParamsSrkl::sgd(0.1) };
    assert_error(opt.set_params("default", propagate.clone()), &["`nonfinite`", "Propagate"]);
    let mut opt = Srkl::new(vec![w], propagate)?;
    assert_error(opt.set_grad_scaler(Some(default())), &["group `default`", "`nonfinite`"]);
    assert_eq!((opt.grad_scaler(), opt.grad_scale()), (None, 1.));
    Ok(())
}

#[cfg(feature = "serde")]
#[test]
fn settings_survive_json() {
    let scaler = GradScaler { growth_interval: 7, check_every: 3, ..GradScaler::default() };
    let json = serde_json::to_string(&scaler).unwrap();
    assert_eq!(serde_json::from_str::<GradScaler>(&json).unwrap(), scaler);
    // Fields that are missing have their defaults, and a misspelled one is an error.
    let read = serde_json::from_str::<GradScaler>;
    assert_eq!(read(r#"{"growth_interval": 7, "check_every": 3}"#).unwrap(), scaler);
    assert!(read(r#"{"growth": 7}"#).unwrap_err().to_string().contains("unknown field"));
}
