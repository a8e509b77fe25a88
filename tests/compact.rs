//! Packed state as a user meets it: what stays f32, what checkpoints convert, what is an error, and what random rounding
//! does to a training.

mod common;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, AverageFormat, MasterWeights, NonFinite, ParamsSrkl, Rounding, Srkl, StateFormat,
};
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView};

use common::*;

fn compact(params: ParamsSrkl) -> ParamsSrkl {
    ParamsSrkl { state: StateFormat::Compact, ..params }
}

/// The names of a checkpoint's tensors, sorted.
fn names(opt: &mut Srkl) -> Result<Vec<String>> {
    Ok(saved(opt)?.1.into_keys().collect())
}

/// The f32 numbers of a tensor of a checkpoint.
fn floats(opt: &mut Srkl, name: &str) -> Result<Vec<f32>> {
    let (_, bytes) = saved(opt)?.1.into_iter().find(|(other, _)| other == name).expect("its name");
    Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

fn trained(var: &Var, params: &ParamsSrkl, steps: u64) -> Result<Srkl> {
    let mut opt = Srkl::new(vec![var.clone()], params.clone())?;
    train(&mut opt, var, 0..steps)?;
    Ok(opt)
}

/// Steps by gradients whose size differs by a factor of 100 among neighbours.
fn train(opt: &mut Srkl, var: &Var, steps: std::ops::Range<u64>) -> Result<()> {
    for step in steps {
        let mut g = noise(var.elem_count(), 0.1, 1000 + step);
        g.iter_mut().enumerate().for_each(|(i, g)| *g *= 10f64.powf((i % 32) as f64 / 16.));
        opt.step(&grads([(var, tensor(&g, var.dtype())?.reshape(var.shape())?)]))?;
    }
    Ok(())
}

#[test]
fn small_parameters_and_f64_keep_their_moments() -> Result<()> {
    for (n, dtype, expected) in [
        (4095, DType::F32, vec!["0.m", "0.v"]),
        (4095, DType::BF16, vec!["0.m", "0.master", "0.v"]),
        (5000, DType::F64, vec!["0.m", "0.v"]),
        (4096, DType::F32, vec!["0.m.codes", "0.m.exponents", "0.v.codes", "0.v.exponents"]),
        (
            4096,
            DType::BF16,
            vec!["0.m.codes", "0.m.exponents", "0.master.rest", "0.v.codes", "0.v.exponents"],
        ),
        (
            4096,
            DType::F16,
            vec!["0.m.codes", "0.m.exponents", "0.master", "0.v.codes", "0.v.exponents"],
        ),
    ] {
        let splits = n == 4096;
        let master_weights = if splits { MasterWeights::Split } else { MasterWeights::Auto };
        let params = ParamsSrkl { master_weights, ..compact(ParamsSrkl::adamw(1e-3)) };
        let mut opt = trained(&var(&noise(n, 1., 0), dtype)?, &params, 2)?;
        assert_eq!(names(&mut opt)?, expected, "{n} {dtype:?}");
    }
    let mut opt =
        trained(&var(&noise(4096, 1., 0), DType::F32)?, &compact(ParamsSrkl::kinetic()), 0)?;
    assert_eq!(names(&mut opt)?, ["0.m.codes", "0.m.exponents"]);
    Ok(())
}

/// An f32 checkpoint into a compact optimizer and back: what is lost is what rounding to nearest loses, and a second
/// conversion loses nothing more.
#[test]
fn checkpoints_convert_between_formats() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let start = noise(9000, 1., 0);
    for direction in [ParamsSrkl::adamw(1e-3).direction, ParamsSrkl::kinetic().direction] {
        let exact = ParamsSrkl { direction, ..ParamsSrkl::adamw(1e-3) };
        let packed = compact(exact.clone());
        let var = var(&start, DType::F32)?;
        let mut opt = trained(&var, &exact, 5)?;
        let m = floats(&mut opt, "0.m")?;
        let has_v = names(&mut opt)?.contains(&"0.v".to_string());
        opt.save(path("exact"))?;

        let mut opt = Srkl::new(vec![var.clone()], packed.clone())?;
        opt.load(path("exact"))?;
        assert_eq!(opt.steps()?, 5);
        opt.save(path("packed"))?;

        let mut opt = Srkl::new(vec![var.clone()], exact.clone())?;
        opt.load(path("packed"))?;
        let back = floats(&mut opt, "0.m")?;
        let v = if has_v { Some(floats(&mut opt, "0.v")?) } else { None };
        for unit in 0..m.len() / 256 {
            let of = unit * 256..unit * 256 + 256;
            let scale = |i: usize| v.as_ref().map_or(1., |v| v[i].sqrt());
            let most = of.clone().map(|i| (m[i] / scale(i)).abs()).fold(0., f32::max);
            for i in of {
                // Half a step, of which the largest has 63 at least; `sqrt(v)` is within a factor of sqrt(2) of its unit.
                let error = (m[i] - back[i]).abs() / scale(i);
                assert!(error <= 1.42 * most / 63., "{i}: {error} {most}");
            }
        }
        // The codes may be others, of the same numbers.
        for params in [&packed, &exact] {
            opt.save(path("again"))?;
            opt = Srkl::new(vec![var.clone()], params.clone())?;
            opt.load(path("again"))?;
        }
        assert_eq!(floats(&mut opt, "0.m")?, back);
        assert_eq!(v.is_some().then(|| floats(&mut opt, "0.v")).transpose()?, v);
    }
    Ok(())
}

