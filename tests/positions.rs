//! Checkpoints of lists without names: a parameter finds its state wherever it stands, or the file is refused.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use candle_srkl::{Average, Beta, Direction, NonFinite, ParamsSrkl, Scope, Srkl};
use common::*;

/// Several of one shape.
const SHAPES: [&[usize]; 7] = [&[70, 13], &[70], &[], &[70], &[70, 13], &[70], &[]];

/// Distinct values.
fn variables(dtype: DType) -> Result<Vec<Var>> {
    let of = |(i, shape): (usize, &&[usize])| {
        let n = shape.iter().product();
        Var::from_tensor(&tensor(&noise(n, 1., i as u64), dtype)?.reshape(*shape)?)
    };
    SHAPES.iter().enumerate().map(of).collect()
}

/// Variables of their own with the same values, as a loaded model has.
fn copies(vars: &[Var]) -> Result<Vec<Var>> {
    vars.iter().map(|var| Var::from_tensor(&var.copy()?)).collect()
}

fn in_order(vars: &[Var], order: &[usize]) -> Vec<Var> {
    order.iter().map(|i| vars[*i].clone()).collect()
}

/// Step number `step`: of each variable a gradient of its own; one without, and one with a NaN.
fn train(vars: &[Var], opt: &mut Srkl, step: u64) -> Result<()> {
    measured_step(opt, || {
        let mut store = grads([]);
        for (i, var) in vars.iter().enumerate().filter(|(i, _)| *i as u64 != step % 5) {
            let mut noise = noise(var.elem_count(), 0.1, 50 + step * 10 + i as u64);
            if step == 3 && i == 1 {
                noise[3] = f64::NAN;
            }
            let noise = tensor(&noise, var.dtype())?.reshape(var.shape())?;
            store.insert(var, (var.affine(0.3 + 0.1 * i as f64, 0.)? + noise)?);
        }
        Ok(store)
    })
}

/// All that a training has come to, variable by variable; those stand in the optimizer's list in `order`.
fn state(vars: &[Var], opt: &mut Srkl, order: &[usize]) -> Result<Vec<String>> {
    let told = opt.telemetry()?;
    let mut lines =
        vec![format!("{} {} {:?}", opt.steps()?, opt.skipped_steps()?, opt.grad_norm()?)];
    for (i, var) in vars.iter().enumerate() {
        let place = order.iter().position(|j| *j == i).unwrap();
        let (told, master) = (&told[place], master_bits(opt, &place.to_string())?);
        assert_eq!(told.name, place.to_string());
        let told = format!("{:?} {:?} {}", told.phi, told.curvature, told.skipped);
        lines.push(format!("{i} {told} {:x?} {master:x?}", bits(var)?));
    }
    if opt.params("default").unwrap().average.is_some() {
        let _averaged = opt.swap_averaged()?;
        vars.iter().try_for_each(|var| bits(var).map(|bits| lines.push(format!("{bits:x?}"))))?;
    }
    Ok(lines)
}

/// The file with other metadata.
fn rewrite(path: &Path, change: impl Fn(&mut BTreeMap<String, String>)) -> Result<()> {
    let bytes = std::fs::read(path)?;
    let tensors = safetensors::SafeTensors::deserialize(&bytes)?;
    let (mut metadata, _) = contents(path)?;
    change(&mut metadata);
    let metadata = Some(metadata.into_iter().collect());
    std::fs::write(path, safetensors::serialize(tensors.iter(), metadata)?)?;
    Ok(())
}

/// As files were before they told values.
fn strip(metadata: &mut BTreeMap<String, String>) {
    let new = ["fingerprint.", "place.", "by_position"];
    let count = metadata.len();
    metadata.retain(|key, _| !new.iter().any(|new| key.starts_with(new)));
    assert!(metadata.len() < count);
}

/// `opt` must refuse the file for these reasons, and be as it was.
#[track_caller]
fn assert_refused(opt: &mut Srkl, path: &Path, reasons: &[&str]) {
    let before = saved(opt).unwrap();
    assert_error(opt.load(path), reasons);
    assert!(saved(opt).unwrap() == before);
}

