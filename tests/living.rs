//! The state in memory, copies, checkpoints in part, and parameters that are frozen, added and removed.

mod common;

use std::collections::BTreeMap;
use std::thread;

use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use candle_srkl::{
    Average, AverageFormat, DEFAULT_GROUP, LrSchedule, MasterWeights, Measure, NonFinite,
    ParamsSrkl, Scope, Srkl, SrklState, StateFormat, Threads,
};
use common::*;
use safetensors::SafeTensors;

const SIZES_HERE: [usize; 3] = [5000, 9, 4100];

fn adam() -> ParamsSrkl {
    let average = Some(Average::Exponential(0.9));
    ParamsSrkl { average, nonfinite: NonFinite::SkipBlock, ..ParamsSrkl::adamw(0.1) }
}

/// Settings with state in every format.
fn formats() -> [ParamsSrkl; 2] {
    let packed = ParamsSrkl {
        state: StateFormat::Compact,
        master_weights: MasterWeights::Split,
        average_format: AverageFormat::BF16,
        ..adam()
    };
    [adam(), packed]
}

fn name(i: usize) -> String {
    format!("w{i}")
}

/// Variables under names that count from `first`.
fn named(vars: &[Var], first: usize) -> Vec<(String, Var)> {
    vars.iter().enumerate().map(|(i, var)| (name(first + i), var.clone())).collect()
}

fn built(vars: &[Var], params: ParamsSrkl) -> Result<Srkl> {
    Srkl::builder().default_group(params).build(named(vars, 0))
}

/// The gradient of parameter `salt` in step `step`.
fn gradient(var: &Var, salt: usize, step: u64) -> Result<Tensor> {
    let g = noise(var.elem_count(), 0.1, 1000 + 10 * step + salt as u64);
    tensor(&g, var.dtype())?.reshape(var.shape())
}

fn step(vars: &[Var], opt: &mut Srkl, step: u64) -> Result<()> {
    let mut store = grads([]);
    for (i, var) in vars.iter().enumerate() {
        store.insert(var, gradient(var, i, step)?);
    }
    opt.step(&store)
}

/// The contents of a state, comparable.
type Contents = (BTreeMap<String, String>, BTreeMap<String, Vec<u64>>);

fn contents(state: &SrklState) -> Result<Contents> {
    let metadata = state.metadata().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut tensors = BTreeMap::new();
    for (name, tensor) in state.tensors()? {
        let bits = match tensor.dtype() {
            DType::U8 | DType::I16 => {
                values(&tensor)?.into_iter().map(f64::to_bits).collect::<Vec<_>>()
            }
            _ => bits(&tensor)?,
        };
        tensors.insert(name, bits);
    }
    Ok((metadata, tensors))
}

/// All that training goes on from.
fn everything(vars: &[Var], opt: &mut Srkl) -> Result<(Vec<Vec<u64>>, Contents)> {
    let vars = vars.iter().map(|var| bits(var)).collect::<Result<_>>()?;
    Ok((vars, contents(&opt.state()?)?))
}

