//! The rule against its formula: parameters, masters, H and phi, over several steps.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{Beta, MasterWeights, NonFinite, ParamsSrkl, Scope, Srkl};
use common::*;

/// The example of `ParamsSrkl::reference`, to the last digit of an f32.
#[test]
fn fixture() -> Result<()> {
    let w = var(&[1., -2., 3.], DType::F32)?;
    let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::reference())?;
    opt.step(&grads([(&w, tensor(&[0.5, -1., 2.], DType::F32)?)]))?;
    let telemetry = &opt.telemetry()?[0];
    assert_eq!(telemetry.curvature.unwrap() as f32, 4.1306777);
    assert_eq!(telemetry.phi.unwrap() as f32, 7.076801e-4);
    assert_eq!(w.to_vec1::<f32>()?, [0.9996462, -1.9992924, 2.9985847]);
    Ok(())
}

struct Case {
    dtype: DType,
    grad_dtype: DType,
    masters: MasterWeights,
    params: ParamsSrkl,
}

/// One step of the rule on a list of blocks in f64, from the formula alone; `schedule` is its `s`.
fn oracle(
    params: &ParamsSrkl,
    schedule: f64,
    grad_scale: f64,
    blocks: &mut [(Vec<f64>, Vec<f64>)],
) -> Vec<f64> {
    let all: Vec<f64> = blocks.iter().flat_map(|(_, g)| g.iter().map(|g| g / grad_scale)).collect();
    let clip = match params.max_grad_norm {
        Some(max) if norm(&all) > max => max / norm(&all),
        _ => 1.,
    };
    let all: Vec<f64> = all.iter().map(|g| g * clip).collect();
    let beta = match params.beta {
        Beta::Fixed(beta) => beta,
        Beta::Tied(gamma) => gamma * params.lr,
        other => panic!("no such beta here: {other:?}"),
    };
    let phi_at = |h: f64| schedule * params.lr / (1. + beta * h);
    let mut phis = vec![];
    for (w, g) in blocks {
        let g: Vec<f64> = g.iter().map(|g| g / grad_scale * clip).collect();
        let h = if params.scope == Scope::Global { curvature(&all) } else { curvature(&g) };
        phis.push(phi_at(h));
        for (w, g) in w.iter_mut().zip(&g) {
            let phi = if params.scope == Scope::Element { phi_at(g * g) } else { phi_at(h) };
            *w = (1. - phi * params.weight_decay) * *w - phi * g;
        }
    }
    phis
}

/// Steps every size of `SIZES` in one optimizer and checks each step by itself: what is stored must
/// be the exact step from what was stored before, within the roundings that the contract allows.
fn check_steps(case: Case) -> Result<()> {
    let Case { dtype, grad_dtype, masters, params } = case;
    let params = ParamsSrkl { master_weights: masters, ..params };
    let vars = noisy_vars(&SIZES, 0.5, dtype)?;
    let mut opt = Srkl::new(vars.clone(), params.clone())?;
    let has_masters = opt.master("1")?.is_some();
    let stored_dtype = if has_masters { DType::F32 } else { dtype };
    for step in 0..4u64 {
        // An lr, a schedule and a loss scale that change from step to step.
        opt.set_learning_rate(params.lr * (1. + step as f64) / 2.);
        let schedule = (1. + step as f64) / 2.;
        let grad_scale = [1., 3., 0.125, 1024.][step as usize];
        opt.set_grad_scale(grad_scale)?;
        let mut store = grads([]);
        let mut blocks = vec![];
        for (i, (var, w)) in vars.iter().zip(stored(&vars, &opt)?).enumerate() {
            // Uneven gradients: some tensors steep, some flat.
            let scale = grad_scale * [0.1, 1., 10., 0.01][i % 4];
            let grad = tensor(&noise(w.len(), scale, 100 * step + i as u64), grad_dtype)?;
            let in_compute = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            blocks.push((w, values(&grad.to_dtype(in_compute)?)?));
            store.insert(var, grad);
        }
        let before = blocks.clone();
        let phis = oracle(&params, schedule, grad_scale, &mut blocks);
        opt.step(&store)?;
        let after = stored(&vars, &opt)?;
        for (i, ((after, phi), (w, g))) in after.iter().zip(phis).zip(&before).enumerate() {
            let expected = &blocks[i].0;
            if params.scope != Scope::Element {
                let got = opt.telemetry()?[i].phi.unwrap();
                assert!(close(got, phi, 1e-12), "phi of block {i}: {got}, not {phi}");
            }
            for (k, (&after, &expected)) in after.iter().zip(expected).enumerate() {
                // Roundings: phi, keep, keep * w, and the sum as it is stored. (In f64 the oracle has
                // as many.)
                let eps = if dtype == DType::F64 { 1e-15 } else { 2f64.powi(-24) };
                let parts = (expected - w[k]).abs() + 2. * w[k].abs();
                let allowed = 1.01 * (half_ulp(expected, stored_dtype) + eps * parts);
                assert!(
                    abs_diff_eq!(after, expected, epsilon = allowed),
                    "step {step}, block {i} of {dtype:?}, gradient of {grad_dtype:?}, element {k}: \
                     {after}, not {expected} (w {}, g {})",
                    w[k],
                    g[k]
                );
            }
        }
        // A parameter is its master, rounded.
        if has_masters {
            for (i, var) in vars.iter().enumerate() {
                let master = opt.master(&i.to_string())?.unwrap();
                let rounded = Tensor::from_vec(master, var.elem_count(), &Device::Cpu)?;
                assert_eq!(bits(var)?, bits(&rounded.to_dtype(dtype)?)?);
            }
        }
    }
    assert_eq!(opt.steps()?, 4);
    Ok(())
}

