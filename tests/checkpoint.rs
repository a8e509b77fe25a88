//! Checkpoints: bit-exact resume, and files that are refused with their reason and no effect.

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, Optimizer, VarMap};
use candle_srkl::{Beta, MasterWeights, NonFinite, ParamsSrkl, Scope, Srkl};
use common::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn params() -> ParamsSrkl {
    ParamsSrkl {
        lr: 0.1,
        beta: Beta::Fixed(0.5),
        weight_decay: 0.1,
        nonfinite: NonFinite::SkipBlock,
        ..ParamsSrkl::reference()
    }
}

/// Step number `step`: a schedule, a loss scale, a missing gradient and one with a NaN.
fn step(varmap: &VarMap, opt: &mut Srkl, step: u64) -> Result<()> {
    if step == 2 {
        opt.set_learning_rate(0.1 / 3.);
        opt.set_grad_scale(3.)?;
    }
    let data = varmap.data().lock().unwrap();
    let mut store = grads([]);
    for (salt, (name, shape)) in NAMES.iter().enumerate() {
        let var = &data[*name];
        if step % 4 != salt as u64 {
            let mut g = noise(var.elem_count(), 0.1, 50 + step * 10 + salt as u64);
            if step == 3 && *name == "layer.bias" {
                g[3] = f64::NAN;
            }
            store.insert(var, tensor(&g, var.dtype())?.reshape(*shape)?);
        }
    }
    opt.step(&store)
}

/// Everything that a checkpoint must bring back.
fn state(varmap: &VarMap, opt: &Srkl) -> Result<String> {
    let data = varmap.data().lock().unwrap();
    let mut lines = vec![format!(
        "{} {} {:x} {:x}",
        opt.steps()?,
        opt.skipped_steps()?,
        opt.learning_rate().to_bits(),
        opt.grad_scale().to_bits()
    )];
    for ((name, _), telemetry) in NAMES.iter().zip({
        let mut telemetry = opt.telemetry()?;
        telemetry.sort_by_key(|t| NAMES.iter().position(|(name, _)| *name == t.name));
        telemetry
    }) {
        let master = master_bits(opt, name)?;
        let bits = bits(data[*name].as_tensor())?;
        lines.push(format!("{name} {} {bits:x?} {master:x?}", telemetry.skipped));
    }
    Ok(lines.join("\n"))
}

#[test]
fn ten_steps_are_five_a_checkpoint_and_five() -> Result<()> {
    for dtype in FLOATS {
        for master_weights in [MasterWeights::Auto, MasterWeights::None] {
            let params = ParamsSrkl { master_weights, ..params() };
            let folder = tempfile::tempdir()?;
            let (model_file, state_file) =
                (folder.path().join("model"), folder.path().join("state"));

            let varmap = model(dtype)?;
            let mut opt = Srkl::from_varmap(&varmap, params.clone())?;
            for i in 0..5 {
                step(&varmap, &mut opt, i)?;
            }
            varmap.save(&model_file)?;
            opt.save(&state_file)?;
            let at_five = state(&varmap, &opt)?;
            for i in 5..10 {
                step(&varmap, &mut opt, i)?;
            }

            let mut resumed = model(dtype)?;
            resumed.load(&model_file)?;
            let mut resumed_opt = Srkl::from_varmap(&resumed, params.clone())?;
            resumed_opt.load(&state_file)?;
            assert_eq!(state(&resumed, &resumed_opt)?, at_five);
            for i in 5..10 {
                step(&resumed, &mut resumed_opt, i)?;
            }
            assert_eq!(state(&resumed, &resumed_opt)?, state(&varmap, &opt)?, "{dtype:?}");
            // The checkpoint matters: without it masters lose what the parameters can't hold.
            if dtype == DType::BF16 && master_weights == MasterWeights::Auto {
                let mut cold = model(dtype)?;
                cold.load(&model_file)?;
                let mut cold_opt = Srkl::from_varmap(&cold, params)?;
                for i in 5..10 {
                    step(&cold, &mut cold_opt, i)?;
                }
                assert_ne!(state(&cold, &cold_opt)?, state(&varmap, &opt)?);
            }
        }
    }
    Ok(())
}