fn presets() -> Vec<ParamsSrkl> {
    let clipped = ParamsSrkl {
        lr: 0.1,
        beta: Beta::Fixed(0.5),
        scope: Scope::Global,
        max_grad_norm: Some(1.),
        ..ParamsSrkl::reference()
    };
    let average = Some(Average::Exponential(0.9));
    let all = [
        clipped,
        ParamsSrkl { lr: 0.1, ..ParamsSrkl::reference() },
        ParamsSrkl::braked_adam(),
        ParamsSrkl { average, ..ParamsSrkl::braked_adam_averaged() },
        ParamsSrkl::kinetic(),
        ParamsSrkl { average, ..ParamsSrkl::hessian() },
    ];
    let nonfinite = NonFinite::SkipBlock;
    all.map(|params| ParamsSrkl { nonfinite, ..params }).to_vec()
}

/// Lists in other orders, twice: with the bits of a training without interruption, sums over all of them included.
#[test]
fn lists_in_any_order_go_on_with_the_same_bits() -> Result<()> {
    let orders = [[6, 5, 4, 3, 2, 1, 0], [2, 3, 0, 5, 6, 1, 4], [0, 1, 2, 3, 4, 5, 6]];
    for dtype in FLOATS {
        for params in presets() {
            let list = [0, 1, 2, 3, 4, 5, 6];
            let vars = variables(dtype)?;
            let mut opt = Srkl::new(vars.clone(), params.clone())?;
            let folder = tempfile::tempdir()?;
            let file = |step: u64| folder.path().join(step.to_string());
            let mut models = vec![];
            for step in 0..15 {
                models.push(copies(&vars)?);
                opt.save(file(step))?;
                train(&vars, &mut opt, step)?;
            }
            let end = state(&vars, &mut opt, &list)?;

            for (k, order) in orders.iter().enumerate() {
                let (start, again) = [(0, 7), (5, 9), (12, 13)][k];
                let vars = copies(&models[start as usize])?;
                let mut opt = Srkl::new(in_order(&vars, order), params.clone())?;
                opt.load(file(start))?;
                for step in start..again {
                    train(&vars, &mut opt, step)?;
                }
                let second = folder.path().join("second");
                opt.save(&second)?;
                let order = orders[(k + 1) % 3];
                let vars = copies(&vars)?;
                let mut opt = Srkl::new(in_order(&vars, &order), params.clone())?;
                opt.load(&second)?;
                for step in again..15 {
                    train(&vars, &mut opt, step)?;
                }
                assert!(state(&vars, &mut opt, &order)? == end, "{dtype:?} {k}, {params:?}");
            }
        }
    }
    Ok(())
}

fn adam() -> ParamsSrkl {
    let direction = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    ParamsSrkl { lr: 0.01, direction, ..ParamsSrkl::reference() }
}

/// The steps of `vars`, whose gradients are `i + 1` times `size`.
fn uneven(vars: &[Var], opt: &mut Srkl, size: f64) -> Result<()> {
    let mut store = grads([]);
    for (i, var) in vars.iter().enumerate() {
        store.insert(var, var.ones_like()?.affine(size * (i + 1) as f64, 0.)?);
    }
    opt.step(&store)
}

/// Parameters that are equal in their values and in all of their state may go either way.
#[test]
fn equal_parameters_of_equal_state() -> Result<()> {
    for dtype in FLOATS {
        let equal = [vec![0.; 5], vec![0.; 5], vec![1.; 5], vec![1.; 5], noise(5, 1., 1)];
        let vars = equal.iter().map(|x| var(x, dtype)).collect::<Result<Vec<_>>>()?;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("state");
        let mut opt = Srkl::new(vars.clone(), adam())?;
        // The last two have moved, and alike.
        for _ in 0..3 {
            let one = vars[0].ones_like()?;
            opt.step(&grads([(&vars[2], one.clone()), (&vars[3], one.clone()), (&vars[4], one)]))?;
        }
        assert!(bits(&vars[2])? == bits(&vars[3])?);
        opt.save(&path)?;
        let copies = copies(&vars)?;
        let mut resumed = Srkl::new(in_order(&copies, &[4, 1, 3, 0, 2]), adam())?;
        resumed.load(&path)?;
        (0..3).try_for_each(|_| uneven(&vars, &mut opt, 0.1))?;
        (0..3).try_for_each(|_| uneven(&copies, &mut resumed, 0.1))?;
        for (var, copy) in vars.iter().zip(&copies) {
            assert!(bits(var)? == bits(copy)?, "{dtype:?}");
        }
        assert!(bits(&vars[0])? != bits(&vars[1])? || dtype != DType::F32);
    }
    Ok(())
}

