//! `step_consuming`: the bits of `step`, and gradients that are freed before the last parameter moves.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::thread;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    GradScaler, LrSchedule, MasterWeights, NonFinite, ParamsSrkl, Rounding, Scope, Srkl,
    StateFormat, Threads,
};
use common::*;

/// The number of elements of each parameter whose gradients are watched: of no other allocation.
const WATCHED: usize = (1 << 20) + 16;

/// The first element of the last of them, and its bits at first.
static LAST: AtomicPtr<u32> = AtomicPtr::new(std::ptr::null_mut());
static AT_FIRST: AtomicU32 = AtomicU32::new(0);

/// How many gradients were freed while it was what it was at first.
static FREED_BEFORE: AtomicUsize = AtomicUsize::new(0);

struct Watching;

// SAFETY: all is done by `System`.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        let last = LAST.load(Ordering::Relaxed);
        // SAFETY: if it is not null it is in a parameter that lives; nothing writes to it when gradients are freed.
        if layout.size() == 4 * WATCHED
            && !last.is_null()
            && unsafe { last.read() } == AT_FIRST.load(Ordering::Relaxed)
        {
            FREED_BEFORE.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: as of the caller.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// All but the last gradient are freed before the last parameter moves, whatever the policy is.
#[test]
fn gradients_are_freed_in_the_course_of_the_step() -> Result<()> {
    for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate] {
        for consumes in [true, false] {
            let ones = || Tensor::ones(WATCHED, DType::F32, &Device::Cpu);
            let vars: Vec<Var> =
                (0..6).map(|_| Var::from_tensor(&ones()?)).collect::<Result<_>>()?;
            let params = ParamsSrkl { nonfinite, ..ParamsSrkl::adamw(0.1) };
            let mut opt = Srkl::new(vars.clone(), params)?;
            let store =
                grads(vars.iter().map(|var| Ok((var, ones()?))).collect::<Result<Vec<_>>>()?);
            {
                let (storage, _) = vars[5].storage_and_layout();
                let Storage::Cpu(CpuStorage::F32(w)) = &*storage else { unreachable!() };
                AT_FIRST.store(w[0].to_bits(), Ordering::Relaxed);
                LAST.store(w.as_ptr().cast_mut().cast(), Ordering::Relaxed);
            }
            FREED_BEFORE.store(0, Ordering::Relaxed);
            if consumes {
                opt.step_consuming(store)?
            } else {
                opt.step(&store)?
            }
            LAST.store(std::ptr::null_mut(), Ordering::Relaxed);
            let freed = FREED_BEFORE.load(Ordering::Relaxed);
            assert_eq!(freed, if consumes { 5 } else { 0 }, "{nonfinite:?}");
        }
    }
    Ok(())
}

fn settings() -> Vec<(DType, ParamsSrkl)> {
    let packed = ParamsSrkl {
        state: StateFormat::Compact,
        master_weights: MasterWeights::None,
        rounding: Rounding::Stochastic,
        ..ParamsSrkl::adamw(0.01)
    };
    let policy = |nonfinite| ParamsSrkl { nonfinite, ..ParamsSrkl::reference() };
    let clipped = ParamsSrkl { max_grad_norm: Some(0.5), ..ParamsSrkl::sgd(0.1) };
    let trusting = ParamsSrkl { trust: Some(0.1), ..ParamsSrkl::sgd(0.1) };
    let global = ParamsSrkl { scope: Scope::Global, ..ParamsSrkl::reference() };
    let f32 = [
        policy(NonFinite::SkipBlock),
        policy(NonFinite::Propagate),
        ParamsSrkl::adamw(0.01),
        ParamsSrkl::muon(0.01),
        clipped,
        trusting,
        global,
    ];
    let f32 = f32.into_iter().map(|params| (DType::F32, params));
    f32.chain([(DType::BF16, packed), (DType::F16, ParamsSrkl::adamw(0.01))]).collect()
}

/// Gradients of step `i`; some are missing, and in step 2 one is a NaN.
fn gradients(vars: &[Var], i: u64) -> Result<GradStore> {
    let mut store = grads([]);
    for (place, var) in vars.iter().enumerate().filter(|(place, _)| place % 7 != i as usize) {
        let mut g = noise(var.elem_count(), 1., 100 * i + place as u64);
        if i == 2 && place == 3 {
            g[0] = f64::NAN;
        }
        store.insert(var, tensor(&g, var.dtype())?.reshape(var.shape())?);
    }
    Ok(store)
}