/// A saved optimizer of bf16 parameters, and its file.
fn saved(folder: &Path) -> Result<(VarMap, Srkl, Vec<u8>)> {
    let varmap = model(DType::BF16)?;
    let mut opt = Srkl::from_varmap(&varmap, params())?;
    for i in 0..3 {
        step(&varmap, &mut opt, i)?;
    }
    let path = folder.join("state");
    opt.save(&path)?;
    let bytes = std::fs::read(path)?;
    Ok((varmap, opt, bytes))
}

/// `bytes` must be refused, for a reason that contains `reason`, and must change nothing.
#[track_caller]
fn assert_refused(varmap: &VarMap, opt: &mut Srkl, bytes: &[u8], reason: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let before = state(varmap, opt).unwrap();
    let message = opt.load(file.path()).expect_err(reason).to_string();
    assert!(message.contains(reason), "{reason:?} is not in {message:?}");
    let path = file.path().to_str().unwrap();
    assert!(message.contains(path), "the path is not in {message:?}");
    assert_eq!(state(varmap, opt).unwrap(), before);
}

#[test]
fn truncated_files() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (varmap, mut opt, bytes) = saved(folder.path())?;
    for len in [0, 1, 7, 8, 9, 100, bytes.len() / 2, bytes.len() - 1] {
        assert_refused(&varmap, &mut opt, &bytes[..len], "truncated");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_refused(&varmap, &mut opt, &longer, "truncated");
    opt.load(folder.path().join("state"))?;
    Ok(())
}

/// A safetensors file with this metadata and this master of `layer.bias`.
fn file(metadata: &[(&str, &str)], bias: (&[usize], f32)) -> Vec<u8> {
    let (shape, value) = bias;
    let n = shape.iter().product();
    let data: Vec<u8> = vec![value; n].into_iter().flat_map(f32::to_le_bytes).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &data);
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    safetensors::serialize([("layer.bias.master", view.unwrap())], Some(metadata)).unwrap()
}

const BIAS: &str = "dtype=bf16 shape=[70] state=master";
const HEADER: [(&str, &str); 13] = [
    ("format", "candle-srkl"),
    ("version", "3"),
    ("steps", "7"),
    ("skipped_steps", "1"),
    ("schedule", "0.5"),
    ("grad_scale", "2.0"),
    ("attempts", "8"),
    ("asked", "0"),
    ("draws", "0"),
    ("seed", "3"),
    ("requested", "0"),
    ("blind", "0"),
    ("measured", "0"),
];

const NO_ESTIMATE: &str = "0.0 0.0 1.0 0.0 0.0 0.0 0.0 inf 0.0 0 0 0 0 0 0 0 0 0";

/// `HEADER` and the entry of `layer.bias`, with some entries replaced, or left out where `None`.
fn header<'a>(changes: &[(&'a str, Option<&'a str>)]) -> Vec<(&'a str, &'a str)> {
    let bias = [
        ("parameter.layer.bias", BIAS),
        ("skipped.layer.bias", "0"),
        ("powers.layer.bias", "1.0 1.0 1.0"),
        ("curvature.layer.bias", NO_ESTIMATE),
        ("trained.layer.bias", "1"),
    ];
    let mut header: Vec<_> = HEADER.into_iter().chain(bias).collect();
    for &(key, value) in changes {
        header.retain(|(k, _)| *k != key);
        header.extend(value.map(|value| (key, value)));
    }
    header
}

fn bias_only() -> Result<(VarMap, Srkl)> {
    let varmap = VarMap::new();
    varmap.get(70, "layer.bias", Init::Const(1.), DType::BF16, &Device::Cpu)?;
    let opt = Srkl::from_varmap(&varmap, params())?;
    Ok((varmap, opt))
}

/// The layout of the file as its documentation has it: written by hand here, read by the crate.
#[test]
fn the_documented_layout_is_read() -> Result<()> {
    let (_varmap, mut opt) = bias_only()?;
    let path = tempfile::NamedTempFile::new()?;
    std::fs::write(path.path(), file(&header(&[]), (&[70], 1.001)))?;
    opt.load(path.path())?;
    assert_eq!((opt.steps()?, opt.skipped_steps()?, opt.grad_scale()), (7, 1, 2.));
    assert_eq!(opt.learning_rate(), 0.05);
    assert_eq!(opt.master("layer.bias")?, Some(vec![1.001; 70]));
    Ok(())
}