/// Steps too small for bf16, of which masters differ: nothing tells whose is whose but names.
#[test]
fn equal_parameters_of_different_state() -> Result<()> {
    let equal = [vec![1.; 5], noise(5, 1., 1), vec![1.; 5]];
    let vars = equal.iter().map(|x| var(x, DType::BF16)).collect::<Result<Vec<_>>>()?;
    let params = ParamsSrkl { lr: 1e-5, ..ParamsSrkl::reference() };
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let named = |names: [&str; 3], order: [usize; 3], vars: &[Var]| {
        let list = names.into_iter().map(str::to_string).zip(in_order(vars, &order));
        Srkl::builder().default_group(params.clone()).build(list)
    };
    for (by_position, names) in [(true, ["0", "1", "2"]), (false, ["a", "b", "c"])] {
        let start = copies(&vars)?;
        let mut opt = match by_position {
            true => Srkl::new(start.clone(), params.clone())?,
            false => named(names, [0, 1, 2], &start)?,
        };
        uneven(&start, &mut opt, 1.)?;
        let masters = names.map(|name| opt.master(name).unwrap().unwrap());
        assert!(bits(&start[0])? == bits(&start[2])? && masters[0] != masters[2]);
        opt.save(&path)?;

        for order in [[0, 1, 2], [2, 1, 0]] {
            let mut resumed = Srkl::new(in_order(&start, &order), params.clone())?;
            let reasons = [names[0], names[2], "values are equal", "names", path.to_str().unwrap()];
            assert_refused(&mut resumed, &path, &reasons);
            // With the names that they were saved under, in any order.
            let mut resumed = named(order.map(|i| names[i]), order, &start)?;
            resumed.load(&path)?;
            for (name, master) in names.iter().zip(&masters) {
                assert_eq!(resumed.master(name)?.as_ref(), Some(master));
            }
        }
        // Names of which one is another.
        let mut resumed = named([names[0], names[1], "other"], [0, 1, 2], &start)?;
        assert_refused(&mut resumed, &path, &[if by_position { "equal" } else { "`c`" }]);
    }
    Ok(())
}

#[test]
fn parameters_of_other_values_are_refused() -> Result<()> {
    let vars = variables(DType::F32)?;
    let mut opt = Srkl::new(vars.clone(), adam())?;
    uneven(&vars, &mut opt, 1.)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    opt.save(&path)?;
    let refused = |vars: Vec<Var>, reasons: &[&str]| {
        let mut opt = Srkl::new(vars.clone(), adam()).unwrap();
        // Its state, and no value.
        opt.set_learning_rate(0.);
        uneven(&vars, &mut opt, 2.).unwrap();
        assert_refused(&mut opt, &path, reasons);
    };
    // A fresh model, whose parameters have not been loaded.
    let reasons = ["`0`", "load the model's parameters", "from_varmap"];
    refused(variables(DType::F32)?, &reasons);
    // One parameter of another value, nearly its own or that of one beside it, or of another kind.
    let with = |i: usize, other: Tensor| -> Result<Vec<Var>> {
        let mut vars = copies(&vars)?;
        vars[i] = Var::from_tensor(&other)?;
        Ok(vars)
    };
    refused(with(5, vars[5].affine(1. + 1e-7, 0.)?)?, &["`5`", "shape=[70]", "value"]);
    refused(with(1, vars[3].copy()?)?, &["`3`", "shape=[70]", "value"]);
    refused(with(2, vars[2].reshape(1)?)?, &["`2`", "shape=[1]", "none like it"]);
    refused(with(2, vars[2].to_dtype(DType::F64)?)?, &["`2`", "dtype=f64", "none like it"]);
    refused(vars[1..].to_vec(), &["6 parameters", "has 7"]);
    let more = [copies(&vars)?, vec![var(&[1.], DType::F32)?]].concat();
    refused(more, &["8 parameters", "has 7"]);
    // And as it is, it fits.
    Srkl::new(copies(&vars)?, adam())?.load(&path)
}