#[test]
fn the_state_in_memory_is_that_of_the_file() -> Result<()> {
    for dtype in FLOATS {
        for params in formats() {
            let vars = noisy_vars(&SIZES_HERE, 1., dtype)?;
            let mut opt = built(&vars, params)?;
            (0..3).try_for_each(|i| step(&vars, &mut opt, i))?;
            let file = tempfile::NamedTempFile::new()?;
            opt.save(file.path())?;
            let (state, bytes) = (opt.state()?, std::fs::read(file.path())?);
            let written = state.to_safetensors()?;
            let parsed = |bytes: &[u8]| -> Result<_> {
                let (_, header) = SafeTensors::read_metadata(bytes)?;
                let metadata: BTreeMap<_, _> =
                    header.metadata().clone().unwrap_or_default().into_iter().collect();
                let tensors = SafeTensors::deserialize(bytes)?;
                let tensors = tensors.tensors().into_iter();
                let entry = |(name, t): (String, safetensors::tensor::TensorView)| {
                    (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))
                };
                Ok((metadata, tensors.map(entry).collect::<BTreeMap<_, _>>()))
            };
            assert!(parsed(&written)? == parsed(&bytes)?, "{dtype:?}");
            let read = SrklState::from_safetensors(&bytes)?;
            let made = SrklState::from_tensors(state.metadata().clone(), state.tensors()?)?;
            for other in [&read, &made] {
                assert!(parsed(&other.to_safetensors()?)? == parsed(&bytes)?, "{dtype:?}");
            }
            let after = |opt: &mut Srkl| {
                step(&vars, opt, 3)?;
                everything(&vars, opt)
            };
            let snapshot = opt.snapshot()?;
            let expected = after(&mut opt)?;
            for state in [read, made] {
                opt.restore(&snapshot)?;
                opt.load_state(&state)?;
                assert!(after(&mut opt)? == expected, "{dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_restored_run_has_the_same_bits() -> Result<()> {
    for dtype in FLOATS {
        for params in formats() {
            // Without names, and two parameters of equal values.
            let mut vars = noisy_vars(&SIZES_HERE, 1., dtype)?;
            vars.push(Var::from_tensor(&vars[1].copy()?)?);
            let mut opt = Srkl::new(vars.clone(), params)?;
            (0..3).try_for_each(|i| step(&vars, &mut opt, i))?;
            vars[3].set(&vars[1].copy()?)?;
            let snapshot = opt.snapshot()?;
            let at_snapshot = everything(&vars, &mut opt)?;
            let run = |opt: &mut Srkl| {
                (3..6).try_for_each(|i| step(&vars, opt, i))?;
                everything(&vars, opt)
            };
            let expected = run(&mut opt)?;
            opt.set_learning_rate(100.);
            opt.restore(&snapshot)?;
            assert!(everything(&vars, &mut opt)? == at_snapshot);
            assert!(run(&mut opt)? == expected, "{dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn a_state_that_does_not_fit_changes_nothing() -> Result<()> {
    let vars = noisy_vars(&SIZES_HERE, 1., DType::BF16)?;
    let mut opt = built(&vars, adam())?;
    step(&vars, &mut opt, 0)?;
    let snapshot = opt.snapshot()?;
    step(&vars, &mut opt, 1)?;
    let before = everything(&vars, &mut opt)?;
    // The parameters have moved on.
    let message = opt.load_state(snapshot.state()).unwrap_err().to_string();
    assert!(message.contains("load the model's parameters"), "{message}");
    let other = built(&noisy_vars(&SIZES_HERE[..2], 1., DType::BF16)?, adam())?.snapshot()?;
    let message = opt.restore(&other).unwrap_err().to_string();
    assert!(message.contains("parameter `w2`"), "{message}");
    let tensors = snapshot.state().tensors()?.into_iter().filter(|(name, _)| name != "w1.v");
    let lacking = SrklState::from_tensors(snapshot.state().metadata().clone(), tensors)?;
    for (i, var) in vars.iter().enumerate() {
        var.set(snapshot.parameter(&name(i)).unwrap())?;
    }
    let message = opt.load_state(&lacking).unwrap_err().to_string();
    assert!(message.contains("v of `w1`"), "{message}");
    opt.load_state(snapshot.state())?;
    step(&vars, &mut opt, 1)?;
    assert!(everything(&vars, &mut opt)? == before);
    assert!(SrklState::from_safetensors(&[0; 20]).is_err());
    assert!(SrklState::from_tensors(Default::default(), []).is_err());
    Ok(())
}

/// The moments of Adam by their formulas, in f64; packed ones are rounded at random, to 8 bits, so their mean is closer.
#[test]
fn moments_can_be_read() -> Result<()> {
    for (params, tolerance) in formats().into_iter().zip([1e-4, 0.25]) {
        let vars = noisy_vars(&SIZES_HERE, 1., DType::BF16)?;
        let mut opt = built(&vars, params)?;
        let (mut m, mut v) = (vec![0.; 5000], vec![0.; 5000]);
        for i in 0..3 {
            let g = values(&gradient(&vars[0], 0, i)?)?;
            for ((m, v), g) in m.iter_mut().zip(&mut v).zip(g) {
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
            }
            step(&vars, &mut opt, i)?;
        }
        let state = opt.state()?;
        for (kind, expected) in [("m", m), ("v", v)] {
            let found = state.get("w0", kind)?.unwrap();
            assert_eq!((found.dtype(), found.dims()), (DType::F32, &[5000][..]));
            assert_eq!(bits(&found)?, bits(&opt.state_of("w0", kind)?.unwrap())?);
            let largest = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
            let all = values(&found)?;
            let (mean, sum) = (all.iter().sum::<f64>(), expected.iter().sum::<f64>());
            assert!(kind == "m" || (mean / sum - 1.).abs() < 0.02, "{mean} {sum}");
            for (found, expected) in all.iter().zip(&expected) {
                let off = (found - expected).abs() / largest;
                assert!(off < tolerance, "{kind}: {found} {expected} {largest}");
            }
        }
        let master = opt.state_of("w0", "master")?.unwrap().to_vec1::<f32>()?;
        assert_eq!(Some(master), opt.master("w0")?);
        assert!(opt.state_of("w0", "q")?.is_none() && opt.state_of("w7", "m")?.is_none());
        assert!(state.get("w0", "momentum").is_err() && opt.state_of("w0", "momentum").is_err());
    }
    Ok(())
}

#[test]
fn copies_go_on_with_the_same_bits() -> Result<()> {
    for dtype in FLOATS {
        for params in formats() {
            let vars = noisy_vars(&SIZES_HERE, 1., dtype)?;
            let mut opt = built(&vars, params)?;
            (0..3).try_for_each(|i| step(&vars, &mut opt, i))?;
            opt.freeze(|name| name == "w1")?;
            opt.set_learning_rate(0.03);
            let others = noisy_vars(&SIZES_HERE, 7., dtype)?;
            let mut copy = opt.copy_to(named(&others, 0))?;
            for i in 3..6 {
                step(&vars, &mut opt, i)?;
                step(&others, &mut copy, i)?;
            }
            assert!(everything(&vars, &mut opt)? == everything(&others, &mut copy)?);
            assert_eq!(copy.frozen(), ["w1"]);
        }
    }
    Ok(())
}

/// With each curvature measured by itself: a parameter without a gradient has no estimate, in the middle between measurements.
#[test]
fn resumed_and_copied_runs_measure_when_the_first_does() -> Result<()> {
    let measure = Measure { every: 10, first: 2, ..Measure::default() };
    let params = ParamsSrkl { scope: Scope::Tensor, measure, ..ParamsSrkl::braked_adam() };
    let loss = |vars: &[Var]| {
        let all: Vec<_> = vars.iter().map(|v| v.sqr()?.sum_all()).collect::<Result<_>>()?;
        // The last has a gradient of 0. (A factor that is no tensor would leave it without one.)
        let zero = tensor(&[0.], DType::F32)?.reshape(())?;
        (&all[0] + &all[1])? + (&all[2] * &zero)?
    };
    let train = |vars: &[Var], opt: &mut Srkl, steps: usize| -> Result<Vec<bool>> {
        let step = |_| {
            let measures = opt.measuring();
            opt.backward_step_with(|| loss(vars)).map(|_| measures)
        };
        (0..steps).map(step).collect()
    };
    let vars = noisy_vars(&SIZES_HERE, 1., DType::F32)?;
    let mut opt = built(&vars, params.clone())?;
    train(&vars, &mut opt, 5)?;
    let snapshot = opt.snapshot()?;
    let expected = train(&vars, &mut opt, 20)?;
    assert_eq!(expected.iter().filter(|measures| **measures).count(), 2);
    let end = everything(&vars, &mut opt)?;

    opt.restore(&snapshot)?;
    let others = noisy_vars(&SIZES_HERE, 7., DType::F32)?;
    let mut copy = opt.copy_to(named(&others, 0))?;
    assert_eq!(train(&others, &mut copy, 20)?, expected);
    assert!(everything(&others, &mut copy)? == end);
    let mut new = built(&vars, params)?;
    for resumed in [&mut opt, &mut new] {
        resumed.restore(&snapshot)?;
        assert_eq!(train(&vars, resumed, 20)?, expected);
        assert!(everything(&vars, resumed)? == end);
    }
    Ok(())
}

/// Nothing measures where all that would be measured stands still, and what comes back to life is measured at once.
#[test]
fn what_stands_still_is_not_measured() -> Result<()> {
    let measure = Measure { every: 1000, first: 1, ..Measure::default() };
    let braked = |lr| ParamsSrkl { lr, scope: Scope::Tensor, measure, ..ParamsSrkl::braked_adam() };
    let loss = |vars: &[Var]| vars[0].sqr()?.sum_all()? + vars[1].sqr()?.sum_all()?;
    let build = |vars: &[Var], lr| {
        Srkl::builder()
            .default_group(ParamsSrkl::adamw(0.1))
            .group("braked", braked(lr), |name, _| name == "w1")
            .build(named(vars, 0))
    };
    for way in 0..3 {
        let vars = noisy_vars(&[300, 20], 1., DType::F32)?;
        let mut opt = build(&vars, if way == 0 { 0. } else { 10. })?;
        match way {
            1 => opt.freeze_group("braked")?,
            2 => _ = opt.remove_parameters(|name| name == "w1")?,
            _ => {}
        }
        for _ in 0..3 {
            assert!(!opt.measuring());
            opt.backward_step(&loss(&vars)?)?;
        }
        let before = bits(&vars[1])?;
        match way {
            0 => opt.set_params("braked", braked(10.))?,
            1 => opt.unfreeze_group("braked")?,
            _ => opt.add_parameters("braked", named(&vars[1..], 1))?,
        }
        assert!(opt.measuring());
        opt.backward_step_with(|| loss(&vars))?;
        opt.backward_step(&loss(&vars)?)?;
        assert!(bits(&vars[1])? != before);
        // What moves already is not measured for that.
        opt.unfreeze(|_| true)?;
        opt.add_parameters(DEFAULT_GROUP, named(&noisy_vars(&[5], 1., DType::F32)?, 7))?;
        assert!(!opt.measuring());
    }
    Ok(())
}

/// A group that begins to measure beside one that does is measured at once: without an estimate it would stand still.
#[test]
fn another_group_begins_to_measure() -> Result<()> {
    let measure = Measure { every: 1000, first: 1, ..Measure::default() };
    let braked = ParamsSrkl { scope: Scope::Tensor, measure, ..ParamsSrkl::braked_adam() };
    let plain = ParamsSrkl { scope: Scope::Tensor, measure, ..ParamsSrkl::adamw(0.1) };
    let vars = noisy_vars(&[300, 20], 1., DType::F32)?;
    let mut opt = Srkl::builder()
        .default_group(braked.clone())
        .group("plain", plain, |name, _| name == "w1")
        .build(named(&vars, 0))?;
    let loss = || vars[0].sqr()?.sum_all()? + vars[1].sqr()?.sum_all()?;
    for _ in 0..3 {
        opt.backward_step_with(loss)?;
    }
    assert!(!opt.measuring());
    opt.set_params("plain", braked)?;
    assert!(opt.measuring());
    opt.backward_step_with(loss)?;
    let before = bits(&vars[1])?;
    opt.backward_step(&loss()?)?;
    assert!(bits(&vars[1])? != before);
    Ok(())
}

/// A frozen parameter brakes no other by the norm that was measured of it before.
#[test]
fn frozen_rows_do_not_brake() -> Result<()> {
    let params = ParamsSrkl { scope: Scope::Global, ..ParamsSrkl::hessian() };
    let run = |freezes: bool| -> Result<Option<f64>> {
        let vars = noisy_vars(&[40, 10], 1., DType::F32)?;
        let list = named(&vars, 0);
        let mut opt = Srkl::builder().default_group(params.clone()).build(list)?;
        // The first is steep.
        let loss = || (vars[0].sqr()?.sum_all()? * 1e3)? + vars[1].sqr()?.sum_all()?;
        opt.backward_step_with(loss)?;
        if freezes {
            opt.freeze(|name| name == "w0")?;
        }
        for _ in 0..4 {
            opt.request_measurement();
            opt.backward_step_with(loss)?;
        }
        Ok(opt.telemetry()?[1].curvature)
    };
    let (frozen, both) = (run(true)?.unwrap(), run(false)?.unwrap());
    // Half the squared norm of the rows of the second alone: 2 in each element.
    assert!(frozen < 2.5 * 10f64.sqrt() && both > 1e3, "{frozen} {both}");
    Ok(())
}

/// Of two parameters that nothing tells apart but that one is frozen.
#[test]
fn a_match_by_value_sees_what_is_frozen() -> Result<()> {
    let zeros = || -> Result<Vec<Var>> { (0..2).map(|_| var(&[0.; 3], DType::F32)).collect() };
    let file = tempfile::NamedTempFile::new()?;
    let mut opt = Srkl::new(zeros()?, ParamsSrkl::adamw(0.1))?;
    opt.save(file.path())?;
    Srkl::new(zeros()?, ParamsSrkl::adamw(0.1))?.load(file.path())?;
    opt.freeze(|name| name == "1")?;
    opt.save(file.path())?;
    let mut other = Srkl::new(zeros()?, ParamsSrkl::adamw(0.1))?;
    assert_error(other.load(file.path()), &["\"0\", \"1\"", "nothing tells"]);
    Ok(())
}

/// A snapshot of other parameters is refused, whether they have come or gone.
#[test]
fn a_snapshot_of_other_parameters_changes_nothing() -> Result<()> {
    let vars = noisy_vars(&SIZES_HERE, 1., DType::F32)?;
    let mut opt = built(&vars[..2], adam())?;
    step(&vars[..2], &mut opt, 0)?;
    let two = opt.snapshot()?;
    opt.add_parameters(DEFAULT_GROUP, named(&vars[2..], 2))?;
    step(&vars, &mut opt, 1)?;
    let three = opt.snapshot()?;
    for (snapshot, gone, named) in [(two, None, "w2"), (three, Some("w0"), "w0")] {
        if let Some(gone) = gone {
            opt.remove_parameters(|name| name == gone)?;
        }
        let before = everything(&vars, &mut opt)?;
        assert_error(opt.restore(&snapshot), &[named]);
        assert!(everything(&vars, &mut opt)? == before);
    }
    Ok(())
}

/// State of every format into one of every other, in part as in whole; and what can't be read changes nothing.
#[test]
fn formats_are_converted_in_part_as_in_whole() -> Result<()> {
    for (from, to) in [(0, 1), (1, 0), (1, 1)] {
        let vars = noisy_vars(&SIZES_HERE, 1., DType::BF16)?;
        let mut opt = built(&vars, formats()[from].clone())?;
        (0..3).try_for_each(|i| step(&vars, &mut opt, i))?;
        let state = opt.state()?;
        let mut whole = built(&vars, formats()[to].clone())?;
        whole.load_state(&state)?;
        let mut part = built(&vars, formats()[to].clone())?;
        let report = part.load_state_matching(&state)?;
        assert_eq!(report.taken.len(), vars.len());
        assert!(contents(&part.state()?)?.1 == contents(&whole.state()?)?.1, "{from} {to}");

        let before = contents(&part.state()?)?;
        let tensors = state.tensors()?.into_iter().filter(|(name, _)| !name.starts_with("w2.m"));
        let torn = SrklState::from_tensors(state.metadata().clone(), tensors)?;
        assert!(part.load_state_matching(&torn).is_err());
        assert!(contents(&part.state()?)? == before);
    }
    Ok(())
}

/// What was measured keeps its age; the frozen stay frozen, with the state that was loaded.
#[test]
fn estimates_and_frozen_parameters_in_part() -> Result<()> {
    let vars = noisy_vars(&[300, 20], 1., DType::F32)?;
    let loss = || vars[0].sqr()?.sum_all()? + vars[1].sqr()?.sum_all()?;
    let params = ParamsSrkl { scope: Scope::Tensor, ..ParamsSrkl::braked_adam() };
    let mut opt = built(&vars, params.clone())?;
    opt.set_measure(Measure { every: 1000, first: 3, ..Measure::default() })?;
    for _ in 0..7 {
        opt.backward_step_with(loss)?;
    }
    let age = |opt: &Srkl| -> Result<Vec<_>> {
        Ok(opt.telemetry()?.into_iter().map(|t| t.estimate_age).collect())
    };
    assert_eq!(age(&opt)?, [Some(4), Some(4)]);
    let state = opt.state()?;
    let mut other = built(&vars, params)?;
    for _ in 0..6 {
        other.backward_step_with(loss)?;
    }
    other.freeze(|name| name == "w1")?;
    let m = opt.state_of("w1", "m")?.unwrap();
    let report = other.load_state_matching(&state)?;
    assert_eq!(report.taken, ["w0", "w1"]);
    assert_eq!((age(&other)?, other.frozen()), (age(&opt)?, vec!["w1"]));
    let before = bits(&vars[1])?;
    other.backward_step_with(loss)?;
    assert!(bits(&vars[1])? == before);
    assert!(bits(&other.state_of("w1", "m")?.unwrap())? == bits(&m)?);
    Ok(())
}

/// A learning rate that a schedule would take out of range is refused where it is set, and so is nothing later.
#[test]
fn settings_fit_the_schedule() -> Result<()> {
    let vars = noisy_vars(&SIZES_HERE, 1., DType::F32)?;
    let mut opt = built(&vars, adam())?;
    opt.set_schedule(Some(LrSchedule::Linear { from: 0., to: 1e308, steps: 10 }))?;
    assert_error(opt.set_params(DEFAULT_GROUP, ParamsSrkl { lr: 1e3, ..adam() }), &["schedule"]);
    opt.copy_to(named(&noisy_vars(&SIZES_HERE, 7., DType::F32)?, 0))?;
    Ok(())
}

/// A state that is not as `save` writes it is an error, whichever way it is read.
#[test]
fn states_of_strange_shapes() -> Result<()> {
    let vars = noisy_vars(&[5000], 1., DType::F32)?;
    let params = ParamsSrkl { state: StateFormat::Compact, ..ParamsSrkl::adamw(0.1) };
    let mut opt = built(&vars, params)?;
    step(&vars, &mut opt, 0)?;
    let state = opt.state()?;
    let mut tensors = state.tensors()?;
    tensors.retain(|name, _| !name.starts_with("w0.v"));
    tensors.insert("w0.v".to_string(), tensor(&[1.; 10], DType::F32)?);
    let strange = SrklState::from_tensors(state.metadata().clone(), tensors)?;
    assert_error(strange.get("w0", "m"), &["w0"]);
    assert!(opt.load_state(&strange).is_err());
    // More steps than there are numbers.
    let mut metadata = state.metadata().clone();
    metadata.insert("steps".to_string(), u64::MAX.to_string());
    metadata.insert("skipped_steps".to_string(), "1".to_string());
    let strange = SrklState::from_tensors(metadata, state.tensors()?)?;
    assert_error(opt.load_state_matching(&strange), &["`steps`"]);
    Ok(())
}

#[test]
fn variables_that_are_no_copies_stay_as_they_are() -> Result<()> {
    let vars = noisy_vars(&SIZES_HERE, 1., DType::F32)?;
    let mut opt = built(&vars, adam())?;
    let others = noisy_vars(&SIZES_HERE, 7., DType::F32)?;
    let more = noisy_vars(&[1, 9, 4100, 3], 7., DType::F32)?;
    let before: Vec<_> = others.iter().chain(&more).map(|v| bits(v)).collect::<Result<_>>()?;
    let with = |i: usize, var: &Var| {
        let mut others = named(&others, 0);
        others[i].1 = var.clone();
        others
    };
    let cases = [
        (named(&others[..2], 0), "no variable of this name"),
        (with(0, &more[0]), "[5000]"),
        (with(2, &vars[2]), "that of `w2` already"),
        ([named(&others, 0), named(&more[3..], 3)].concat(), "no parameter is named `w3`"),
        ([named(&others, 0), named(&more[3..], 0)].concat(), "two variables are named `w0`"),
    ];
    for (named, reason) in cases {
        let message = opt.copy_to(named).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
    let after: Vec<_> = others.iter().chain(&more).map(|v| bits(v)).collect::<Result<_>>()?;
    assert!(before == after);
    Ok(())
}

#[test]
fn what_matches_is_loaded() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let vars = noisy_vars(&SIZES_HERE, 1., dtype)?;
        let mut opt = built(&vars, adam())?;
        (0..3).try_for_each(|i| step(&vars, &mut opt, i))?;
        let state = opt.state()?;
        let file = tempfile::NamedTempFile::new()?;
        opt.save(file.path())?;

        // w0 goes on, w1 has another shape, w2 is gone, w9 is new.
        let body = Var::from_tensor(&vars[0].copy()?)?;
        let (head, new) = (var(&noise(4, 1., 5), dtype)?, var(&noise(6, 1., 6), dtype)?);
        let list = [("w0", &body), ("w1", &head), ("w9", &new)];
        let list = list.map(|(name, var)| (name.to_string(), var.clone()));
        let mut tuned = Srkl::builder().default_group(adam()).build(list.clone())?;
        // What is not taken keeps the state that it has.
        let mut first = grads([(&body, gradient(&body, 7, 7)?)]);
        first.insert(&head, gradient(&head, 8, 7)?);
        tuned.step(&first)?;
        body.set(&vars[0].copy()?)?;
        let untaken = contents(&tuned.state()?)?.1;
        let report = tuned.load_matching(file.path())?;
        assert_eq!(
            (&report.taken[..], &report.missing[..]),
            (&["w0".into()][..], &["w9".into()][..])
        );
        assert_eq!(report.left, ["w2"]);
        let [(name, reason)] = &report.mismatched[..] else { panic!("{report:?}") };
        assert!(name == "w1" && reason.contains("shape=[4]") && reason.contains("shape=[9]"));
        assert_eq!(tuned.steps()?, 1);

        let loaded = contents(&tuned.state()?)?.1;
        assert!(loaded["w0.m"] == contents(&state)?.1["w0.m"]);
        for kind in ["m", "v", "average"].map(|kind| format!("w1.{kind}")) {
            assert!(loaded[&kind] == untaken[&kind], "{kind}");
        }
        assert!(untaken["w1.m"].iter().any(|bits| *bits != 0));
        // The moments, and their bias corrections.
        step(&vars, &mut opt, 3)?;
        let mut store = grads([(&body, gradient(&body, 0, 3)?)]);
        store.insert(&head, gradient(&head, 1, 3)?);
        tuned.step(&store)?;
        assert!(bits(&body)? == bits(&vars[0])?);

        // In memory the same; nothing is changed by a file that is broken, or without names.
        let mut again = Srkl::builder().default_group(adam()).build(list.clone())?;
        let before = contents(&again.state()?)?;
        if dtype == DType::BF16 {
            // The parameter has moved on.
            assert!(again.load_state_matching(&state).is_err());
        } else {
            assert_eq!(again.load_state_matching(&state)?, report);
            let mut again = Srkl::builder().default_group(adam()).build(list)?;
            let places = Srkl::new(vars.clone(), adam())?.state()?;
            assert!(again.load_state_matching(&places).is_err());
            std::fs::write(file.path(), [0; 30])?;
            assert!(again.load_matching(file.path()).is_err());
            assert!(contents(&again.state()?)? == before);
        }
    }
    Ok(())
}

/// Frozen in steps 2 and 3, whose gradients would be refused: as if there had been no gradient in these.
#[test]
fn frozen_parameters_stay_and_go_on() -> Result<()> {
    for dtype in FLOATS {
        for params in formats() {
            let params = ParamsSrkl { max_grad_norm: Some(0.5), ..params };
            let vars = noisy_vars(&SIZES_HERE, 1., dtype)?;
            let expected = noisy_vars(&SIZES_HERE, 1., dtype)?;
            let mut opt = built(&vars, params.clone())?;
            let mut reference = built(&expected, params)?;
            for i in 0..6 {
                let frozen = (2..4).contains(&i);
                match i {
                    2 => opt.freeze(|name| name == "w0")?,
                    4 => opt.unfreeze(|name| name == "w0")?,
                    _ => {}
                }
                assert_eq!(opt.frozen().len(), frozen as usize);
                let (mut store, mut other) = (grads([]), grads([]));
                for (salt, (a, b)) in vars.iter().zip(&expected).enumerate() {
                    if salt > 0 || !frozen {
                        store.insert(a, gradient(a, salt, i)?);
                        other.insert(b, gradient(b, salt, i)?);
                    } else {
                        store.insert(a, tensor(&[f64::NAN, 1.], dtype)?);
                    }
                }
                if i == 3 {
                    // A checkpoint has it; an older one doesn't tell.
                    let state = opt.state()?;
                    opt.unfreeze(|_| true)?;
                    opt.load_state(&state)?;
                    assert_eq!(opt.frozen(), ["w0"]);
                    let mut metadata = state.metadata().clone();
                    metadata.retain(|key, _| !key.starts_with("frozen."));
                    opt.load_state(&SrklState::from_tensors(metadata, state.tensors()?)?)?;
                    assert_eq!(opt.frozen(), ["w0"]);
                }
                opt.step(&store)?;
                reference.step(&other)?;
                assert_eq!(opt.grad_norm()?, reference.grad_norm()?);
            }
            assert!(everything(&vars, &mut opt)? == everything(&expected, &mut reference)?);
        }
    }
    Ok(())
}

#[test]
fn groups_freeze_and_settings_change_meanwhile() -> Result<()> {
    let vars = [noisy_vars(&[64], 1., DType::F32)?, noisy_vars(&[9], 1., DType::F32)?].concat();
    let mut opt = Srkl::builder()
        .default_group(ParamsSrkl::adamw(0.1))
        .group("small", ParamsSrkl::adamw(0.1), |_, var| var.elem_count() < 10)
        .build(named(&vars, 0))?;
    opt.freeze_group("small")?;
    assert_eq!(opt.frozen(), ["w1"]);
    // The frozen part of a group has its settings, but for `lr`, and keeps it still.
    opt.set_params("small", ParamsSrkl::adamw(0.3))?;
    let before = bits(&vars[1])?;
    step(&vars, &mut opt, 0)?;
    assert!(bits(&vars[1])? == before);
    assert_eq!(opt.params("small").unwrap().lr, 0.3);
    opt.freeze_group(DEFAULT_GROUP)?;
    assert_eq!(opt.learning_rate(), 0.1);
    opt.unfreeze_group("small")?;
    let was = values(&vars[1])?;
    step(&vars, &mut opt, 1)?;
    // The first step of Adam is `lr` long.
    let g = values(&gradient(&vars[1], 1, 1)?)?;
    for ((was, is), g) in was.iter().zip(values(&vars[1])?).zip(g) {
        let expected = was - 0.3 * (g.signum() + 0.01 * was);
        assert!((is - expected).abs() < 1e-5, "{is} {expected}");
    }
    for failed in [
        opt.freeze_group("large"),
        opt.freeze(|name| name == "w2"),
        opt.unfreeze(|name| name == "w2"),
    ] {
        assert!(failed.is_err());
    }
    assert_eq!(opt.frozen(), ["w0"]);
    Ok(())
}

/// In a model whose curvature is measured.
#[test]
fn measurements_leave_frozen_parameters_out() -> Result<()> {
    for scope in [Scope::Tensor, Scope::Global] {
        let vars = noisy_vars(&[300, 20], 1., DType::F32)?;
        let params = ParamsSrkl { scope, ..ParamsSrkl::braked_adam() };
        let loss = |vars: &[Var]| {
            let all: Vec<_> = vars.iter().map(|v| v.sqr()?.sum_all()).collect::<Result<_>>()?;
            Tensor::stack(&all, 0)?.sum_all()
        };
        let mut opt = built(&vars, params)?;
        opt.freeze(|name| name == "w1")?;
        opt.set_measure(Measure { every: 1000, first: 1, ..Measure::default() })?;
        let before = bits(&vars[1])?;
        for _ in 0..20 {
            opt.backward_step_with(|| loss(&vars))?;
        }
        assert!(bits(&vars[1])? == before);
        assert!(!opt.measuring());
        let frozen = &opt.telemetry()?[1];
        assert_eq!(frozen.phi, None);
        opt.unfreeze(|name| name == "w1")?;
        // Of all parameters there is an estimate, of each by itself not of this one.
        assert_eq!(opt.measuring(), scope == Scope::Tensor);
        opt.backward_step_with(|| loss(&vars))?;
        opt.backward_step_with(|| loss(&vars))?;
        assert!(bits(&vars[1])? != before);

        let more = noisy_vars(&[50], 1., DType::F32)?;
        opt.add_parameters(DEFAULT_GROUP, named(&more, 2))?;
        assert!(opt.measuring());
        let all = [&vars[..], &more].concat();
        let before = bits(&more[0])?;
        opt.backward_step_with(|| loss(&all))?;
        opt.backward_step_with(|| loss(&all))?;
        assert!(bits(&more[0])? != before);
        // A step that waits for its measurement waits for all parameters.
        opt.request_measurement();
        opt.step(&loss(&all)?.backward()?)?;
        assert!(opt.freeze(|_| true).is_err() && opt.remove_parameters(|_| true).is_err());
        assert!(opt.add_parameters(DEFAULT_GROUP, named(&vars, 7)).is_err());
        assert!(opt.state().is_err());
        opt.observe(&loss(&all)?.backward()?)?;
        opt.remove_parameters(|name| name == "w0")?;
        opt.backward_step_with(|| loss(&all))?;
    }
    Ok(())
}

/// Parameters that come and go leave no trace in the others, and start as in an optimizer of their own.
#[test]
fn parameters_come_and_go() -> Result<()> {
    for dtype in FLOATS {
        for params in
            [formats().to_vec(), vec![ParamsSrkl::reference(), ParamsSrkl::muon(0.1)]].concat()
        {
            let (vars, alone) =
                (noisy_vars(&SIZES_HERE, 1., dtype)?, noisy_vars(&SIZES_HERE, 1., dtype)?);
            let shape = |vars: &[Var]| -> Result<Vec<Var>> {
                let matrix = Var::from_tensor(&vars[0].reshape((100, 50))?.copy()?)?;
                Ok([&[matrix], &vars[1..]].concat())
            };
            let (vars, alone) = (shape(&vars)?, shape(&alone)?);
            let mut opt = built(&vars[1..2], params.clone())?; // `w0` here.
            let mut kept = built(&alone[1..2], params.clone())?;
            // Behind another, since the place decides about random numbers.
            let first = Var::from_tensor(&vars[1].copy()?)?;
            let list = [("first", &first), ("a", &alone[0])];
            let list = list.map(|(name, var)| (name.to_string(), var.clone()));
            let mut new = Srkl::builder().default_group(params.clone()).build(list)?;
            for i in 0..8 {
                if i == 2 {
                    let list = [("a", 0), ("b", 2)].map(|(n, i)| (n.to_string(), vars[i].clone()));
                    opt.add_parameters(DEFAULT_GROUP, list)?;
                    assert_eq!(opt.telemetry()?[1].direction, new.telemetry()?[1].direction);
                }
                if i == 5 {
                    let removed = opt.remove_parameters(|name| name == "b" || name == "w0")?;
                    assert_eq!(removed, ["w0", "b"]);
                    new.remove_parameters(|name| name == "first")?;
                }
                step(&vars, &mut opt, i)?;
                let mut store = grads([(&first, gradient(&first, 1, i)?)]);
                if i >= 2 {
                    store.insert(&alone[0], gradient(&alone[0], 0, i)?);
                }
                new.step(&store)?;
                if i < 5 {
                    step(&alone, &mut kept, i)?;
                }
                assert_eq!(opt.steps()?, i + 1);
                assert!(bits(&vars[1])? == bits(&alone[1])?, "{dtype:?} {i}");
                assert!(bits(&vars[0])? == bits(&alone[0])?, "{dtype:?} {i}");
            }
            let (found, expected) = (opt.state()?, new.state()?);
            assert!(contents(&found)?.1 == contents(&expected)?.1);
            assert_eq!(found.parameters(), ["a"]);
        }
    }
    Ok(())
}

#[test]
fn parameters_that_can_not_come_change_nothing() -> Result<()> {
    let vars = noisy_vars(&SIZES_HERE, 1., DType::BF16)?;
    let more = noisy_vars(&[7, 8], 1., DType::BF16)?;
    let mut opt = built(&vars, adam())?;
    step(&vars, &mut opt, 0)?;
    let before = everything(&vars, &mut opt)?;
    let twice = vec![("x".to_string(), more[0].clone()), ("y".to_string(), more[0].clone())];
    let cases = [
        ("none", named(&more, 3), "no parameter group `none`"),
        (DEFAULT_GROUP, named(&more, 2), "two parameters are named `w2`"),
        (DEFAULT_GROUP, named(&vars[..1], 3), "the same variable"),
        (DEFAULT_GROUP, twice, "the same variable"),
    ];
    for (group, named, reason) in cases {
        let message = opt.add_parameters(group, named).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
    assert!(opt.remove_parameters(|name| name == "w9").is_err());
    assert!(everything(&vars, &mut opt)? == before);
    // Gradients that were summed belong to the list of parameters as it is.
    opt.accumulate(&grads([(&vars[0], gradient(&vars[0], 0, 1)?)]))?;
    assert!(opt.add_parameters(DEFAULT_GROUP, named(&more, 3)).is_err());
    opt.step_accumulated()?;
    opt.add_parameters(DEFAULT_GROUP, named(&more, 3))?;
    Ok(())
}

#[test]
fn a_varmap_with_tied_weights_is_copied() -> Result<()> {
    let tied = |scale: f64| -> Result<VarMap> {
        let map = VarMap::new();
        let vars = noisy_vars(&[30, 4], scale, DType::F32)?;
        let mut data = map.data().lock().unwrap();
        for (name, i) in [("embed", 0), ("head", 0), ("bias", 1)] {
            data.insert(name.to_string(), vars[i].clone());
        }
        drop(data);
        Ok(map)
    };
    let (map, other) = (tied(1.)?, tied(2.)?);
    let mut opt = Srkl::from_varmap(&map, adam())?;
    let copy = opt.copy_to_varmap(&other)?;
    assert_eq!(copy.telemetry()?.len(), 2);
    let of = |map: &VarMap| bits(&map.data().lock().unwrap()["head"]);
    assert!(of(&map)? == of(&other)?);
    opt.freeze(|name| name == "head")?;
    assert_eq!(opt.frozen(), ["embed"]);
    Ok(())
}

/// Two ranks that have the state of their shards alone do it as one process.
#[test]
fn ranks_do_it_together() -> Result<()> {
    fn run(rank: Option<Threads>) -> Result<Vec<u64>> {
        let vars = noisy_vars(&[20_000, 9000], 1., DType::BF16)?;
        let mut builder = Srkl::builder().default_group(adam());
        if let Some(rank) = rank {
            builder = builder.collective(rank).sharded(true);
        }
        let mut opt = builder.build(named(&vars, 0))?;
        let alone = opt.world_size() == 1;
        step(&vars, &mut opt, 0)?;
        let snapshot = opt.snapshot()?;
        step(&vars, &mut opt, 1)?;
        opt.restore(&snapshot)?;
        opt.freeze(|name| name == "w1")?;
        step(&vars, &mut opt, 2)?;
        let (state, m) = (opt.state()?, opt.state_of("w0", "m")?.unwrap());
        if !alone {
            // What differs between them, and what they can't do.
            let rank = opt.rank();
            assert!(opt.unfreeze(|name| name == name_of(rank)).is_err());
            assert!(opt.add_parameters(DEFAULT_GROUP, []).is_err());
            assert!(opt.remove_parameters(|_| true).is_err());
        }
        let _ = opt.load_state_matching(&state)?;
        step(&vars, &mut opt, 3)?;
        assert_eq!(opt.frozen(), ["w1"]);
        let all = [vars[0].as_tensor(), &vars[1], &m, &state.get("w0", "average")?.unwrap()];
        let all: Vec<_> = all.into_iter().map(bits).collect::<Result<_>>()?;
        Ok(all.concat())
    }
    fn name_of(rank: usize) -> String {
        name(rank)
    }
    let expected = run(None)?;
    let ranks: Vec<_> = Threads::new(2).into_iter().map(Some).collect();
    let found: Vec<Result<Vec<u64>>> = thread::scope(|scope| {
        let ranks = ranks.into_iter().map(|rank| scope.spawn(move || run(rank)));
        ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for found in found {
        assert!(found? == expected);
    }
    Ok(())
}