#[test]
fn the_bits_of_a_step() -> Result<()> {
    for (dtype, params) in settings() {
        let train = |consumes: bool| -> Result<_> {
            let sizes = [PIECE + 1, 3, 700_000, 5, 64, 500_001, 1, 900, 900];
            let mut vars = noisy_vars(&sizes, 1., dtype)?;
            vars.push(Var::from_tensor(&noisy_matrix((40, 60), 1., 5, dtype)?)?);
            let mut opt = Srkl::new(vars.clone(), params.clone())?;
            opt.record_norms(true);
            for i in 0..4 {
                let store = gradients(&vars, i)?;
                if consumes { opt.step_consuming(store)? } else { opt.step(&store)? }
            }
            let told = format!("{:?} {:?}", opt.telemetry()?, opt.grad_norm()?);
            Ok((all_bits(&vars, &opt)?, told, opt.steps()?, opt.skipped_steps()?))
        };
        assert!(train(true)? == train(false)?, "{dtype:?} {params:?}");
    }
    Ok(())
}

/// With ranks, some of which consume, too.
#[test]
fn the_bits_of_a_step_of_ranks() {
    for sharded in [false, true] {
        let train = |rank: Threads, consumes: bool| -> Result<_> {
            let vars = noisy_vars(&[20_000, 7, 9_000, 5], 1., DType::F32)?;
            let named = vars.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone()));
            let builder = Srkl::builder().default_group(ParamsSrkl::adamw(0.01)).collective(rank);
            let mut opt = builder.sharded(sharded).build(named)?;
            for i in 0..3 {
                let store = gradients(&vars, 10 * i + opt.rank() as u64)?;
                if consumes && opt.rank() == 0 {
                    opt.step_consuming(store)?
                } else {
                    opt.step(&store)?
                }
            }
            vars.iter().map(|var| bits(var)).collect()
        };
        let all = |consumes| -> Vec<Vec<Vec<u64>>> {
            thread::scope(|scope| {
                let ranks = Threads::new(2).into_iter();
                let ranks: Vec<_> =
                    ranks.map(|rank| scope.spawn(move || train(rank, consumes))).collect();
                ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
            })
        };
        assert!(all(true) == all(false), "sharded: {sharded}");
    }
}

/// Nothing but the gradients is lost.
#[test]
fn what_fails_changes_nothing() -> Result<()> {
    let vars = noisy_vars(&[900_000, 900_000, 3], 1., DType::F32)?;
    let policy = ParamsSrkl { nonfinite: NonFinite::Propagate, ..ParamsSrkl::adamw(0.1) };
    let mut opt = Srkl::new(vars.clone(), policy)?;
    let before = all_bits(&vars, &opt)?;
    let mut store = gradients(&vars, 1)?;
    store.insert(&vars[2], tensor(&[1., 2.], DType::F32)?);
    assert_error(opt.step_consuming(store), &["`2`", "shape"]);
    assert!(all_bits(&vars, &opt)? == before);
    assert_eq!(opt.steps()?, 0);

    let w = var(&[1., -2., 3.], DType::F32)?;
    let loss = || w.sqr()?.sum_all();
    for params in [ParamsSrkl::braked_adam(), ParamsSrkl::hessian()] {
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        assert_error(opt.step_consuming(loss()?.backward()?), &["measure"]);
        assert_eq!(values(&w)?, [1., -2., 3.]);
        opt.skip_measurement();
        opt.step_consuming(loss()?.backward()?)?;
        assert_eq!(opt.steps()?, 1);
        assert!(opt.measuring());
    }
    Ok(())
}

/// A schedule and a scaler follow it as they follow `step`, and so do braked steps that do not measure.
#[test]
fn what_follows_steps_follows_consuming_ones() -> Result<()> {
    let run = |consumes: bool| -> Result<(Vec<u64>, Vec<f64>)> {
        let w = var(&noise(9000, 1., 1), DType::F32)?;
        let params = ParamsSrkl::braked_adam();
        let mut opt =
            Srkl::builder().default_group(params).build([("w".to_string(), w.clone())])?;
        opt.set_schedule(Some(LrSchedule::linear_decay(20, 0.1)))?;
        opt.set_grad_scaler(Some(GradScaler { growth_interval: 3, ..GradScaler::default() }))?;
        let mut seen = vec![];
        for step in 0..25 {
            let scale = opt.grad_scale();
            seen.extend([scale, opt.learning_rate()]);
            let loss = || w.sqr()?.mean_all()? * if step == 15 { f64::NAN } else { scale };
            if consumes && !opt.measuring() {
                opt.step_consuming(loss()?.backward()?)?;
            } else {
                opt.backward_step_with(loss)?;
            }
        }
        Ok((bits(&w)?, seen))
    };
    let (bits, seen) = run(true)?;
    assert!((bits, &seen) == (run(false)?.0, &run(false)?.1));
    assert!(seen.windows(3).any(|s| s[0] > s[2]) && seen.windows(3).any(|s| s[0] < s[2]));
    Ok(())
}
