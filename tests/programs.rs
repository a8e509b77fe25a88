//! Longer programs, of what people do around a step: a model that is tuned further, a population, two networks against each
//! other, a network that grows.

mod common;
#[path = "../examples/digits/data.rs"]
#[allow(dead_code, reason = "the example's")]
mod data;
#[path = "../examples/digits/random.rs"]
#[allow(dead_code, reason = "the example's")]
mod random;

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use candle_srkl::monitor::Csv;
use candle_srkl::{
    Average, DEFAULT_GROUP, Direction, GradScaler, LrSchedule, MasterWeights, ParamsSrkl,
    Reduction, Srkl, StateFormat,
};
use common::*;
use data::{Digits, PIXELS, Part};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Some rows of the training images.
fn batch(digits: &Digits, n: usize, step: u64) -> Result<Part> {
    let mut rng = StdRng::seed_from_u64(step);
    let rows = digits.train.len().unwrap() as u32;
    let rows: Vec<u32> = (0..n).map(|_| rng.random_range(0..rows)).collect();
    Ok(digits.train.select(&rows).unwrap())
}

fn insert(varmap: &VarMap, name: &str, value: &Tensor) -> Result<()> {
    let var = Var::from_tensor(value)?;
    varmap.data().lock().unwrap().insert(name.to_string(), var);
    Ok(())
}

fn layer(varmap: &VarMap, name: &str, (inputs, outputs): (usize, usize), salt: u64) -> Result<()> {
    let scale = (2. / inputs as f64).sqrt();
    insert(
        varmap,
        &format!("{name}.weight"),
        &noisy_matrix((outputs, inputs), scale, salt, DType::F32)?,
    )?;
    insert(varmap, &format!("{name}.bias"), &Tensor::zeros(outputs, DType::F32, &Device::Cpu)?)
}

fn forward(varmap: &VarMap, name: &str, x: &Tensor) -> Result<Tensor> {
    let data = varmap.data().lock().unwrap();
    let [w, b] = ["weight", "bias"].map(|what| data[&format!("{name}.{what}")].clone());
    x.matmul(&w.t()?)?.broadcast_add(&b)
}

fn logits(varmap: &VarMap, x: &Tensor) -> Result<Tensor> {
    forward(
        varmap,
        "head",
        &forward(varmap, "body.1", &forward(varmap, "body.0", x)?.relu()?)?.relu()?,
    )
}

fn model(outputs: usize, salt: u64) -> Result<VarMap> {
    let varmap = VarMap::new();
    layer(&varmap, "body.0", (PIXELS, 64), salt)?;
    layer(&varmap, "body.1", (64, 32), salt + 1)?;
    layer(&varmap, "head", (32, outputs), salt + 2)?;
    Ok(varmap)
}

fn accuracy(varmap: &VarMap, part: &Part, classes: &Tensor) -> Result<f64> {
    let right = logits(varmap, &part.images)?.argmax(D::Minus1)?.eq(classes)?;
    right.to_dtype(DType::F64)?.mean_all()?.to_scalar()
}

fn all(varmap: &VarMap) -> Result<Vec<(String, Vec<u64>)>> {
    let data = varmap.data().lock().unwrap();
    let mut all: Vec<_> =
        data.iter().map(|(name, var)| Ok((name.clone(), bits(var)?))).collect::<Result<_>>()?;
    all.sort();
    Ok(all)
}

/// Odd or even.
fn parity(part: &Part) -> Result<Tensor> {
    let classes: Vec<u32> = part.classes.to_vec1()?;
    Tensor::new(classes.iter().map(|c| c % 2).collect::<Vec<_>>(), &Device::Cpu)
}