/// The same of v, against the moments of the f32 training.
#[test]
fn converted_second_moments_are_rounded_to_nearest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let var = var(&noise(4096, 1., 0), DType::F32)?;
    let exact = ParamsSrkl::adamw(1e-3);
    let mut opt = trained(&var, &exact, 5)?;
    let v = floats(&mut opt, "0.v")?;
    for params in [compact(exact.clone()), exact] {
        opt.save(&path)?;
        opt = Srkl::new(vec![var.clone()], params)?;
        opt.load(&path)?;
    }
    let back = floats(&mut opt, "0.v")?;
    assert_ne!(v, back);
    for (i, (v, back)) in v.iter().zip(&back).enumerate() {
        assert!((v - back).abs() <= v / 16., "{i}: {v} {back}");
    }
    Ok(())
}

/// A zero with a sign, as other programs may write it, is 0 and not the largest code.
#[test]
fn negative_zeros_convert_as_zeros() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let var = var(&noise(4096, 1., 0), DType::F32)?;
    let exact = ParamsSrkl::adamw(1e-3);
    let mut opt = trained(&var, &exact, 5)?;
    let v = floats(&mut opt, "0.v")?;
    opt.save(path("exact"))?;
    edit_tensors(&path("exact"), &path("signed"), &|parts| {
        let (_, _, _, bytes) = parts.iter_mut().find(|part| part.0 == "0.v").expect("its v");
        bytes[4 * 700..][..4].copy_from_slice(&(-0f32).to_le_bytes());
    })?;
    let mut opt = Srkl::new(vec![var.clone()], compact(exact.clone()))?;
    opt.load(path("signed"))?;
    opt.save(path("packed"))?;
    let mut opt = Srkl::new(vec![var.clone()], exact)?;
    opt.load(path("packed"))?;
    for (i, (v, back)) in v.iter().zip(floats(&mut opt, "0.v")?).enumerate() {
        let expected = if i == 700 { 0. } else { *v };
        assert!((expected - back).abs() <= expected / 16., "{i}: {v} {back}");
    }
    Ok(())
}

