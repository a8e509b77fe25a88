//! Awkward input: each case has a defined result or a clear error, after which nothing has changed.

mod common;

use approx::abs_diff_eq;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use candle_srkl::{
    Average, Beta, BlockTelemetry, Curvature, Direction, MasterWeights, NonFinite, ParamsSrkl,
    Scope, Srkl, StepCurvature,
};
use common::*;

fn steep() -> ParamsSrkl {
    ParamsSrkl { lr: 0.1, beta: Beta::Fixed(0.5), weight_decay: 0.1, ..ParamsSrkl::reference() }
}

#[test]
fn no_variables() -> Result<()> {
    let mut opt = Srkl::new(vec![], ParamsSrkl::reference())?;
    opt.step(&grads([]))?;
    let mut opt = Srkl::empty(ParamsSrkl { scope: Scope::Global, ..steep() })?;
    opt.step(&grads([]))?;
    assert_eq!(opt.steps()?, 1);
    assert!(opt.telemetry()?.is_empty());
    Ok(())
}

#[test]
fn empty_and_scalar_tensors() -> Result<()> {
    for dtype in FLOATS {
        for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
            let empty = Var::zeros((3, 0, 2), dtype, &Device::Cpu)?;
            let scalar = Var::from_tensor(&Tensor::new(2f64, &Device::Cpu)?.to_dtype(dtype)?)?;
            let vars = vec![empty.clone(), scalar.clone()];
            let mut opt =
                Srkl::new(vars, ParamsSrkl { scope, max_grad_norm: Some(9.), ..steep() })?;
            let g = Tensor::new(1f64, &Device::Cpu)?.to_dtype(dtype)?;
            opt.step(&grads([(&empty, empty.zeros_like()?), (&scalar, g)]))?;
            let expected = 2. * (1. - 0.1 / 1.5 * 0.1) - 0.1 / 1.5;
            let got = values(&scalar)?[0];
            assert!(
                abs_diff_eq!(got, expected, epsilon = half_ulp(expected, dtype) + 1e-7),
                "{dtype:?} {scope:?}: {got}, not {expected}"
            );
        }
    }
    Ok(())
}

/// A parameter without a gradient is left alone, decay included; the others move.
#[test]
fn missing_gradients() -> Result<()> {
    let vars = [var(&[1., 2.], DType::F32)?, var(&[3.], DType::BF16)?];
    for scope in [Scope::Tensor, Scope::Global] {
        let mut opt = Srkl::new(vars.to_vec(), ParamsSrkl { scope, ..steep() })?;
        let before = (bits(&vars[0])?, bits(&vars[1])?);
        opt.step(&grads([(&vars[1], tensor(&[9.], DType::BF16)?)]))?;
        assert_eq!(bits(&vars[0])?, before.0);
        assert_ne!(bits(&vars[1])?, before.1);
        let telemetry = opt.telemetry()?;
        assert_eq!((telemetry[0].phi, telemetry[0].skipped), (None, 0));
        // Nor does it count in the sums over all blocks.
        assert_eq!(telemetry[1].curvature, Some(81.));
    }
    Ok(())
}

#[test]
fn the_same_variable_or_name_twice() -> Result<()> {
    let w = var(&[1.], DType::F32)?;
    let again = Var::from_tensor(w.as_tensor())?;
    let named = [("first".to_string(), w.clone()), ("second".to_string(), again)];
    assert_error(Srkl::builder().build(named), &["`first`", "`second`", "same variable"]);
    let named = [("a".to_string(), w), ("a".to_string(), var(&[1.], DType::F32)?)];
    assert_error(Srkl::builder().build(named), &["two parameters are named `a`"]);
    let group = |name| {
        Srkl::builder().group(name, steep(), |_, _| true).group("x", steep(), |_, _| true).build([])
    };
    assert_error(group("x"), &["two parameter groups are named `x`"]);
    assert_error(group("default"), &["two parameter groups are named `default`"]);
    Ok(())
}