fn steep() -> ParamsSrkl {
    ParamsSrkl { lr: 0.05, beta: Beta::Fixed(0.3), ..ParamsSrkl::reference() }
}

#[test]
fn every_dtype_with_gradients_of_every_dtype() -> Result<()> {
    for dtype in FLOATS {
        for grad_dtype in FLOATS {
            for masters in [MasterWeights::Auto, MasterWeights::None] {
                check_steps(Case { dtype, grad_dtype, masters, params: steep() })?;
            }
        }
    }
    Ok(())
}

#[test]
fn every_scope_with_decay_and_clipping() -> Result<()> {
    for dtype in FLOATS {
        for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
            for beta in [Beta::Fixed(0.3), Beta::Tied(0.5)] {
                for max_grad_norm in [None, Some(0.7), Some(1e9)] {
                    let params = ParamsSrkl {
                        lr: 0.3,
                        beta,
                        scope,
                        weight_decay: 0.4,
                        max_grad_norm,
                        ..ParamsSrkl::reference()
                    };
                    let masters = MasterWeights::Auto;
                    check_steps(Case { dtype, grad_dtype: dtype, masters, params })?;
                }
            }
        }
    }
    Ok(())
}

/// The list is long enough for several runs of blocks where no decision needs all of them.
#[test]
fn runs_of_blocks_give_the_bits_of_the_whole_list() -> Result<()> {
    let run = |nonfinite| -> Result<Vec<Vec<u64>>> {
        let vars = noisy_vars(&[LARGE; 9], 1., DType::F32)?;
        let mut opt = Srkl::new(vars.clone(), ParamsSrkl { nonfinite, ..steep() })?;
        for step in 0..2 {
            let grad = |i: usize| tensor(&noise(LARGE, 0.1, 50 + 10 * step + i as u64), DType::F32);
            let pairs: Result<Vec<_>> =
                vars.iter().enumerate().map(|(i, v)| Ok((v, grad(i)?))).collect();
            opt.step(&grads(pairs?))?;
        }
        vars.iter().map(|v| bits(v)).collect()
    };
    assert_eq!(run(NonFinite::SkipStep)?, run(NonFinite::SkipBlock)?);
    Ok(())
}