/// Masters of f32 and split ones are the same but for ties, in either direction, and so are the steps after them.
#[test]
fn masters_convert_between_formats() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let exact = ParamsSrkl::adamw(1e-3);
    let split = ParamsSrkl { master_weights: MasterWeights::Split, ..exact.clone() };
    for [from, to] in [[&exact, &split], [&split, &exact]] {
        let var = var(&noise(5000, 1., 0), DType::BF16)?;
        let mut opt = trained(&var, from, 5)?;
        let master = master_bits(&opt, "0")?.expect("a master");
        let w = bits(&var)?;
        assert!(master.iter().zip(&w).any(|(master, w)| master & 0xffff != 0 && *w > 0));
        opt.save(&path)?;
        let mut other = Srkl::new(vec![var.clone()], to.clone())?;
        other.load(&path)?;
        assert_eq!(master_bits(&other, "0")?.expect("a master"), master);
        train(&mut other, &var, 5..8)?;
        let after = master_bits(&other, "0")?;
        var.set(&bf16s(&w)?)?;
        let mut same = Srkl::new(vec![var.clone()], from.clone())?;
        same.load(&path)?;
        train(&mut same, &var, 5..8)?;
        assert_eq!(master_bits(&same, "0")?, after);
    }
    Ok(())
}

fn bf16s(bits: &[u64]) -> Result<Tensor> {
    let values: Vec<bf16> = bits.iter().map(|bits| bf16::from_bits(*bits as u16)).collect();
    Tensor::new(&values[..], &Device::Cpu)
}

/// As with f32 masters: a value that is written to a parameter takes effect.
#[test]
fn overwritten_parameters_of_split_masters_are_noticed() -> Result<()> {
    let params = ParamsSrkl { master_weights: MasterWeights::Split, ..ParamsSrkl::sgd(1e-6) };
    for syncs in [true, false] {
        let var = var(&noise(300, 1., 0), DType::BF16)?;
        let mut opt = trained(&var, &params, 3)?;
        let master = opt.master("0")?.expect("a master");
        assert!(master.iter().any(|x| bf16::from_f32(*x).to_f32() != *x));
        let other = tensor(&noise(300, 1., 7), DType::BF16)?;
        var.set(&other)?;
        if syncs {
            opt.sync_master()?;
        } else {
            // Of zeros: nothing moves.
            opt.step(&grads([(&var, other.zeros_like()?)]))?;
        }
        let expected: Vec<f32> = values(&other)?.into_iter().map(|x| x as f32).collect();
        assert_eq!(opt.master("0")?.expect("a master"), expected);
    }
    // Of a single element, which no sample is of, what it lacked before is left: less than the parameter's own precision.
    let var = var(&noise(300, 1., 0), DType::BF16)?;
    let mut opt = trained(&var, &params, 3)?;
    let mut new = values(&var)?;
    new[1] = 3.;
    var.set(&tensor(&new, DType::BF16)?)?;
    opt.sync_master()?;
    let master = opt.master("0")?.expect("a master");
    assert!((master[1] - 3.).abs() <= 3. / 256., "{}", master[1]);
    Ok(())
}

/// Whatever a single element is changed to, which no sample is of: what is saved rounds to the parameter, so that it loads into
/// f32 masters too; and the others keep their masters.
#[test]
fn single_changes_of_split_masters_can_be_saved() -> Result<()> {
    let (n, at) = (70_000, 1);
    let split = ParamsSrkl { master_weights: MasterWeights::Split, ..ParamsSrkl::sgd(1e-6) };
    let f32s = ParamsSrkl { master_weights: MasterWeights::F32, ..split.clone() };
    let file = tempfile::NamedTempFile::new()?;
    let var = var(&vec![1.; n], DType::BF16)?;
    // All remainders below 1, to the last: of 1 - 2^-9, half-way to the bf16 number below, and less.
    let g: Vec<f64> = (0..n).map(|i| ((i % 32_769) as f64 / 32_768.) * 1e6 / 512.).collect();
    let mut opt = trained(&var, &split, 0)?;
    opt.step(&grads([(&var, tensor(&g, DType::F32)?)]))?;
    let before = opt.master("0")?.expect("masters");
    let halves = before.iter().filter(|x| x.to_bits() & 0xffff == 0x8000).count();
    assert!(halves > 1, "{halves}");
    let samples: Vec<usize> = (0..32).map(|k| k * (n - 1) / 31).collect();
    let changed = |i: &usize| i % 7 == at && !samples.contains(i);
    let mut w = values(&var)?;
    // The bits of an odd bf16 number.
    (0..n).filter(changed).for_each(|i| w[i] = 1.0078125);
    var.set(&tensor(&w, DType::BF16)?)?;
    opt.save(file.path())?;
    let after = opt.master("0")?.expect("masters");
    for (i, (after, before)) in after.iter().zip(&before).enumerate() {
        if changed(&i) {
            assert_eq!(bf16::from_f32(*after).to_f64(), w[i], "{i}");
        } else {
            assert_eq!(after, before, "{i}");
        }
    }
    let mut other = trained(&var, &f32s, 0)?;
    other.load(file.path())?;
    assert_eq!(other.master("0")?.expect("masters"), after);
    Ok(())
}