/// Integer variables are left out, as by candle's own optimizers.
#[test]
fn integer_variables() -> Result<()> {
    let index = Var::new(&[1u32, 2], &Device::Cpu)?;
    let w = var(&[1.], DType::F32)?;
    let mut opt = Srkl::new(vec![index, w.clone()], steep())?;
    opt.step(&grads([(&w, tensor(&[1.], DType::F32)?)]))?;
    assert_eq!(opt.telemetry()?.len(), 1);
    assert_ne!(values(&w)?, [1.]);
    Ok(())
}

#[test]
fn wrong_gradients_are_named_and_change_nothing() -> Result<()> {
    for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate] {
        let good = var(&vec![1.; 2_000_000], DType::F32)?;
        let bad = var(&[1., 2., 3.], DType::F32)?;
        let named = [("good".to_string(), good.clone()), ("bad".to_string(), bad.clone())];
        let params = ParamsSrkl { nonfinite, ..steep() };
        let mut opt = Srkl::builder().default_group(params).build(named)?;
        let before = (bits(&good)?, bits(&bad)?);
        let mut check = |grad: Tensor, parts: &[&str]| -> Result<()> {
            let store = grads([(&good, good.ones_like()?), (&bad, grad)]);
            assert_error(opt.step(&store), parts);
            assert_eq!((bits(&good)?, bits(&bad)?), before);
            assert_eq!((opt.steps()?, opt.skipped_steps()?), (0, 0));
            Ok(())
        };
        check(tensor(&[1., 2.], DType::F32)?, &["`bad`", "[3]", "[2]"])?;
        check(tensor(&[1., 2., 3.], DType::F32)?.reshape((3, 1))?, &["`bad`", "[3]", "[3, 1]"])?;
        check(Tensor::new(&[1u32, 2, 3], &Device::Cpu)?, &["`bad`", "f32", "U32"])?;
        // Memory that the step writes to: of the parameter itself, or of another one.
        check(bad.as_tensor().clone(), &["`bad`", "shares its memory"])?;
        check(bad.as_detached_tensor(), &["`bad`", "shares its memory"])?;
        check(good.narrow(0, 7, 3)?.detach(), &["`bad`", "shares its memory"])?;
    }
    Ok(())
}

/// One gradient for two parameters is fine: it is only read.
#[test]
fn a_gradient_shared_by_two_parameters() -> Result<()> {
    let vars = [var(&[1.; 300], DType::F32)?, var(&[1.; 300], DType::F32)?];
    let mut opt = Srkl::new(vars.to_vec(), steep())?;
    let grad = tensor(&[0.5; 300], DType::F32)?;
    opt.step(&grads([(&vars[0], grad.clone()), (&vars[1], grad)]))?;
    assert_eq!(bits(&vars[0])?, bits(&vars[1])?);
    Ok(())
}

#[test]
fn settings_out_of_range_are_named() -> Result<()> {
    let reference = ParamsSrkl::reference;
    let averaged = |average| ParamsSrkl { average: Some(average), ..reference() };
    let noise = |noise| Curvature::Step(StepCurvature { decay: 0., noise });
    let cases = [
        ("`lr`", ParamsSrkl { lr: -1., ..reference() }),
        ("`lr`", ParamsSrkl { lr: -1e-300, ..reference() }),
        ("`lr`", ParamsSrkl { lr: f64::NAN, ..reference() }),
        ("`lr`", ParamsSrkl { lr: f64::INFINITY, ..reference() }),
        ("`beta", ParamsSrkl { beta: Beta::Fixed(-0.1), ..reference() }),
        ("`beta", ParamsSrkl { beta: Beta::Fixed(f64::INFINITY), ..reference() }),
        ("`beta", ParamsSrkl { beta: Beta::Tied(f64::NAN), ..reference() }),
        ("`beta", ParamsSrkl { beta: Beta::Tied(1e300), lr: 1e300, ..reference() }),
        ("`weight_decay`", ParamsSrkl { weight_decay: -1e-9, ..reference() }),
        ("`weight_decay`", ParamsSrkl { weight_decay: f64::NAN, ..reference() }),
        ("`average", averaged(Average::Polynomial(-0.1))),
        ("`average", averaged(Average::Polynomial(f64::INFINITY))),
        ("`noise`", ParamsSrkl { curvature: noise(-1.), ..reference() }),
        ("`noise`", ParamsSrkl { curvature: noise(f64::NAN), ..reference() }),
        ("`noise`", ParamsSrkl { curvature: noise(f64::INFINITY), ..reference() }),
        ("`max_grad_norm`", ParamsSrkl { max_grad_norm: Some(0.), ..reference() }),
        ("`max_grad_norm`", ParamsSrkl { max_grad_norm: Some(f64::INFINITY), ..reference() }),
    ];
    for (field, params) in cases {
        assert_error(Srkl::new(vec![], params.clone()), &[field, "expected a finite number"]);
        let group = Srkl::builder().group("mine", params.clone(), |_, _| true).build([]);
        assert_error(group, &["`mine`"]);
        let mut opt = Srkl::new(vec![], reference())?;
        assert_error(opt.set_params("default", params), &[field]);
        assert_eq!(opt.params("default"), Some(&reference()));
    }
    let wide = Srkl::new(
        vec![var(&[1.], DType::F64)?],
        ParamsSrkl { master_weights: MasterWeights::F32, ..reference() },
    );
    assert_error(wide, &["`0`", "f64", "MasterWeights::F32"]);
    let mut opt = Srkl::new(vec![], reference())?;
    assert_error(opt.set_params("nobody", reference()), &["no parameter group `nobody`"]);
    let none = ParamsSrkl { master_weights: MasterWeights::None, ..reference() };
    assert_error(opt.set_params("default", none), &["`master_weights`"]);
    Ok(())
}