/// H to 1e-12 for every finite gradient: all magnitudes, alone and beside others, of any length.
#[test]
fn curvature_has_no_limits_of_range() -> Result<()> {
    let check = |dtype: DType, g: &[f64]| -> Result<()> {
        let w = var(&vec![1.; g.len()], dtype)?;
        let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::reference())?;
        let grad = tensor(g, dtype)?;
        let exact = curvature(&values(&grad)?);
        opt.step(&grads([(&w, grad)]))?;
        let t = &opt.telemetry()?[0];
        let (h, phi) = (t.curvature.unwrap(), t.phi.unwrap());
        assert!(close(h, exact, 1e-12), "{dtype:?} {:?}..: H {h}, not {exact}", g[0]);
        let exact = 1e-3 / (1. + 0.1 * exact);
        assert!(phi > 0. && close(phi, exact, 1e-12), "phi {phi}, not {exact}");
        Ok(())
    };
    for (dtype, exponents) in [
        (DType::F32, -149..128),
        (DType::BF16, -133..128),
        (DType::F16, -24..16),
        // Beyond these the square itself, and so H, is outside of f64.
        (DType::F64, -510..512),
    ] {
        for exponent in exponents {
            let g = 2f64.powi(exponent);
            check(dtype, &[g])?;
            check(dtype, &[-g, 0., g * 0.75])?;
        }
    }
    check(DType::F32, &[f32::MAX as f64; 20_000])?;
    check(DType::F32, &[1e-45; 20_000])?;
    check(DType::F64, &[1e150; 20_000])?;
    check(DType::F64, &[1e-150; 20_000])?;
    // Chunks of different magnitude.
    let chunks: Vec<f64> =
        (0..5 * CHUNK - 1).map(|i| [1e120, 1e-120, 1e121, 0., 1e119][i / CHUNK]).collect();
    check(DType::F64, &chunks)?;
    // Many small ones beside a large one, which f32 would not notice.
    let mut g = vec![1e-3; 1_000_000];
    g[777_777] = 0.1;
    check(DType::F32, &g)
}

/// A gradient of another layout is read as its elements, with the same bits.
#[test]
fn layouts_of_gradients() -> Result<()> {
    let (rows, columns) = (37, 611);
    let n = rows * columns;
    for dtype in FLOATS {
        for scope in [Scope::Tensor, Scope::Element] {
            let params = ParamsSrkl { scope, max_grad_norm: Some(0.1), ..steep() };
            let step = |grad: &Tensor| -> Result<Vec<u64>> {
                let w = Var::from_tensor(&noisy_matrix((rows, columns), 1., 1, dtype)?)?;
                let mut opt = Srkl::new(vec![w.clone()], params.clone())?;
                opt.step(&grads([(&w, grad.clone())]))?;
                opt.step(&grads([(&w, grad.clone())]))?;
                bits(&w)
            };
            let plain = noisy_matrix((rows, columns), 1., 2, dtype)?;
            let expected = step(&plain)?;

            let transposed = plain.t()?.contiguous()?.t()?;
            assert!(!transposed.is_contiguous());
            assert_eq!(step(&transposed)?, expected, "{dtype:?} transposed");

            // Misaligned: contiguous from an odd offset on.
            for offset in 1..9 {
                let front = tensor(&vec![f64::NAN; offset], dtype)?;
                let longer = Tensor::cat(&[&front, &plain.flatten_all()?], 0)?;
                let grad = longer.narrow(0, offset, n)?.reshape((rows, columns))?;
                assert_eq!(grad.layout().start_offset(), offset);
                assert_eq!(step(&grad)?, expected, "{dtype:?} at offset {offset}");
            }

            // Every second column of a wider matrix, and a stepped view of three dimensions.
            let nan = plain.affine(f64::NAN, 0.)?;
            let wide = Tensor::stack(&[&nan, &plain], 2)?;
            let grad = wide.narrow(2, 1, 1)?.squeeze(2)?;
            assert!(!grad.is_contiguous());
            assert_eq!(step(&grad)?, expected, "{dtype:?} strided");

            let row = plain.narrow(0, 3, 1)?;
            let broadcast = row.broadcast_as((rows, columns))?;
            assert_eq!(step(&broadcast)?, step(&broadcast.contiguous()?)?, "{dtype:?} broadcast");
        }
    }
    Ok(())
}

/// Blocks of all dtypes share one curvature and one clipping.
#[test]
fn mixed_dtypes_in_one_optimizer() -> Result<()> {
    let params = ParamsSrkl { scope: Scope::Global, max_grad_norm: Some(0.5), ..steep() };
    let vars: Vec<Var> =
        FLOATS.iter().map(|&d| var(&noise(9000, 1., 3), d)).collect::<Result<_>>()?;
    let mut opt = Srkl::new(vars.clone(), params)?;
    let grad: Vec<Tensor> =
        FLOATS.iter().map(|&d| tensor(&noise(9000, 0.1, 4), d)).collect::<Result<_>>()?;
    opt.step(&grads(vars.iter().zip(grad.iter().cloned())))?;
    let mut all = vec![];
    for grad in &grad {
        all.extend(values(grad)?);
    }
    let clip = 0.5 / norm(&all);
    let exact = clip * clip * curvature(&all);
    assert_close(opt.grad_norm()?.unwrap(), norm(&all), 1e-12);
    for t in opt.telemetry()? {
        assert_close(t.curvature.unwrap(), exact, 1e-12);
    }
    Ok(())
}