/// A tensor of a file: its name, dtype, shape and bytes.
type Part = (String, Dtype, Vec<usize>, Vec<u8>);

/// Copies a safetensors file with other tensors.
fn edit_tensors(from: &Path, to: &Path, edit: &dyn Fn(&mut Vec<Part>)) -> Result<()> {
    let bytes = std::fs::read(from)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let mut parts = vec![];
    for (name, view) in tensors.tensors() {
        parts.push((name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    }
    edit(&mut parts);
    let views = parts
        .iter()
        .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(safetensors::serialize_to_file(views, header.metadata().clone(), to)?)
}

/// A model that goes with another checkpoint, broken files, settings of another format: errors that name what is wrong,
/// and nothing has changed.
#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let params =
        ParamsSrkl { master_weights: MasterWeights::Split, ..compact(ParamsSrkl::adamw(1e-3)) };
    let named = |var: &Var, params: &ParamsSrkl| {
        Srkl::builder().default_group(params.clone()).build([("w".to_string(), var.clone())])
    };
    let var = var(&noise(5000, 1., 0), DType::BF16)?;
    let mut opt = named(&var, &params)?;
    train(&mut opt, &var, 0..3)?;
    opt.save(&path)?;
    let w = bits(&var)?;
    let before = saved(&mut opt)?;

    let mut changed = w.clone();
    changed[4321] ^= 1;
    var.set(&bf16s(&changed)?)?;
    for params in [&params, &ParamsSrkl { master_weights: MasterWeights::F32, ..params.clone() }] {
        let error = named(&var, params)?.load(&path).unwrap_err().to_string();
        assert!(error.contains("`w`") && error.contains("load the model's parameters"), "{error}");
    }
    var.set(&bf16s(&w)?)?;

    // What `save` never writes: numbers out of range, and kinds of state in formats of others.
    let broken = folder.path().join("broken");
    let mut refused = |edit: &dyn Fn(&mut Vec<Part>), words: &[&str]| -> Result<()> {
        edit_tensors(&path, &broken, edit)?;
        let error = opt.load(&broken).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(saved(&mut opt)? == before);
        Ok(())
    };
    let part = |parts: &mut Vec<Part>, name: &str| parts.iter().position(|p| p.0 == name).unwrap();
    for (name, byte, words) in [
        ("w.v.exponents", 221, ["v of `w`", "221"]),
        ("w.m.exponents", 248, ["m of `w`", "248"]),
        ("w.m.codes", 0x80, ["m of `w`", "-128"]),
    ] {
        let edit = |parts: &mut Vec<Part>| {
            let at = part(parts, name);
            parts[at].3[0] = byte;
        };
        refused(&edit, &words)?;
    }
    let odd = w.iter().position(|w| w & 1 == 1).expect("an odd one");
    let half_down = |parts: &mut Vec<Part>| {
        let at = part(parts, "w.master.rest");
        parts[at].3[2 * odd..2 * odd + 2].copy_from_slice(&i16::MIN.to_le_bytes());
    };
    refused(&half_down, &["master of `w`", &format!("element {odd}"), "round"])?;
    for (name, new, dtype, size, words) in [
        ("w.m.codes", "w.m.rest", Dtype::I16, 2, "m of `w`"),
        ("w.m.codes", "w.m", Dtype::BF16, 2, "m of `w`"),
        ("w.master.rest", "w.master", Dtype::BF16, 2, "master of `w`"),
        ("w.master.rest", "w.master.codes", Dtype::I8, 1, "master of `w`"),
        ("w.v.codes", "w.v", Dtype::F32, 4, "moments of `w`"),
    ] {
        let other_format = |parts: &mut Vec<Part>| {
            let at = part(parts, name);
            parts[at] = (new.to_string(), dtype, vec![5000], vec![0; 5000 * size]);
        };
        refused(&other_format, &[words])?;
    }

    for (field, other) in [
        ("state", ParamsSrkl { state: StateFormat::F32, ..params.clone() }),
        ("average_format", ParamsSrkl { average_format: AverageFormat::BF16, ..params.clone() }),
        ("master_weights", ParamsSrkl { master_weights: MasterWeights::Auto, ..params.clone() }),
        ("rounding", ParamsSrkl { rounding: Rounding::Stochastic, ..params.clone() }),
    ] {
        let error = opt.set_params("default", other).unwrap_err().to_string();
        assert!(error.contains(&format!("`{field}`")) && error.contains("default"), "{error}");
    }
    assert!(saved(&mut opt)? == before);
    Ok(())
}

/// Steps of a thousandth of what bf16 can tell: to nearest nothing moves, at random the mean of the parameters does, as
/// far as it should, and back.
#[test]
fn random_rounding_keeps_small_steps_in_the_mean() -> Result<()> {
    let n = 4096;
    for (rounding, expected) in [(Rounding::Nearest, 0.), (Rounding::Stochastic, 0.004)] {
        let params =
            ParamsSrkl { master_weights: MasterWeights::None, rounding, ..ParamsSrkl::sgd(8e-6) };
        let var = var(&vec![1.25; n], DType::BF16)?;
        let mut opt = Srkl::new(vec![var.clone()], params)?;
        for sign in [1., -1.] {
            let g = tensor(&vec![sign; n], DType::BF16)?;
            for _ in 0..500 {
                opt.step(&grads([(&var, g.clone())]))?;
            }
            let mean = values(&var)?.iter().sum::<f64>() / n as f64;
            let moved = 1.25 - mean - if sign > 0. { expected } else { 0. };
            // The standard deviation of an element is some 0.0055, that of the mean 64 times less.
            assert!(moved.abs() < 4.5e-4, "{rounding:?}: {moved}");
            assert!(rounding == Rounding::Stochastic || mean == 1.25);
        }
    }
    Ok(())
}

/// The average of a parameter that bf16 can't tell from its neighbours is right in the mean over elements, after
/// thousands of steps.
#[test]
fn averages_of_bf16_are_right_in_the_mean() -> Result<()> {
    let (n, target) = (4096, 1.2513);
    for average in [Average::Exponential(0.99), Average::Polynomial(8.)] {
        let params = ParamsSrkl {
            average: Some(average),
            average_format: AverageFormat::BF16,
            ..ParamsSrkl::sgd(1e-4)
        };
        let var = var(&vec![target - 0.1; n], DType::F32)?;
        let mut opt = Srkl::new(vec![var.clone()], params)?;
        let g = tensor(&vec![-1.; n], DType::F32)?;
        for step in 0..3000 {
            let lr = if step < 1000 { 1e-4 } else { 1e-12 };
            opt.set_learning_rate(lr);
            opt.step(&grads([(&var, g.clone())]))?;
        }
        let _averaged = opt.swap_averaged()?;
        let averages = values(&var)?;
        let mean = averages.iter().sum::<f64>() / n as f64;
        // By the formula in f64, and to nearest: 1.25 or 1.2578.
        assert!((mean - target).abs() < 4e-4, "{average:?}: {mean}");
        assert!(averages.iter().any(|a| *a > target) && averages.iter().any(|a| *a < target));
    }
    Ok(())
}

/// A finite gradient whose square is beyond f32: f32 state never moves such an element again. Compact state does, and never by
/// more than an Adam step may be.
#[test]
fn overflowing_second_moments_move_nothing_far() -> Result<()> {
    for (size, dtype) in [(1e21, DType::F32), (3e38, DType::F32), (3e38, DType::BF16)] {
        for place in [0, 255, 2500, 4999] {
            for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate] {
                let params = ParamsSrkl { nonfinite, ..compact(ParamsSrkl::adamw(1e-3)) };
                let var = var(&noise(5000, 1., 0), dtype)?;
                let mut opt = trained(&var, &params, 2)?;
                let mut g = noise(5000, 0.1, 99);
                g[place] = size;
                opt.step(&grads([(&var, tensor(&g, dtype)?)]))?;
                let mut w = values(&var)?;
                for step in 3..30 {
                    train(&mut opt, &var, step..step + 1)?;
                    let new = values(&var)?;
                    for (w, new) in w.iter().zip(&new) {
                        let rounded = if dtype == DType::BF16 { new.abs() / 128. } else { 0. };
                        let allowed = 0.008 + rounded;
                        assert!((w - new).abs() < allowed, "{size} {place} {step}: {w} {new}");
                    }
                    w = new;
                }
            }
        }
    }
    Ok(())
}