/// A file of version 1 loads. What it has of curvature along steps was measured by another formula, and counts as
/// none: the next step measures, and is a small one. Row norms are what they were.
#[test]
fn files_of_version_1() -> Result<()> {
    let state = |curvature: &str, description: &'static str| -> Vec<(&'static str, String)> {
        let new =
            ["version", "asked", "seed", "blind", "curvature.layer.bias", "trained.layer.bias"];
        let mut old: Vec<(&str, String)> =
            header(&[("parameter.layer.bias", Some(description)), ("attempts", Some("11"))])
                .into_iter()
                .filter(|(key, _)| !new.contains(key))
                .map(|(key, value)| (key, value.to_string()))
                .collect();
        old.push(("version", "1".to_string()));
        old.push(("estimate.layer.bias", curvature.to_string()));
        old
    };
    for (params, kind, expected) in [
        (ParamsSrkl { average: None, ..ParamsSrkl::kinetic() }, "m", None),
        (ParamsSrkl { scope: Scope::Tensor, ..ParamsSrkl::hessian() }, "m,q", Some(3.)),
    ] {
        let varmap = VarMap::new();
        varmap.get(70, "layer.bias", Init::Const(1.), DType::F32, &Device::Cpu)?;
        let mut opt = Srkl::from_varmap(&varmap, params)?;
        let description = format!("dtype=f32 shape=[70] state={kind}");
        // A mean of 9 with half of its weight, from 3 measurements and others.
        let old = state("9.0 4.0 0.5 0 3 1 2", Box::leak(description.into_boxed_str()));
        let metadata = old.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        let zeros = vec![0u8; 280];
        let tensors = kind.split(',').map(|kind| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![70], &zeros);
            (format!("layer.bias.{kind}"), view.unwrap())
        });
        let path = tempfile::NamedTempFile::new()?;
        safetensors::serialize_to_file(tensors, Some(metadata), path.path())?;
        opt.load(path.path())?;
        assert_eq!(opt.steps()?, 7);
        let told = opt.measurements()?;
        assert_eq!(told.curvature, expected);
        assert_eq!(told.taken, if expected.is_some() { 3 } else { 0 });
        assert_eq!(opt.measuring(), expected.is_none());
    }
    Ok(())
}