/// Each group has its own settings; the schedule is relative to the default group's lr.
#[test]
fn groups() -> Result<()> {
    let decayed = ParamsSrkl { lr: 0.1, beta: Beta::Fixed(0.), weight_decay: 0.5, ..steep() };
    let slow = ParamsSrkl { lr: 0.01, weight_decay: 0., ..decayed.clone() };
    let named = [("a.weight", 1.), ("a.bias", 1.), ("b.weight", 1.)];
    let vars: Vec<Var> =
        named.iter().map(|&(_, w)| var(&[w], DType::F64)).collect::<Result<_>>()?;
    let names = named.iter().map(|(name, _)| name.to_string());
    let mut opt = Srkl::builder()
        .default_group(decayed.clone())
        .group("bias", slow.clone(), |name, _| name.ends_with("bias"))
        .group("all of a", decayed.clone(), |name, _| name.starts_with("a."))
        .build(names.zip(vars.iter().cloned()))?;
    let groups: Vec<String> = opt.telemetry()?.into_iter().map(|t| t.group).collect();
    assert_eq!(groups, ["all of a", "bias", "default"]);

    let one = tensor(&[1.], DType::F64)?;
    let store = || grads(vars.iter().map(|v| (v, one.clone())));
    assert_eq!(opt.learning_rate(), 0.1);
    opt.step(&store())?;
    let now: Vec<f64> = vars.iter().map(|v| values(v).unwrap()[0]).collect();
    assert_eq!(now, [(1. - 0.05) - 0.1, 1. - 0.01, (1. - 0.05) - 0.1]);

    // Half of the schedule for all, and no decay any more for the default group.
    opt.set_learning_rate(0.05);
    opt.set_params("default", ParamsSrkl { weight_decay: 0., ..decayed.clone() })?;
    opt.step(&store())?;
    for (w, expected) in vars.iter().zip([0.85 * 0.975 - 0.05, 0.99 - 0.005, 0.85 - 0.05]) {
        assert_abs_diff_eq!(values(w)?[0], expected, epsilon = 1e-15);
    }
    assert_eq!(opt.params("bias"), Some(&slow));
    assert_eq!(opt.params("none"), None);
    Ok(())
}

/// A gradient up to the limit is left as it is, a longer one has the limit's norm.
#[test]
fn clipping_starts_at_the_limit() -> Result<()> {
    let g = noise(3000, 1., 1);
    for ratio in [0.1, 0.999, 1.001, 1.5, 1.999, 30.] {
        let w = var(&vec![0.; g.len()], DType::F64)?;
        let limit = norm(&g) / ratio;
        let params = ParamsSrkl {
            lr: 1.,
            beta: Beta::Fixed(0.),
            max_grad_norm: Some(limit),
            ..ParamsSrkl::reference()
        };
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        opt.step(&grads([(&w, tensor(&g, DType::F64)?)]))?;
        let expected = limit.min(norm(&g));
        let got = norm(&values(&w)?);
        assert!(close(got, expected, 1e-12), "{ratio}: {got}, not {expected}");
    }
    Ok(())
}

/// A power of two as the loss scale changes no bit.
#[test]
fn loss_scale_of_a_power_of_two_changes_no_bit() -> Result<()> {
    let run = |scale: f64| -> Result<Vec<u64>> {
        let w = var(&noise(5000, 1., 5), DType::F32)?;
        let params = ParamsSrkl { max_grad_norm: Some(2.), ..steep() };
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        opt.set_grad_scale(scale)?;
        for step in 0..3 {
            let g: Vec<f64> = noise(5000, 0.1, 6 + step).iter().map(|g| g * scale).collect();
            // The scaled gradient is exact: rounding first, then a power of two.
            let g: Vec<f64> = g.iter().map(|g| (g / scale) as f32 as f64 * scale).collect();
            opt.step(&grads([(&w, tensor(&g, DType::F32)?)]))?;
        }
        bits(&w)
    };
    assert_eq!(run(1.)?, run(65536.)?);
    assert_eq!(run(1.)?, run(2f64.powi(-20))?);
    assert_ne!(run(1.)?, run(3.)?);
    Ok(())
}