/// Digits, then whether they are odd: the body is loaded, frozen for a while, and unfrozen from the top; the loss is scaled, the
/// learning rate follows a schedule, one batch is broken and rolled back. What was killed and resumed has the bits of what was not.
#[test]
fn a_model_gets_another_head() -> Result<()> {
    let digits = Digits::load(0, DType::F32, &Device::Cpu).unwrap();
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);

    let first = model(10, 1)?;
    let mut opt = Srkl::from_varmap(&first, ParamsSrkl::braked_adam())?;
    for step in 0..150 {
        let part = batch(&digits, 32, step)?;
        let loss = || candle_nn::loss::cross_entropy(&logits(&first, &part.images)?, &part.classes);
        opt.backward_step_with(loss)?;
    }
    opt.save(path("digits.opt"))?;
    first.save(path("digits.safetensors"))?;

    let (ends, dies) = (160u64, 83u64);
    // From the start, or from what was saved.
    let run = |from: u64, to: u64, name: &str| -> Result<(VarMap, Srkl)> {
        let mut varmap = model(2, 100)?;
        if from == 0 {
            let saved = candle_core::safetensors::load(path("digits.safetensors"), &Device::Cpu)?;
            for (name, var) in varmap.data().lock().unwrap().iter() {
                if name.starts_with("body.") {
                    var.set(&saved[name])?;
                }
            }
        } else {
            varmap.load(path(&format!("{name}.safetensors")))?;
        }
        let mut opt = Srkl::builder()
            .default_group(ParamsSrkl::braked_adam())
            .group("head", ParamsSrkl { lr: 0.02, ..ParamsSrkl::braked_adam() }, |name, _| {
                name.starts_with("head.")
            })
            .build_varmap(&varmap)?;
        opt.set_schedule(Some(LrSchedule::warmup_stable_decay(10, 90, 60, 0.05)))?;
        opt.set_grad_scaler(Some(GradScaler { growth_interval: 20, ..GradScaler::default() }))?;
        let mut csv = match from {
            0 => {
                let report = opt.load_matching(path("digits.opt"))?;
                assert_eq!(report.taken.len(), 4, "{report:?}");
                assert_eq!(report.mismatched.len(), 2, "{report:?}");
                opt.freeze(|name| name.starts_with("body."))?;
                Csv::create(path(&format!("{name}.csv")))?
            }
            _ => {
                opt.load(path(&format!("{name}.opt")))?;
                Csv::append(path(&format!("{name}.csv")))?
            }
        };
        let mut last = None;
        for step in from..to {
            if step == 60 {
                opt.unfreeze(|name| name.starts_with("body.1"))?;
            }
            if step == 100 {
                opt.unfreeze_group(DEFAULT_GROUP)?;
            }
            if step == 120 {
                // A broken batch, noticed by its loss, and forgotten.
                let good = last.take().expect("a snapshot");
                let before = all(&varmap)?;
                let part = batch(&digits, 32, step)?;
                let loss = || {
                    let logits = logits(&varmap, &(&part.images * 1e3)?)?;
                    candle_nn::loss::cross_entropy(&logits, &parity(&part)?)? * opt.grad_scale()
                };
                let grads = loss()?.backward()?;
                opt.skip_measurement();
                opt.step(&grads)?;
                assert_ne!(all(&varmap)?, before);
                opt.restore(&good)?;
                assert_eq!(all(&varmap)?, before);
            }
            let part = batch(&digits, 32, 1000 + step)?;
            let scale = opt.grad_scale();
            opt.backward_step_with(|| {
                let loss = candle_nn::loss::cross_entropy(
                    &logits(&varmap, &part.images)?,
                    &parity(&part)?,
                )?;
                loss * scale
            })?;
            if step == 119 {
                last = Some(opt.snapshot()?);
            }
            if step % 10 == 0 {
                csv.write(&opt.metrics()?)?;
            }
        }
        opt.save(path(&format!("{name}.opt")))?;
        varmap.save(path(&format!("{name}.safetensors")))?;
        Ok((varmap, opt))
    };

    let (whole, mut opt) = run(0, ends, "whole")?;
    let (part, _) = run(0, dies, "part")?;
    // Frozen until now.
    let (bits_then, bits_first) = (all(&part)?, all(&first)?);
    for (name, then) in &bits_then {
        let before = bits_first.iter().find(|(other, _)| other == name);
        let stayed = before.is_some_and(|(_, before)| before == then);
        assert_eq!(stayed, name.starts_with("body.0"), "{name}");
    }
    let (resumed, mut opt_resumed) = run(dies, ends, "part")?;
    assert_eq!(all(&whole)?, all(&resumed)?);
    assert!(saved(&mut opt)? == saved(&mut opt_resumed)?);
    assert_eq!(opt.schedule_step(), Some(ends));
    assert!(opt.frozen().is_empty());
    assert!(opt.grad_scale() > 65536., "{}", opt.grad_scale());
    // A restart wrote into the same file, one header in all.
    let text = |name: &str| std::fs::read_to_string(path(name));
    assert_eq!(text("whole.csv")?.lines().count(), text("part.csv")?.lines().count());
    let held_out = accuracy(&whole, &digits.held_out, &parity(&digits.held_out)?)?;
    assert!(held_out > 0.9, "{held_out}");
    Ok(())
}

