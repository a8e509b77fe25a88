//! A step beside other users of the parameters, in other threads: nobody waits for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{NonFinite, ParamsSrkl, Srkl};

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

/// The two halves of a `join` are work of one pool.
#[test]
fn a_step_and_a_forward_pass_in_one_pool() {
    within_minutes(|| {
        let (vars, store) = model()?;
        let mut opt = Srkl::new(vars.clone(), ParamsSrkl::reference())?;
        let x = Tensor::ones((16, 1000), DType::F32, &Device::Cpu)?;
        for _ in 0..200 {
            let read = || vars.iter().try_for_each(|w| x.matmul(w).map(drop));
            let (step, read) = rayon::join(|| opt.step(&store), read);
            step.and(read)?;
        }
        Ok(())
    });
}