#[test]
fn learning_rates_and_scales_out_of_range() -> Result<()> {
    let w = var(&[1.], DType::F32)?;
    let store = grads([(&w, tensor(&[1.], DType::F32)?)]);
    let mut opt = Srkl::new(vec![w.clone()], steep())?;
    for lr in [-1., f64::NAN, f64::INFINITY] {
        opt.set_learning_rate(lr);
        assert_error(opt.step(&store), &["learning rate"]);
        assert_eq!(values(&w)?, [1.]);
    }
    opt.set_learning_rate(0.);
    opt.step(&store)?;
    assert_eq!(values(&w)?, [1.], "a learning rate of 0 moves nothing, decay included");
    opt.set_learning_rate(0.1);
    assert_eq!(opt.learning_rate(), 0.1);
    for scale in [0., -1., f64::NAN, f64::INFINITY, 1e-320] {
        assert_error(opt.set_grad_scale(scale), &["grad_scale"]);
        assert_eq!(opt.grad_scale(), 1.);
    }
    Ok(())
}

/// Three blocks, of which the middle one has a bad element; what happens to each, by policy.
#[test]
fn nonfinite_gradients_by_policy() -> Result<()> {
    const N: usize = CHUNK + LANES - 1;
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for place in [0, N / 2, N - 1] {
            for dtype in FLOATS {
                // Of whose gradients no more is asked than whether they are finite.
                for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock] {
                    let params = ParamsSrkl { nonfinite, ..ParamsSrkl::braked_adam() };
                    check_nonfinite(bad, place, N, dtype, params)?;
                }
                for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
                    for max_grad_norm in [None, Some(0.5)] {
                        for nonfinite in
                            [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate]
                        {
                            let params = ParamsSrkl { scope, max_grad_norm, nonfinite, ..steep() };
                            check_nonfinite(bad, place, N, dtype, params)?;
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

fn check_nonfinite(bad: f64, place: usize, n: usize, dtype: DType, p: ParamsSrkl) -> Result<()> {
    let what = format!("{bad} at {place}, {dtype:?}, {p:?}");
    let vars = noisy_vars(&[n; 3], 1., dtype)?;
    let mut opt = Srkl::new(vars.clone(), p.clone())?;
    let good = |i: u64| noise(n, 0.1, 7 + i);
    let mut middle = good(1);
    middle[place] = bad;
    let store = grads([
        (&vars[0], tensor(&good(0), dtype)?),
        (&vars[1], tensor(&middle, dtype)?),
        (&vars[2], tensor(&good(2), dtype)?),
    ]);
    let before = all_bits(&vars, &opt)?;
    opt.step(&store)?;
    let after = all_bits(&vars, &opt)?;
    let skipped: Vec<u64> = opt.telemetry()?.iter().map(|t| t.skipped).collect();
    let counters = (opt.steps()?, opt.skipped_steps()?);
    match p.nonfinite {
        NonFinite::SkipStep => {
            assert!(after == before, "{what}");
            assert_eq!((counters, skipped), ((0, 1), vec![0, 0, 0]), "{what}");
            assert!(opt.telemetry()?.iter().all(|t| t.phi.is_none()), "{what}");
        }
        NonFinite::SkipBlock => {
            // The others move as if the middle block had no gradient.
            assert!(after[1] == before[1], "{what}");
            assert_eq!((counters, skipped), ((1, 0), vec![0, 1, 0]), "{what}");
            let alone = noisy_vars(&[n; 3], 1., dtype)?;
            let mut opt = Srkl::new(alone.clone(), p)?;
            opt.step(&grads([
                (&alone[0], tensor(&good(0), dtype)?),
                (&alone[2], tensor(&good(2), dtype)?),
            ]))?;
            for i in [0, 2] {
                assert_ne!(after[i], before[i], "{what}");
                assert_eq!(after[i].0, bits(&alone[i])?, "{what}");
            }
        }
        NonFinite::Propagate => {
            assert_eq!((counters, skipped), ((1, 0), vec![0, 0, 0]), "{what}");
            let middle = values(&vars[1])?;
            assert!(middle[place].is_nan(), "{what}");
            // The one pattern of a NaN.
            let canonical = match dtype {
                DType::F64 => 0x7ff8_0000_0000_0000,
                DType::F32 => 0x7fc0_0000,
                DType::BF16 => 0x7fc0,
                _ => 0x7e00,
            };
            assert_eq!(after[1].0[place], canonical, "{what}");
            // An infinite curvature brakes the rest of the block to a stop.
            if bad.is_infinite() && p.scope == Scope::Tensor && p.max_grad_norm.is_none() {
                let other = (place + 1) % n;
                assert_eq!(after[1].0[other], before[1].0[other], "{what}");
            }
        }
        other => panic!("no such policy here: {other:?}"),
    }
    Ok(())
}

/// A sum over all blocks that is not finite is bad input to a group that uses it, though its own
/// gradients are good.
#[test]
fn policies_of_two_groups() -> Result<()> {
    let run = |a: NonFinite, b: NonFinite| -> Result<(bool, bool, u64, u64)> {
        let vars = [var(&[1.], DType::F32)?, var(&[1.], DType::F32)?];
        let params = |nonfinite| ParamsSrkl { nonfinite, max_grad_norm: Some(1.), ..steep() };
        let mut opt = Srkl::builder()
            .default_group(params(a))
            .group("b", params(b), |name, _| name == "b")
            .build([("a".to_string(), vars[0].clone()), ("b".to_string(), vars[1].clone())])?;
        opt.step(&grads([
            (&vars[0], tensor(&[f64::NAN], DType::F32)?),
            (&vars[1], tensor(&[1.], DType::F32)?),
        ]))?;
        let moved = |v: &Var| values(v).map(|v| v != [1.]);
        let skipped = opt.telemetry()?.iter().map(|t| t.skipped).sum();
        Ok((moved(&vars[0])?, moved(&vars[1])?, opt.skipped_steps()?, skipped))
    };
    use NonFinite::*;
    assert_eq!(run(SkipBlock, SkipBlock)?, (false, true, 0, 1));
    assert_eq!(run(SkipBlock, SkipStep)?, (false, true, 0, 1));
    assert_eq!(run(SkipStep, SkipBlock)?, (false, false, 1, 0));
    assert_eq!(run(Propagate, SkipBlock)?, (true, false, 0, 1));
    assert_eq!(run(Propagate, SkipStep)?, (false, false, 1, 0));
    Ok(())
}

/// Small tensors are taken in batches, on several threads. Each is stepped as it would be alone, whatever is beside it: tensors
/// of other groups, frozen ones, some that have no gradient now and then, whose gradient is strided, or whose step is skipped.
#[test]
fn small_tensors_step_as_each_alone() -> Result<()> {
    const SIZES: [usize; 9] = [0, 1, 3, 16, 64, 65, 255, 1025, 4097];
    const COUNT: usize = 108;
    let norms = |step: usize| step != 1 && step != 4;
    for nonfinite in [NonFinite::Propagate, NonFinite::SkipBlock] {
        let average = Some(Average::Exponential(0.9));
        let adam = ParamsSrkl { nonfinite, average, ..ParamsSrkl::adamw(0.01) };
        let momentum = Direction::Momentum { mu: 0.8 };
        let momentum = ParamsSrkl { nonfinite, direction: momentum, ..steep() };
        let frozen = ParamsSrkl { lr: 0., ..adam.clone() };
        let group = |place: usize| ["adam", "adam", "momentum", "adam", "frozen"][place % 5];
        let params = |place: usize| match group(place) {
            "adam" => adam.clone(),
            "momentum" => momentum.clone(),
            _ => frozen.clone(),
        };
        let vars = || -> Result<Vec<Var>> {
            let start = |i: usize| var(&noise(SIZES[i % 9], 1., i as u64), FLOATS[i / 9 % 4]);
            (0..COUNT).map(start).collect()
        };
        let (vars_together, vars_alone) = (vars()?, vars()?);
        let named = vars_together.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone()));
        let is_in = |name: &str, other| name.parse().is_ok_and(|place| group(place) == other);
        let mut together = Srkl::builder()
            .default_group(adam.clone())
            .group("momentum", momentum.clone(), |name, _| is_in(name, "momentum"))
            .group("frozen", frozen.clone(), |name, _| is_in(name, "frozen"))
            .build(named)?;
        let alone = |(i, var): (usize, &Var)| Srkl::new(vec![var.clone()], params(i));
        let mut alone: Vec<Srkl> =
            vars_alone.iter().enumerate().map(alone).collect::<Result<_>>()?;

        for step in 0..6 {
            let gradient = |i: usize| -> Result<Tensor> {
                let mut g = noise(SIZES[i % 9], 1., (1000 * (step + 1) + i) as u64);
                if let Some(last) = g.last_mut().filter(|_| step == 2 && i % 11 == 5) {
                    *last = f64::NAN;
                }
                // Of any dtype.
                tensor(&g, FLOATS[(i + step) % 4])
            };
            let has_gradient = |i: usize| !(i + step).is_multiple_of(4);
            let mut store = GradStore::default();
            for (i, var) in vars_together.iter().enumerate().filter(|(i, _)| has_gradient(*i)) {
                let g = gradient(i)?;
                // Every second element of a longer tensor.
                let strided = Tensor::stack(&[&g, &g], 1)?.narrow(1, 1, 1)?.squeeze(1)?;
                store.insert(var, if (i + step).is_multiple_of(3) { strided } else { g });
            }
            together.record_norms(norms(step));
            together.step(&store)?;
            let telemetry = together.telemetry()?;
            for (i, (var, opt)) in vars_alone.iter().zip(&mut alone).enumerate() {
                let g = has_gradient(i).then(|| gradient(i)).transpose()?;
                opt.record_norms(norms(step));
                opt.step(&grads(g.map(|g| (var, g))))?;

                let (name, case) =
                    (i.to_string(), format!("{nonfinite:?}, tensor {i}, step {step}"));
                assert_eq!(bits(&vars_together[i])?, bits(var)?, "{case}");
                assert_eq!(master_bits(&together, &name)?, master_bits(opt, "0")?, "{case}");
                for kind in ["m", "v", "average"] {
                    let kept = |opt: &Srkl, name: &str| {
                        opt.state_of(name, kind)?.map(|kept| bits(&kept.flatten_all()?)).transpose()
                    };
                    assert_eq!(kept(&together, &name)?, kept(opt, "0")?, "{case}, {kind}");
                }
                // As text, in which a NaN equals another.
                let told = |t: &BlockTelemetry| {
                    let BlockTelemetry { phi, curvature, grad_norm, step_norm, skipped, .. } = t;
                    format!("{phi:?} {curvature:?} {grad_norm:?} {step_norm:?} {skipped}")
                };
                assert_eq!(told(&telemetry[i]), told(&opt.telemetry()?[0]), "{case}");
            }
        }
        let any_skipped = together.telemetry()?.iter().any(|t| t.skipped > 0);
        assert_eq!(any_skipped, nonfinite == NonFinite::SkipBlock);
    }
    Ok(())
}

/// Steps of a bf16 parameter that are far below its spacing: kept by the master, lost without.
#[test]
fn masters_keep_small_steps() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        for (masters, expected) in
            [(MasterWeights::Auto, 0.9), (MasterWeights::F32, 0.9), (MasterWeights::None, 1.)]
        {
            let w = var(&[1.], dtype)?;
            let params = ParamsSrkl {
                lr: 1e-4,
                beta: Beta::Fixed(0.),
                master_weights: masters,
                ..ParamsSrkl::reference()
            };
            let mut opt = Srkl::new(vec![w.clone()], params)?;
            for _ in 0..1000 {
                opt.step(&grads([(&w, tensor(&[1.], dtype)?)]))?;
            }
            let got = values(&w)?[0];
            let allowed = half_ulp(expected, dtype) + 1e-5;
            assert!(abs_diff_eq!(got, expected, epsilon = allowed), "{dtype:?} {masters:?}: {got}");
        }
    }
    Ok(())
}