#[test]
fn foreign_newer_and_mismatched_files() -> Result<()> {
    // State of this optimizer, as `assert_refused` compares it, needs the names of `NAMES`.
    let folder = tempfile::tempdir()?;
    let (varmap, mut opt, _) = saved(folder.path())?;
    let model_file = folder.path().join("model");
    varmap.save(&model_file)?;
    assert_refused(&varmap, &mut opt, &std::fs::read(model_file)?, "not a checkpoint");
    let foreign = file(&[("format", "pt")], (&[70], 1.));
    assert_refused(&varmap, &mut opt, &foreign, "not a checkpoint of candle-srkl");
    let newer = file(&header(&[("version", Some("4"))]), (&[70], 1.));
    assert_refused(&varmap, &mut opt, &newer, "newer");
    // This file has one parameter, the optimizer four.
    let fewer = file(&header(&[]), (&[70], 1.));
    assert_refused(&varmap, &mut opt, &fewer, "the checkpoint has none of this name");

    let (_varmap, mut opt) = bias_only()?;
    let mut check = |changes: &[(&'static str, Option<&'static str>)], bias, reason: &str| {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file(&header(changes), bias)).unwrap();
        let message = opt.load(path.path()).expect_err(reason).to_string();
        assert!(message.contains(reason), "{reason:?} is not in {message:?}");
        assert_eq!((opt.steps().unwrap(), opt.grad_scale(), opt.learning_rate()), (0, 1., 0.1));
        assert_eq!(opt.master("layer.bias").unwrap(), Some(vec![1.; 70]));
    };
    let good: (&[usize], f32) = (&[70], 1.);
    check(&[("version", Some("0"))], good, "unknown version 0");
    check(&[("version", None)], good, "`version` is missing");
    check(&[("steps", Some("many"))], good, "`steps` is not a number");
    check(&[("steps", None)], good, "`steps` is missing");
    check(&[("schedule", Some("-1.0"))], good, "`schedule`");
    check(&[("schedule", Some("NaN"))], good, "`schedule`");
    check(&[("grad_scale", Some("0.0"))], good, "`grad_scale`");
    check(&[("grad_scale", Some("1e-320"))], good, "grad_scale`");
    check(&[("parameter.other", Some(BIAS))], good, "`other`");
    let wrong = [
        "dtype=f16 shape=[70] state=master",
        "dtype=bf16 shape=[71] state=master",
        "dtype=bf16 shape=[70] state=none",
    ];
    for wrong in wrong {
        check(&[("parameter.layer.bias", Some(wrong))], good, wrong);
    }
    check(&[("skipped.layer.bias", None)], good, "`skipped.layer.bias` is missing");
    check(&[("draws", None)], good, "`draws` is missing");
    check(&[("powers.layer.bias", Some("1.0 1.0"))], good, "`powers.layer.bias`: expected 3");
    check(&[("powers.layer.bias", Some("1.0 2.0 1.0"))], good, "from 0 to 1");
    check(&[("asked", None)], good, "`asked` is missing");
    // No training counts so far, and the next step would count beyond.
    for counter in ["steps", "skipped_steps", "attempts", "asked", "draws", "skipped.layer.bias"] {
        let reason = format!("`{counter}`: expected a number below 2^62");
        check(&[(counter, Some("18446744073709551615"))], good, &reason);
    }
    for flag in ["requested", "blind", "measured", "trained.layer.bias", "frozen.layer.bias"] {
        check(&[(flag, Some("2"))], good, &format!("`{flag}`: expected 0 or 1"));
    }
    check(&[("seed", Some("-1"))], good, "`seed` is not a number");
    check(&[("trained.layer.bias", None)], good, "`trained.layer.bias` is missing");
    check(&[("curvature.layer.bias", Some("0.0"))], good, "`curvature.layer.bias`: expected 19");
    for wrong in [
        NO_ESTIMATE.replacen("0.0", "-1.0", 1),
        NO_ESTIMATE.replacen("0.0", "NaN", 1),
        NO_ESTIMATE.replacen("1.0", "2.0", 1),
        // Counts.
        NO_ESTIMATE.replacen("inf 0.0 0 0", "inf 0.0 0 0.5", 1),
        NO_ESTIMATE.replacen("inf 0.0 0 0", "inf 0.0 0 1e19", 1),
        // A flag.
        NO_ESTIMATE.replacen("inf 0.0 0 0", "inf 0.0 0 2", 1),
        // A measurement in the average, whose weight is none.
        NO_ESTIMATE.replacen("inf 0.0 0", "inf 0.0 1", 1),
    ] {
        let wrong = Box::leak(wrong.into_boxed_str());
        check(&[("curvature.layer.bias", Some(wrong))], good, "`curvature.layer.bias`");
    }
    check(&[], (&[69], 1.), "master of `layer.bias`");
    check(&[], (&[70, 1], 1.), "master of `layer.bias`");
    check(&[], (&[70], 1.5), "load the model's parameters");
    check(&[], (&[70], f32::NAN), "load the model's parameters");
    Ok(())
}

#[test]
fn a_missing_file_and_a_folder_that_is_not_there() -> Result<()> {
    let (_varmap, mut opt) = bias_only()?;
    let folder = tempfile::tempdir()?;
    let nowhere = folder.path().join("no/such");
    assert!(opt.load(&nowhere).unwrap_err().to_string().contains("no/such"));
    assert!(opt.save(&nowhere).unwrap_err().to_string().contains("no/such"));
    assert!(opt.save("/").is_err());
    Ok(())
}

/// A file that `load` would refuse does not replace a good one.
#[test]
fn saving_a_bad_learning_rate() -> Result<()> {
    let (_varmap, mut opt) = bias_only()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    opt.save(&path)?;
    let good = std::fs::read(&path)?;
    for lr in [f64::NAN, -1.] {
        opt.set_learning_rate(lr);
        assert!(opt.save(&path).is_err());
        assert_eq!(std::fs::read(&path)?, good);
    }
    opt.load(&path)
}

