//! A step beside other users of the parameters, in other threads: nobody waits for ever.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{NonFinite, ParamsSrkl, Srkl};
use common::{LARGE, bits, grads, noise, pool, tensor, var};
use rayon::prelude::*;

/// Fails if `work` takes minutes, which only a deadlock does.
fn within_minutes(work: impl FnOnce() -> Result<()> + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(Duration::from_secs(180)).expect("a deadlock, or a panic").unwrap();
}

/// Large matrices, and small ones beside them.
fn model() -> Result<(Vec<Var>, GradStore)> {
    let shapes = [(1000, 1000), (1000, 10), (1000, 1000), (1000, 300), (1000, 1)];
    let vars: Vec<Var> = shapes
        .iter()
        .map(|&shape| Var::zeros(shape, DType::F32, &Device::Cpu))
        .collect::<Result<_>>()?;
    let mut store = GradStore::default();
    for var in &vars {
        store.insert(var, var.ones_like()?);
    }
    Ok((vars, store))
}

/// Matrix products run in rayon's global pool, and hold the locks of their inputs.
#[test]
fn forward_passes_beside_a_step() {
    for readers in 1..=3 {
        within_minutes(move || {
            let (vars, store) = model()?;
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..readers {
                    scope.spawn(|| {
                        let x = Tensor::ones((16, 1000), DType::F32, &Device::Cpu).unwrap();
                        while !done.load(Ordering::Relaxed) {
                            vars.iter().for_each(|w| drop(x.matmul(w).unwrap()));
                        }
                    });
                }
                let mut opt = Srkl::new(vars.clone(), ParamsSrkl::reference())?;
                let result = (0..200).try_for_each(|_| opt.step(&store));
                done.store(true, Ordering::Relaxed);
                result
            })
        });
    }
}

#[test]
fn two_optimizers_of_the_same_variables() {
    for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock] {
        within_minutes(move || {
            let (mut vars, store) = model()?;
            let params = ParamsSrkl { nonfinite, ..ParamsSrkl::reference() };
            let mut first = Srkl::new(vars.clone(), params.clone())?;
            vars.reverse();
            let mut second = Srkl::new(vars, params)?;
            std::thread::scope(|scope| {
                let other = scope.spawn(|| (0..300).try_for_each(|_| first.step(&store)));
                (0..300).try_for_each(|_| second.step(&store))?;
                other.join().unwrap()
            })
        });
    }
}

/// A step does not use the pool that it is called in, neither where it has threads nor where it has none: one
/// that waits would take up a forward pass, and hold the lock that this one waits for.
#[test]
fn a_step_and_forward_passes_in_one_pool() {
    for threads in [1, 3] {
        within_minutes(move || {
            let (vars, store) = model()?;
            let build = || Srkl::new(vars.clone(), ParamsSrkl::reference());
            let mut opt = pool(threads)?.install(build)?;
            let pool = pool(3)?;
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        while !done.load(Ordering::Relaxed) {
                            vars.iter().for_each(|w| pool.install(|| drop(w.sum_all().unwrap())));
                        }
                    });
                }
                let result = pool.install(|| (0..200).try_for_each(|_| opt.step(&store)));
                done.store(true, Ordering::Relaxed);
                result
            })
        });
    }
}

/// Optimizers that share one pool: of variables of their own, of some that others have too, and of common ones.
fn optimizers(count: usize) -> Result<Vec<(Srkl, GradStore, Vec<Var>)>> {
    let pool = pool(4)?;
    let (common, common_store) = model()?;
    let made = (0..count).map(|i| {
        let (mut vars, store) = model()?;
        match i % 3 {
            0 => {}
            1 => vars.extend(common.iter().take(2).cloned()),
            _ => vars = common.iter().rev().cloned().collect(),
        }
        let mut all = GradStore::default();
        for var in &vars {
            let grad = store.get(var).or_else(|| common_store.get(var));
            grad.map(|grad| all.insert(var, grad.clone()));
        }
        let nonfinite = [NonFinite::SkipStep, NonFinite::SkipBlock][i % 2];
        let params = ParamsSrkl { nonfinite, ..ParamsSrkl::reference() };
        Ok((pool.install(|| Srkl::new(vars.clone(), params))?, all, vars))
    });
    made.collect()
}

/// Forward passes until `done`.
fn read_until(done: &AtomicBool, vars: &[Var]) {
    let x = Tensor::ones((16, 1000), DType::F32, &Device::Cpu).unwrap();
    while !done.load(Ordering::Relaxed) {
        vars.iter().for_each(|w| drop(x.matmul(w).unwrap()));
    }
}

#[test]
fn several_optimizers_on_threads_of_their_own() {
    within_minutes(|| {
        let mut all = optimizers(6)?;
        let read: Vec<Var> = all.iter().flat_map(|(_, _, vars)| vars.clone()).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| read_until(&done, &read));
            let step = |(opt, store, _): &mut (Srkl, GradStore, Vec<Var>)| {
                (0..60).try_for_each(|_| opt.step(store))
            };
            let steps: Vec<_> =
                all.iter_mut().map(|item| scope.spawn(move || step(item))).collect();
            let results: Vec<_> = steps.into_iter().map(|step| step.join().unwrap()).collect();
            done.store(true, Ordering::Relaxed);
            results.into_iter().collect()
        })
    });
}

/// A thread of rayon that waits takes up another optimizer's step, and forward passes, in the middle of its own.
#[test]
fn several_optimizers_on_threads_of_rayon() {
    within_minutes(|| {
        let pool = pool(3)?;
        let mut all = optimizers(7)?;
        let x = Tensor::ones((16, 1000), DType::F32, &Device::Cpu)?;
        for _ in 0..40 {
            // Not of the common variables: on those, a forward pass would wait for the step it took up.
            let own = all.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0).map(|(_, item)| item);
            let own: Vec<_> = own.collect();
            let step = |(opt, store, _): &mut (Srkl, GradStore, Vec<Var>)| opt.step(store);
            let (other, _) = model()?;
            let read = || other.iter().try_for_each(|w| x.matmul(w).map(drop));
            let steps = || own.into_par_iter().with_max_len(1).try_for_each(step);
            let (steps, read) = pool.install(|| rayon::join(steps, read));
            steps.and(read)?;
        }
        Ok(())
    });
}

/// Beside others, without its turn in the pool, a step gives the same bits as alone.
#[test]
fn the_same_bits_beside_others() -> Result<()> {
    let make = || -> Result<Vec<(Srkl, GradStore, Var)>> {
        let pool = pool(4)?;
        let one = |i: u64| {
            let w = var(&noise(LARGE, 1., i), DType::F32)?;
            let store = grads([(&w, tensor(&noise(LARGE, 1., i + 5), DType::F32)?)]);
            let params = ParamsSrkl { max_grad_norm: Some(1.), ..ParamsSrkl::reference() };
            let opt = pool.install(|| Srkl::new(vec![w.clone()], params))?;
            Ok((opt, store, w))
        };
        (0..4).map(one).collect()
    };
    let step =
        |(opt, store, _): &mut (Srkl, GradStore, Var)| (0..20).try_for_each(|_| opt.step(store));
    let (mut alone, mut beside) = (make()?, make()?);
    let start = bits(&alone[0].2)?;
    alone.iter_mut().try_for_each(step)?;
    pool(4)?.install(|| beside.par_iter_mut().with_max_len(1).try_for_each(step))?;
    assert_ne!(bits(&alone[0].2)?, start);
    for ((_, _, alone), (_, _, beside)) in alone.iter().zip(&beside) {
        assert!(bits(alone)? == bits(beside)?);
    }
    Ok(())
}