/// A parameter that somebody else writes is not brought back by its master.
#[test]
fn overwritten_parameters() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        for n in [1, 2, STRIP - 1, STRIP + 1, CHUNK / 2 + 1, LARGE] {
            let w = var(&noise(n, 1., 1), dtype)?;
            let mut opt = Srkl::new(vec![w.clone()], steep())?;
            let grad = || tensor(&noise(n, 0.01, 2), dtype);
            opt.step(&grads([(&w, grad()?)]))?;
            let other = tensor(&noise(n, 5., 3), dtype)?;

            // A whole tensor, as by loading a checkpoint: noticed without a word.
            w.set(&other)?;
            let fresh = Var::from_tensor(&other)?;
            let mut fresh_opt = Srkl::new(vec![fresh.clone()], steep())?;
            opt.step(&grads([(&w, grad()?)]))?;
            fresh_opt.step(&grads([(&fresh, grad()?)]))?;
            assert!(bits(&w)? == bits(&fresh)?, "{dtype:?}, {n} elements");
            assert!(opt.master("0")? == fresh_opt.master("0")?, "{dtype:?}, {n} elements");

            // One element, after a word. The other masters keep what the parameter cannot hold.
            let place = n / 3;
            let mut edited = values(&w)?;
            edited[place] = -64.;
            w.set(&tensor(&edited, dtype)?)?;
            let mut expected = opt.master("0")?.unwrap();
            expected[place] = -64.;
            opt.sync_master()?;
            assert!(opt.master("0")? == Some(expected), "{dtype:?}, {n} elements");
        }
    }
    Ok(())
}

/// Parameters that VarMap loads are taken over too.
#[test]
fn a_loaded_var_map() -> Result<()> {
    let mut varmap = VarMap::new();
    let init = candle_nn::Init::Randn { mean: 0., stdev: 1. };
    varmap.get((40, 30), "w", init, DType::BF16, &Device::Cpu)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    varmap.save(&path)?;
    let w = varmap.all_vars()[0].clone();
    let saved = bits(&w)?;
    let mut opt = Srkl::from_varmap(&varmap, steep())?;
    opt.step(&grads([(&w, w.ones_like()?)]))?;
    assert_ne!(bits(&w)?, saved);
    varmap.load(&path)?;
    opt.step(&grads([(&w, w.zeros_like()?)]))?;
    let decayed = Tensor::new(1. - 0.1 * 0.1, &Device::Cpu)?;
    let expected = tensor(&values(&opt_free(&path)?)?, DType::F64)?.broadcast_mul(&decayed)?;
    for (got, expected) in values(&w)?.into_iter().zip(values(&expected)?) {
        assert_close(got, expected, 1. / 256.);
    }
    Ok(())
}

fn opt_free(path: &std::path::Path) -> Result<Tensor> {
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?.remove("w").unwrap())
}