/// A list without names takes the state of one with names, and the other way round.
#[test]
fn from_names_to_places_and_back() -> Result<()> {
    let names = ["a", "b.weight", "b.bias", "c", "d", "0", "1"];
    for dtype in FLOATS {
        for params in presets() {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("state");
            let varmap_of = |vars: &[Var]| {
                let varmap = VarMap::new();
                let entries = names.iter().zip(vars).map(|(n, v)| (n.to_string(), v.clone()));
                varmap.data().lock().unwrap().extend(entries);
                varmap
            };
            let run = |vars: &[Var], opt: &mut Srkl, steps: std::ops::Range<u64>| -> Result<_> {
                steps.into_iter().try_for_each(|step| train(vars, opt, step))?;
                let all = vars.iter().map(|var| bits(var)).collect::<Result<Vec<_>>>()?;
                Ok((all, opt.steps()?, opt.measurements()?))
            };
            let order = [3, 1, 6, 0, 2, 5, 4];

            let vars = variables(dtype)?;
            let mut opt = Srkl::from_varmap(&varmap_of(&vars), params.clone())?;
            run(&vars, &mut opt, 0..5)?;
            opt.save(&path)?;
            let copy = copies(&vars)?;
            let mut resumed = Srkl::new(in_order(&copy, &order), params.clone())?;
            resumed.load(&path)?;
            let expected = run(&vars, &mut opt, 5..12)?;
            assert!(run(&copy, &mut resumed, 5..12)? == expected, "{dtype:?}, {params:?}");

            let vars = variables(dtype)?;
            let mut opt = Srkl::new(in_order(&vars, &order), params.clone())?;
            run(&vars, &mut opt, 0..5)?;
            opt.save(&path)?;
            let copy = copies(&vars)?;
            let mut resumed = Srkl::from_varmap(&varmap_of(&copy), params.clone())?;
            resumed.load(&path)?;
            let expected = run(&vars, &mut opt, 5..12)?;
            assert!(run(&copy, &mut resumed, 5..12)? == expected, "{dtype:?}, {params:?}");
        }
    }
    Ok(())
}

/// With names on both sides a parameter may have another value than when it was saved.
#[test]
fn names_go_before_values() -> Result<()> {
    let named = |vars: [&Var; 2]| {
        let list = [("x".to_string(), vars[0].clone()), ("y".to_string(), vars[1].clone())];
        Srkl::builder().default_group(adam()).build(list)
    };
    let (a, b) = (var(&[1., 2.], DType::F32)?, var(&[3., 4.], DType::F32)?);
    let mut opt = named([&a, &b])?;
    uneven(&[a.clone(), b.clone()], &mut opt, 1.)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    opt.save(&path)?;
    // Of each other's value, and of none.
    for other in [b.copy()?, tensor(&[9., 9.], DType::F32)?] {
        let mut resumed = named([&Var::from_tensor(&other)?, &Var::from_tensor(&a.copy()?)?])?;
        resumed.load(&path)?;
        assert_eq!(saved(&mut resumed)?.1, contents(&path)?.1);
    }
    Ok(())
}