/// Four members; every ten steps the worst takes over what the best has, with another learning rate. By hand: each member trained
/// alone from the snapshot that it took has the same bits.
#[test]
fn a_population() -> Result<()> {
    let target = noise(50, 1., 7);
    let quadratic = |w: &Var| (w.as_tensor() - &tensor(&target, DType::F32)?)?.sqr()?.mean_all();
    let params = |lr| ParamsSrkl { state: StateFormat::Compact, ..ParamsSrkl::adamw(lr) };
    let member = |lr: f64| -> Result<(Var, Srkl)> {
        let w = var(&[0.; 50], DType::F32)?;
        let opt =
            Srkl::builder().default_group(params(lr)).build([("w".to_string(), w.clone())])?;
        Ok((w, opt))
    };
    let mut members: Vec<(Var, Srkl)> =
        [1e-4, 1e-3, 1e-2, 0.3].into_iter().map(member).collect::<Result<_>>()?;
    let mut history = vec![];
    for round in 0..8 {
        let mut losses = vec![];
        for (w, opt) in &mut members {
            for _ in 0..10 {
                opt.backward_step(&quadratic(w)?)?;
            }
            losses.push(quadratic(w)?.to_scalar::<f32>()?);
        }
        let by = |of: fn(&f32, &f32) -> bool| {
            (0..4).reduce(|a, b| if of(&losses[b], &losses[a]) { b } else { a }).unwrap()
        };
        let (best, worst) = (by(|a, b| a < b), by(|a, b| a > b));
        let snapshot = members[best].1.snapshot()?;
        let lr = members[best].1.learning_rate() * if round % 2 == 0 { 1.3 } else { 0.8 };
        let (_, opt) = &mut members[worst];
        opt.restore(&snapshot)?;
        opt.set_learning_rate(lr);
        assert_eq!(bits(&members[worst].0)?, bits(&members[best].0)?);
        history.push((worst, snapshot, lr));
    }
    let (last, snapshot, lr) = history.pop().unwrap();
    let (w, mut alone) = member(0.5)?;
    alone.restore(&snapshot)?;
    alone.set_params(DEFAULT_GROUP, params(lr))?;
    let (w_there, there) = &mut members[last];
    for _ in 0..20 {
        alone.backward_step(&quadratic(&w)?)?;
        there.backward_step(&quadratic(w_there)?)?;
    }
    assert_eq!(bits(&w)?, bits(w_there)?);
    assert!(quadratic(&w)?.to_scalar::<f32>()? < 0.05);
    Ok(())
}

/// A generator and a critic, of one graph: each step has gradients of both, and moves one. Then by one optimizer that freezes
/// the other half: the same bits.
#[test]
fn two_networks_against_each_other() -> Result<()> {
    let build = || -> Result<VarMap> {
        let varmap = VarMap::new();
        layer(&varmap, "generator.0", (4, 16), 1)?;
        layer(&varmap, "generator.1", (16, 2), 2)?;
        layer(&varmap, "critic.0", (2, 16), 3)?;
        layer(&varmap, "critic.1", (16, 1), 4)?;
        Ok(varmap)
    };
    let net = |varmap: &VarMap, name: &str, x: &Tensor| {
        let hidden = forward(varmap, &format!("{name}.0"), x)?.tanh()?;
        forward(varmap, &format!("{name}.1"), &hidden)
    };
    let half = |varmap: &VarMap, which: &str| {
        let data = varmap.data().lock().unwrap();
        let named = data.iter().filter(|(name, _)| name.starts_with(which));
        let mut named: Vec<(String, Var)> = named.map(|(n, v)| (n.clone(), v.clone())).collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        named
    };
    let params = || ParamsSrkl { cautious: true, ..ParamsSrkl::lion(3e-3) };
    let samples = |step: u64, salt: u64| noisy_matrix((16, 4), 1., 2 * step + salt, DType::F32);
    let losses = |varmap: &VarMap, step: u64| -> Result<[Tensor; 2]> {
        let fake = net(varmap, "generator", &samples(step, 0)?)?;
        let real = samples(step, 1)?.narrow(1, 0, 2)?.affine(0.5, 2.)?.contiguous()?;
        let (of_fake, of_real) = (net(varmap, "critic", &fake)?, net(varmap, "critic", &real)?);
        let critic = ((&of_fake - 1.)?.sqr()?.mean_all()? + (of_real + 1.)?.sqr()?.mean_all()?)?;
        Ok([critic, (of_fake + 1.)?.sqr()?.mean_all()?])
    };
    let names = ["critic", "generator"];

    let apart = build()?;
    let mut two: Vec<Srkl> = names
        .iter()
        .map(|name| Srkl::builder().default_group(params()).build(half(&apart, name)))
        .collect::<Result<_>>()?;
    let together = build()?;
    let mut one = Srkl::builder().default_group(params()).build_varmap(&together)?;
    for step in 0..300 {
        for (i, name) in names.iter().enumerate() {
            let grads = losses(&apart, step)?[i].backward()?;
            // Of every network, and the optimizer takes its own.
            if step % 2 == 0 {
                two[i].step_consuming(grads)?
            } else {
                two[i].step(&grads)?
            }

            one.unfreeze(|_| true)?;
            one.freeze(|other| !other.starts_with(name))?;
            one.step(&losses(&together, step)?[i].backward()?)?;
        }
        // A direction with bias corrections would count a parameter's own steps, which is right too.
        assert_eq!(all(&apart)?, all(&together)?, "step {step}");
    }
    let fake = net(&apart, "generator", &samples(1000, 0)?)?;
    assert!(values(&fake)?.iter().all(|x| x.is_finite()));
    Ok(())
}