/// By each policy a NaN or an infinity leaves state that goes on: of all other elements, and of these where the parameter
/// was not reached.
#[test]
fn what_is_not_finite_leaves_valid_state() -> Result<()> {
    let policies = [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate];
    // How much a number may differ that is rounded by another exponent, or to bf16, and the bits of a NaN.
    for (dtype, near, nan) in [(DType::F32, 2e-3, 0x7fc0_0000), (DType::BF16, 0.02, 0x7fc0)] {
        for (nonfinite, bad) in policies.iter().flat_map(|p| [(*p, f64::NAN), (*p, f64::INFINITY)])
        {
            for place in [0, 2500, 4999] {
                let params = ParamsSrkl {
                    nonfinite,
                    master_weights: MasterWeights::Split,
                    ..compact(ParamsSrkl::adamw(1e-3))
                };
                let start = noise(5000, 1., 0);
                let (var, clean) = (var(&start, dtype)?, common::var(&start, dtype)?);
                let mut opt = trained(&var, &params, 2)?;
                let mut clean_opt = trained(&clean, &params, 2)?;
                let mut g = noise(5000, 0.1, 99);
                clean_opt.step(&grads([(&clean, tensor(&g, dtype)?)]))?;
                g[place] = bad;
                opt.step(&grads([(&var, tensor(&g, dtype)?)]))?;
                train(&mut opt, &var, 3..6)?;
                train(&mut clean_opt, &clean, 3..6)?;
                let (w, expected) = (values(&var)?, values(&clean)?);
                if nonfinite == NonFinite::Propagate {
                    assert_eq!(bits(&var)?[place], nan, "{bad} at {place}");
                    // The unit of the bad element may be rounded by another exponent.
                    let unit = place / 256;
                    for i in (0..w.len()).filter(|i| i / 256 != unit) {
                        assert_eq!(w[i], expected[i], "{i}");
                    }
                    for i in (unit * 256..w.len().min(unit * 256 + 256)).filter(|i| *i != place) {
                        assert!((w[i] - expected[i]).abs() < near, "{i}: {} {}", w[i], expected[i]);
                    }
                } else {
                    assert!(w.iter().all(|w| w.is_finite()), "{nonfinite:?} {bad}");
                }
            }
        }
    }
    Ok(())
}