/// A file without the new entries: places are names.
#[test]
fn files_of_before_go_by_position() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    for dtype in FLOATS {
        for params in presets() {
            let list = [0, 1, 2, 3, 4, 5, 6];
            let vars = variables(dtype)?;
            let mut opt = Srkl::new(vars.clone(), params.clone())?;
            (0..5).try_for_each(|step| train(&vars, &mut opt, step))?;
            opt.save(&path)?;
            rewrite(&path, strip)?;
            let copy = copies(&vars)?;
            let mut resumed = Srkl::new(copy.clone(), params)?;
            resumed.load(&path)?;
            (5..12).try_for_each(|step| train(&vars, &mut opt, step))?;
            (5..12).try_for_each(|step| train(&copy, &mut resumed, step))?;
            let end = state(&vars, &mut opt, &list)?;
            assert!(state(&copy, &mut resumed, &list)? == end, "{dtype:?}");
        }
    }
    // Whatever the values.
    let vars = variables(DType::F32)?;
    let mut opt = Srkl::new(vars.clone(), adam())?;
    uneven(&vars, &mut opt, 1.)?;
    opt.save(&path)?;
    rewrite(&path, strip)?;
    let mut other = Srkl::new(variables(DType::F32)?, adam())?;
    other.load(&path)?;
    assert_eq!(saved(&mut other)?.1, saved(&mut opt)?.1);
    Ok(())
}

#[test]
fn new_entries_that_make_no_sense() -> Result<()> {
    let vars = variables(DType::F32)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let cases = [
        ("fingerprint.3", None, "`fingerprint.3` is missing"),
        ("fingerprint.3", Some("0123"), "`3`"),
        ("place.3", Some("third"), "`place.3` is not a number"),
        ("place.3", Some("-1"), "`place.3` is not a number"),
        ("by_position", Some("yes"), "`by_position` is not a number"),
    ];
    for (key, value, reason) in cases {
        // With names, which then says that they count.
        let mut opt = match key {
            "by_position" => Srkl::builder().build([("x".to_string(), vars[0].clone())])?,
            _ => Srkl::new(vars.clone(), ParamsSrkl::reference())?,
        };
        opt.save(&path)?;
        rewrite(&path, |metadata| {
            metadata.remove(key).unwrap();
            metadata.extend(value.map(|value| (key.to_string(), value.to_string())));
        })?;
        assert_refused(&mut opt, &path, &[reason]);
    }
    Ok(())
}

/// ```python
/// import struct, xxhash  # 4.1.0
/// w = [1.5, -2.25, 0.0, -0.0, 3.0]
/// for c in "dfe":
///     print(xxhash.xxh3_128_hexdigest(struct.pack("<5" + c, *w)))
/// print(xxhash.xxh3_128_hexdigest(b"".join(struct.pack("<f", x)[2:] for x in w)))  # bf16
/// print(xxhash.xxh3_128_hexdigest(struct.pack("<10000f", *[i * 0.5 for i in range(10000)])))
/// print(xxhash.xxh3_128_hexdigest(b""))
/// ```
#[test]
fn value_stability_of_fingerprints() -> Result<()> {
    let w = [1.5, -2.25, 0., -0., 3.];
    let long: Vec<f64> = (0..10_000).map(|i| i as f64 * 0.5).collect();
    let cases = [
        (var(&w, DType::F64)?, "4b52e2509a62e7260bbae6df8bff1e22"),
        (var(&w, DType::F32)?, "d26af593061cc3d68d1a844d8afbeda8"),
        (var(&w, DType::F16)?, "2c394e29aba0336dc275169658fed008"),
        (var(&w, DType::BF16)?, "7eb707bb0951ed6e52b4190033cb83a5"),
        (var(&long, DType::F32)?, "f7aeb2817cb57f557e0e8b4106d81330"),
        (Var::zeros((0, 3), DType::F32, &Device::Cpu)?, "99aa06d3014798d86001c324468d497f"),
    ];
    let vars = cases.iter().map(|(var, _)| var.clone()).collect();
    let (metadata, _) = saved(&mut Srkl::new(vars, ParamsSrkl::reference())?)?;
    for (i, (_, expected)) in cases.iter().enumerate() {
        assert_eq!(metadata[&format!("fingerprint.{i}")], *expected);
        assert_eq!(metadata[&format!("place.{i}")], i.to_string());
    }
    assert_eq!(metadata["by_position"], "1");
    Ok(())
}