/// A network gets a layer that starts as the identity; micro-batches of other sizes each step, some of which don't use all
/// layers; in bf16 with split masters, averaged.
#[test]
fn a_network_gets_deeper() -> Result<()> {
    let digits = Digits::load(0, DType::F32, &Device::Cpu).unwrap();
    let vars: RefCell<HashMap<String, Var>> = RefCell::default();
    let put = |name: &str, value: Tensor| -> Result<(String, Var)> {
        let var = Var::from_tensor(&value.to_dtype(DType::BF16)?)?;
        vars.borrow_mut().insert(name.to_string(), var.clone());
        Ok((name.to_string(), var))
    };
    let matrix = |n, m, salt| noisy_matrix((n, m), (2. / n as f64).sqrt(), salt, DType::F32);
    let start = [put("in", matrix(PIXELS, 48, 1)?)?, put("out", matrix(48, 10, 2)?)?];
    let params = ParamsSrkl {
        master_weights: MasterWeights::Split,
        state: StateFormat::Compact,
        average: Some(Average::Exponential(0.9)),
        direction: Direction::NesterovAdam { beta1: 0.9, beta2: 0.99, eps: 1e-8 },
        ..ParamsSrkl::adamw(3e-3)
    };
    let mut opt = Srkl::builder().default_group(params).build(start)?;
    opt.set_reduction(Reduction::Sum)?;
    let logits = |x: &Tensor, deep: bool| -> Result<Tensor> {
        let vars = vars.borrow();
        let mut x = x.to_dtype(DType::BF16)?.matmul(&vars["in"])?.relu()?;
        if let (Some(w), true) = (vars.get("middle"), deep) {
            x = x.matmul(w)?.relu()?;
        }
        x.matmul(&vars["out"])?.to_dtype(DType::F32)
    };
    let right = || -> Result<f64> {
        let classes = &digits.held_out.classes;
        let right = logits(&digits.held_out.images, true)?.argmax(D::Minus1)?.eq(classes)?;
        right.to_dtype(DType::F64)?.mean_all()?.to_scalar()
    };
    let mut at_growth = 0.;
    for step in 0..240u64 {
        if step == 80 {
            at_growth = right()?;
            let middle = put("middle", Tensor::eye(48, DType::F32, &Device::Cpu)?)?;
            opt.add_parameters(DEFAULT_GROUP, [middle])?;
            // ReLU of ReLU is ReLU.
            assert_eq!(right()?, at_growth);
        }
        let sizes: &[usize] = [&[32][..], &[8, 24], &[11, 1, 20]][step as usize % 3];
        for (i, n) in sizes.iter().enumerate() {
            let part = batch(&digits, *n, 10 * step + i as u64)?;
            let loss =
                candle_nn::loss::cross_entropy(&logits(&part.images, i % 2 == 0)?, &part.classes)?;
            // Mean over all 32 examples.
            opt.accumulate(&(loss * (*n as f64 / 32.))?.backward()?)?;
        }
        opt.step_accumulated()?;
    }
    let plain = right()?;
    let averaged = {
        let _averaged = opt.swap_averaged()?;
        right()?
    };
    assert!(
        plain > 0.9 && averaged > 0.9 && plain > at_growth - 0.02,
        "{at_growth} {plain} {averaged}"
    );
    Ok(())
}