/// NaN of any pattern in a parameter.
#[test]
fn saving_parameters_that_are_nan() -> Result<()> {
    let (varmap, mut opt) = bias_only()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let var = varmap.all_vars()[0].clone();
    for bits in [0xffc0u16, 0x7fff, 0x7f81, 0x7fc0] {
        let nan = vec![half::bf16::from_bits(bits); 70];
        var.set(&Tensor::from_vec(nan, 70, &Device::Cpu)?)?;
        opt.save(&path)?;
        opt.load(&path)?;
    }
    Ok(())
}

/// What somebody else wrote to a parameter since the last step is what is saved.
#[test]
fn saving_an_overwritten_parameter() -> Result<()> {
    let (varmap, mut opt) = bias_only()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let var = varmap.all_vars()[0].clone();
    opt.step(&grads([(&var, var.ones_like()?)]))?;
    var.set(&Tensor::full(4f32, 70, &Device::Cpu)?.to_dtype(DType::BF16)?)?;
    opt.save(&path)?;
    opt.load(&path)?;
    assert_eq!(opt.master("layer.bias")?, Some(vec![4.; 70]));
    Ok(())
}

/// Files of before had no `reach`: the last of the numbers of an estimate.
#[test]
fn an_estimate_without_reach_is_read() -> Result<()> {
    let w = var(&[3., -2.], DType::F32)?;
    let build = || Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam());
    let mut opt = build()?;
    for _ in 0..3 {
        opt.backward_step_with(|| w.sqr()?.sum_all())?;
    }
    let file = tempfile::NamedTempFile::new()?;
    opt.save(file.path())?;
    let bytes = std::fs::read(file.path())?;
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..end].to_vec()).unwrap();
    let (before, value) = header.split_once("\"curvature.0\":\"").unwrap();
    let (value, after) = value.split_once('"').unwrap();
    let older = value.rsplit_once(' ').unwrap().0;
    // A header may end in spaces.
    let older = format!("{before}\"curvature.0\":\"{older}\"{after}");
    let older = format!("{older:width$}", width = header.len());
    std::fs::write(file.path(), [&bytes[..8], older.as_bytes(), &bytes[end..]].concat())?;
    let mut loaded = build()?;
    loaded.load(file.path())?;
    assert_eq!(loaded.measurements()?, opt.measurements()?);
    assert_eq!(loaded.measurements()?.taken, 3);

    for wrong in ["-1.0", "NaN", "1.0 2.0"] {
        let value = format!("{} {wrong}", value.rsplit_once(' ').unwrap().0);
        let changed = format!("{before}\"curvature.0\":\"{value}\"{after}");
        let changed = format!("{changed:width$}", width = header.len().max(changed.len()));
        let length = (changed.len() as u64).to_le_bytes();
        std::fs::write(file.path(), [&length, changed.as_bytes(), &bytes[end..]].concat())?;
        let error = build()?.load(file.path()).expect_err(wrong).to_string();
        assert!(error.contains("`curvature.0`"), "{error}");
    }
    Ok(())
}

/// Averages of squares are not negative. (An estimate made of such rows would be one that no checkpoint may have.)
#[test]
fn negative_squares_are_refused() -> Result<()> {
    let cases = [("q", ParamsSrkl::hessian()), ("v", ParamsSrkl::adamw(0.1))];
    for ((kind, params), dtype) in cases
        .into_iter()
        .flat_map(|case| [DType::F32, DType::F64].map(|dtype| (case.clone(), dtype)))
    {
        let w = var(&[3., -2.], dtype)?;
        let mut opt = Srkl::builder().default_group(params).build([("w".to_string(), w)])?;
        let file = tempfile::NamedTempFile::new()?;
        opt.save(file.path())?;
        let before = common::saved(&mut opt)?;
        let bytes = std::fs::read(file.path())?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let mut changed = vec![];
        for (name, view) in tensors.tensors() {
            let mut data = view.data().to_vec();
            // The sign of the last number, and a bit of its value.
            if name == format!("w.{kind}") {
                *data.last_mut().unwrap() = 0xbf;
            }
            changed.push((name, view.dtype(), view.shape().to_vec(), data));
        }
        let views = changed.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize_to_file(views, header.metadata().clone(), file.path())?;
        assert_error(opt.load(file.path()), &[&format!("{kind} of `w`"), "0 or above"]);
        assert_eq!(common::saved(&mut opt)?, before);
    }
    Ok(())
}
