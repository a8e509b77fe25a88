//! Several ranks: the bits of one process, and what happens if ranks disagree, fail or leave.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{Module, Optimizer, VarBuilder, VarMap, linear};
use candle_srkl::{
    Average, Collective, Direction, Dropout, MasterWeights, Measure, ParamsSrkl, Srkl, StateFormat,
    Threads,
};
use common::suite::{sizes, suite};
use common::training::{Left, Share, assert_same, train_share};

use common::*;

/// Runs every rank in a thread of its own, and ends the process if they wait for each other for ever.
fn ranks<T: Send>(world_size: usize, run: impl Fn(Threads) -> Result<T> + Sync) -> Vec<Result<T>> {
    unless_they_wait(|| run_ranks(world_size, run))
}

fn run_ranks<T: Send>(
    world_size: usize,
    run: impl Fn(Threads) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    thread::scope(|scope| {
        let start = |rank| {
            let run = &run;
            scope.spawn(move || run(rank))
        };
        let started: Vec<_> = Threads::new(world_size).into_iter().map(start).collect();
        let ended = started
            .into_iter()
            .map(|rank| rank.join().unwrap_or_else(|_| Err(Error::msg("a rank has panicked"))));
        ended.collect()
    })
}

/// What a training of the suite leaves on each rank.
fn train(
    params: &ParamsSrkl,
    sizes: &[usize],
    seed: u64,
    (world_size, micro_batches): (usize, u64),
    (bucket_bytes, sharded): (usize, bool),
) -> Result<Vec<Vec<Left>>> {
    let folder = tempfile::tempdir()?;
    let shapes: Vec<Vec<usize>> = sizes.iter().map(|n| vec![*n]).collect();
    let run = |rank| {
        let share = Share {
            micro_batches,
            rank: Some(Arc::new(Mutex::new(Box::new(rank)))),
            bucket_bytes,
            sharded,
            folder: Some(folder.path().to_path_buf()),
        };
        train_share(params, &shapes, seed, &[&Device::Cpu], &share)
    };
    let left = ranks(world_size, run);
    // Whoever fails first says why.
    left.iter().filter_map(|left| left.as_ref().err()).for_each(|e| eprintln!("{e}"));
    left.into_iter().collect()
}

/// All of the suite that guards the bits: 8 micro-batches in one process, and over ranks; 12 too.
#[test]
fn the_bits_of_one_process() -> Result<()> {
    for (case, (name, params)) in suite().iter().enumerate() {
        let seed = 1 + case as u64;
        let worlds: &[usize] = if case % 8 == 0 { &[2, 4, 8] } else { &[[2, 4, 8][case % 3]] };
        let twelve: &[usize] = if case % 10 == 0 { &[3, 6, 12] } else { &[] };
        for (micro_batches, worlds) in [(8, worlds), (12, twelve)] {
            if worlds.is_empty() {
                continue;
            }
            let one = &train(params, sizes(params), seed, (1, micro_batches), (1, false))?[0];
            for world_size in worlds {
                // From a few elements to all at once.
                let bucket_bytes = [1 << 24, 1000, 40_000][(case + world_size) % 3];
                let share = (*world_size, micro_batches);
                for sharded in [false, true] {
                    let how = (bucket_bytes, sharded);
                    for each in train(params, sizes(params), seed, share, how)? {
                        assert_same(&each, one, &format!("{name}, {share:?}, {how:?}"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Parameters whose elements threads share, and shards that begin in the middle.
#[test]
fn the_bits_of_one_process_of_large_parameters() -> Result<()> {
    let sizes = [3, 5, 70_000, 7, 1025, 9, 131_072, 1, 200_001, 17, 31, 8192, 4097, 2];
    let suite = suite();
    for case in [1, 7, 20, suite.len() - 5, suite.len() - 3] {
        let (name, params) = &suite[case];
        let one = &train(params, &sizes, 3, (1, 2), (1, false))?[0];
        for (world_size, bucket_bytes) in [(1, 1), (2, 1 << 16)] {
            for each in train(params, &sizes, 3, (world_size, 2), (bucket_bytes, true))? {
                assert_same(&each, one, name);
            }
        }
    }
    Ok(())
}

/// Parameters on CUDA devices, by way of the host.
#[cfg(feature = "cuda")]
#[test]
fn the_bits_of_one_process_on_cuda_devices() -> Result<()> {
    let suite = suite();
    let last = suite.len() - 1;
    let replicated = [5, 20, last - 2].map(|case| (case, false));
    let sharded = [7, 18, 38, 41, last - 5, last - 4, last - 2, last].map(|case| (case, true));
    let cases = replicated.into_iter().chain(sharded).map(|(case, sharded)| (case, sharded, false));
    // Where some parameters are on the CPU the host decides.
    let mixed = [7, 38, last - 5, last - 4, last - 2].map(|case| (case, true, true));
    for (case, sharded, mixed) in cases.chain(mixed) {
        let (name, params) = &suite[case];
        let one = &train(params, sizes(params), 7, (1, 4), (1, false))?[0];
        let folder = tempfile::tempdir()?;
        let shapes: Vec<Vec<usize>> = sizes(params).iter().map(|n| vec![*n]).collect();
        let run = |rank| {
            let share = Share {
                micro_batches: 4,
                rank: Some(Arc::new(Mutex::new(Box::new(rank)))),
                bucket_bytes: 20_000,
                sharded,
                folder: Some(folder.path().to_path_buf()),
            };
            let device = Device::new_cuda(0)?;
            let devices = if mixed { &[&device, &Device::Cpu][..] } else { &[&device] };
            train_share(params, &shapes, 7, devices, &share)
        };
        for each in ranks(2, run) {
            assert_same(&each?, one, &format!("{name}, {sharded}, {mixed}"));
        }
    }
    Ok(())
}

/// Matrices of CUDA devices that are orthogonalised by their owners. (By one device's products, whose bits need not be those of
/// the CPU.)
#[cfg(feature = "cuda")]
#[test]
fn matrices_of_owners_on_cuda_devices() -> Result<()> {
    let shape = |dims: &[usize]| dims.to_vec();
    let shapes = [
        shape(&[64, 32]),
        shape(&[300]),
        shape(&[32, 64]),
        shape(&[64, 32]),
        shape(&[9001]),
        shape(&[3, 40, 40]),
        shape(&[16, 16]),
        shape(&[5]),
        shape(&[24, 8]),
        shape(&[128, 100]),
        shape(&[1]),
    ];
    let measure = Measure { every: 3, ..Measure::default() };
    for params in [
        ParamsSrkl {
            measure,
            repeatable: candle_srkl::Repeatable::Assume,
            ..ParamsSrkl::braked_muon_averaged()
        },
        ParamsSrkl { state: StateFormat::Compact, ..ParamsSrkl::muon(0.02) },
    ] {
        let run = |world_size| -> Result<Vec<Vec<Left>>> {
            let folder = tempfile::tempdir()?;
            let run = |rank| {
                let share = Share {
                    micro_batches: 4,
                    rank: Some(Arc::new(Mutex::new(Box::new(rank)))),
                    bucket_bytes: 20_000,
                    sharded: true,
                    folder: Some(folder.path().to_path_buf()),
                };
                train_share(&params, &shapes, 7, &[&Device::new_cuda(0)?], &share)
            };
            ranks(world_size, run).into_iter().collect()
        };
        let one = &run(1)?[0];
        for each in run(2)? {
            assert_same(&each, one, &format!("{params:?}"));
        }
    }
    Ok(())
}

/// Ranks that step nothing.
#[cfg(feature = "cuda")]
#[test]
fn ranks_without_a_chunk_on_cuda_devices() -> Result<()> {
    let run = |rank: Threads| {
        let device = Device::new_cuda(0)?;
        let vars = [(5000, DType::BF16), (1, DType::F32)].map(|(n, dtype)| {
            Var::from_tensor(&tensor(&noise(n, 1., n as u64), dtype)?.to_device(&device)?)
        });
        let [a, b] = vars;
        let (a, b) = (a?, b?);
        let named = [("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
        let params = ParamsSrkl { max_grad_norm: Some(1.), ..ParamsSrkl::braked_adam_averaged() };
        let builder = Srkl::builder().default_group(params).collective(rank).sharded(true);
        let mut opt = builder.build(named)?;
        opt.record_norms(true);
        let mut told = vec![];
        for step in 0..3 {
            let loss = || {
                (a.to_dtype(DType::F32)?.sqr()?.sum_all()? + b.sqr()?.sum_all()?)?
                    * (1. + step as f64)
            };
            opt.backward_step_with(loss)?;
            told.push(format!("{:?} {:?}", opt.telemetry()?, opt.grad_norm()?));
            drop(opt.swap_averaged()?);
        }
        let bits = [bits(&a.to_device(&Device::Cpu)?)?, bits(&b.to_device(&Device::Cpu)?)?];
        Ok((told, bits, opt.master("a")?))
    };
    let one = ranks(1, run).remove(0)?;
    for each in ranks(4, run) {
        // The mean of four equal losses.
        assert_eq!(each?, one);
    }
    Ok(())
}

/// Fails in a call after some others, and leaves it to the rest to notice.
struct Failing(Threads, Arc<AtomicU64>);

impl Failing {
    fn count(&mut self) -> Result<()> {
        match self.1.fetch_sub(1, Ordering::Relaxed) {
            0 => candle_core::bail!("the network is gone"),
            _ => Ok(()),
        }
    }
}

impl Collective for Failing {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn world_size(&self) -> usize {
        self.0.world_size()
    }
    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        self.count().and_then(|()| self.0.all_to_all(from, parts, to))
    }
    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        self.count().and_then(|()| self.0.all_gather(whole, parts))
    }
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.count().and_then(|()| self.0.exchange(own))
    }
    fn abort(&mut self, why: &str) {
        self.0.abort(why);
    }
}

/// Parameters that are perturbed or averaged are restored, whatever call of the transport fails.
fn restored_after_failures(device: &(dyn Fn() -> Result<Device> + Sync)) -> Result<()> {
    for swaps in [true, false] {
        let mut failures = 0;
        for calls in 0..12 {
            let run = |rank: Threads| {
                let device = device()?;
                let left = Arc::new(AtomicU64::new(u64::MAX));
                let failing = rank.rank() == 1;
                let start = tensor(&noise(40_000, 1., 0), DType::F32)?.to_device(&device)?;
                let var = Var::from_tensor(&start)?;
                let params = match swaps {
                    true => ParamsSrkl {
                        average: Some(Average::Exponential(0.9)),
                        ..ParamsSrkl::adamw(1e-2)
                    },
                    false => ParamsSrkl::hessian(),
                };
                let builder = Srkl::builder().default_group(params).sharded(true);
                let builder = builder.collective(Failing(rank, left.clone())).bucket_bytes(60_000);
                let mut opt = builder.build([("w".to_string(), var.clone())])?;
                let gradient = tensor(&noise(40_000, 1., 1), DType::F32)?.to_device(&device)?;
                let gradients = grads([(&var, gradient)]);
                // An average is what has been stepped once.
                for _ in 0..3 {
                    opt.skip_measurement();
                    opt.step(&gradients)?;
                }
                let bits_of = |var: &Var| bits(&var.to_device(&Device::Cpu)?);
                let before = bits_of(&var)?;
                if failing {
                    left.store(calls, Ordering::Relaxed);
                }
                let failed = match swaps {
                    true => opt.swap_averaged().map(|_| ()).is_err(),
                    false => opt.perturb(&gradients).map(|_| ()).is_err(),
                };
                assert!(bits_of(&var)? == before, "{swaps} {calls}");
                Ok(failed)
            };
            let failed: Vec<bool> = ranks(3, run).into_iter().collect::<Result<_>>()?;
            failures += failed.iter().all(|failed| *failed) as u64;
        }
        assert!(failures > 2, "{swaps}: {failures}");
    }
    Ok(())
}

#[test]
fn restored_whatever_fails() -> Result<()> {
    restored_after_failures(&|| Ok(Device::Cpu))
}

#[cfg(feature = "cuda")]
#[test]
fn restored_whatever_fails_on_cuda_devices() -> Result<()> {
    restored_after_failures(&|| Device::new_cuda(0))
}

/// Numbers of micro-batches that are no power of two a rank: the ranks agree with each other, and with one process but for
/// the order of additions.
#[test]
fn other_numbers_of_micro_batches() -> Result<()> {
    let params = ParamsSrkl::adamw(1e-2);
    let cases =
        [(2, 3, false), (3, 1, true), (4, 3, true), (5, 1, false), (5, 1, true), (3, 5, true)];
    for (world_size, each, sharded) in cases {
        let n = 9001;
        let start = noise(n, 1., 0);
        let gradient = |step: u64, i: usize| noise(n, 1., 100 * step + i as u64);
        let run = |rank: Threads| {
            let first = rank.rank() * each;
            let var = var(&start, DType::F32)?;
            let mut opt = Srkl::builder()
                .default_group(params.clone())
                .collective(rank)
                .sharded(sharded)
                .build([("w".to_string(), var.clone())])?;
            for step in 0..4 {
                for i in first..first + each {
                    opt.accumulate(&grads([(&var, tensor(&gradient(step, i), DType::F32)?)]))?;
                }
                opt.step_accumulated()?;
            }
            values(&var)
        };
        let after: Vec<Vec<f64>> = ranks(world_size, run).into_iter().collect::<Result<_>>()?;
        assert!(after.iter().all(|other| *other == after[0]), "{world_size} {each}");
        // By the mean, in f64.
        let var = var(&start, DType::F64)?;
        let mut opt = Srkl::new(vec![var.clone()], params.clone())?;
        for step in 0..4 {
            let mut mean = vec![0.; n];
            for i in 0..world_size * each {
                let share = (world_size * each) as f64;
                mean.iter_mut().zip(gradient(step, i)).for_each(|(mean, g)| *mean += g / share);
            }
            opt.step(&grads([(&var, tensor(&mean, DType::F64)?)]))?;
        }
        for (a, b) in after[0].iter().zip(values(&var)?) {
            assert!((a - b).abs() < 1e-4, "{world_size} {each}: {a} {b}");
        }
    }
    Ok(())
}

/// A network of a user, with dropout, trained by closures: the losses and parameters of one process.
fn network(
    rank: Option<Threads>,
    (micro_batches, sharded): (usize, bool),
    params: &ParamsSrkl,
) -> Result<Vec<Vec<u64>>> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let (first, second) = (linear(8, 400, vb.pp("first"))?, linear(400, 30, vb.pp("second"))?);
    let dropout = Dropout::new(0.3);
    let mut named: Vec<(String, Var)> =
        varmap.data().lock().unwrap().iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (salt, (_, var)) in named.iter().enumerate() {
        // Other ranks begin elsewhere: rank 0's values count.
        let rank = rank.as_ref().map_or(0, Collective::rank) as u64;
        let value = noise(var.elem_count(), 0.3, salt as u64 + 1000 * rank);
        var.set(&tensor(&value, DType::F32)?.reshape(var.shape())?)?;
    }
    let builder = Srkl::builder().default_group(params.clone());
    let mut opt = match rank {
        Some(rank) => builder.collective(rank).sharded(sharded).build_varmap(&varmap)?,
        None => builder.build_varmap(&varmap)?,
    };
    let each = micro_batches / opt.world_size();
    let before = opt.rank() * each;
    let mut left = vec![];
    for step in 0..6 {
        opt.backward_step_over(each, |i| {
            let number = (before + i) as u64;
            let x = tensor(&noise(4 * 8, 1., 10_000 + 100 * step + number), DType::F32)?;
            let y = dropout.forward(&first.forward(&x.reshape((4, 8))?)?.relu()?, true)?;
            second.forward(&y)?.sqr()?.mean_all()
        })?;
        for (_, var) in &named {
            left.push(bits(var)?);
        }
    }
    Ok(left)
}

#[test]
fn a_network_with_dropout() -> Result<()> {
    let often = Measure { every: 2, ..Measure::default() };
    let compact = ParamsSrkl { state: StateFormat::Compact, ..ParamsSrkl::braked_adam() };
    for params in [
        ParamsSrkl { measure: often, ..ParamsSrkl::braked_adam() },
        ParamsSrkl { measure: often, ..ParamsSrkl::hessian() },
        ParamsSrkl { measure: often, ..ParamsSrkl::kinetic() },
        compact,
        ParamsSrkl { measure: often, ..ParamsSrkl::braked_muon() },
        ParamsSrkl::braked_muon_averaged(),
    ] {
        let one = network(None, (8, false), &params)?;
        for (world_size, sharded) in [1, 2, 4, 8].into_iter().flat_map(|n| [(n, false), (n, true)])
        {
            for each in ranks(world_size, |rank| network(Some(rank), (8, sharded), &params)) {
                assert!(each? == one, "{world_size} ranks, sharded {sharded}, {params:?}");
            }
        }
    }
    Ok(())
}

// -- What ranks must agree on --

/// Settings, and whether state is sharded.
type Case = (ParamsSrkl, bool);

/// An optimizer of two parameters. There are more ranks than chunks in some tests.
fn pair(rank: Threads, (params, sharded): &Case) -> Result<(Srkl, [Var; 2])> {
    let vars = [var(&noise(5000, 1., 0), DType::F32)?, var(&noise(70, 1., 1), DType::F32)?];
    let named = ["a", "b"].map(String::from).into_iter().zip(vars.clone());
    let builder = Srkl::builder().default_group(params.clone());
    let opt = builder.collective(rank).sharded(*sharded).build(named)?;
    Ok((opt, vars))
}

fn pair_grads(vars: &[Var; 2], salt: u64) -> Result<candle_core::backprop::GradStore> {
    let gradient = |var: &Var| tensor(&noise(var.elem_count(), 1., salt), DType::F32);
    Ok(grads([(&vars[0], gradient(&vars[0])?), (&vars[1], gradient(&vars[1])?)]))
}

/// Three ranks take a step together, then one in which rank 1 does something else; all must have this error, nothing may have
/// moved, and a third step goes on.
fn fails_on_rank_1(
    params: &Case,
    wrong: impl Fn(&mut Srkl, &[Var; 2]) -> Result<()> + Sync,
    mend: impl Fn(&mut Srkl) + Sync,
    words: &[&str],
) -> Result<()> {
    let run = |rank: Threads| {
        let (mut opt, vars) = pair(rank, params)?;
        let rank = opt.rank();
        opt.step(&pair_grads(&vars, rank as u64)?)?;
        let before = all_values(&vars)?;
        let failed = match rank {
            1 => wrong(&mut opt, &vars),
            _ => opt.step(&pair_grads(&vars, 10 + rank as u64)?),
        };
        let error = failed.expect_err("rank 1 does something else").to_string();
        assert!(all_values(&vars)? == before, "moved by a step that failed: {error}");
        assert_eq!((opt.steps()?, opt.skipped_steps()?), (1, 0), "{error}");
        if rank == 1 {
            mend(&mut opt);
        }
        opt.step(&pair_grads(&vars, 20 + rank as u64)?)?;
        assert!(all_values(&vars)? != before);
        Ok((error, all_values(&vars)?))
    };
    let after: Vec<(String, Vec<f64>)> = ranks(3, run).into_iter().collect::<Result<_>>()?;
    for (rank, (error, values)) in after.iter().enumerate() {
        // Rank 1 may have an error of its own, with what only it knows.
        let told = rank != 1 || words.iter().all(|word| error.contains(word));
        assert!(told || error.contains("no batch"), "{error}");
        assert!(rank == 1 || words.iter().all(|word| error.contains(word)), "{error}");
        assert!(*values == after[0].1, "the ranks differ after {error}");
    }
    Ok(())
}

#[test]
fn what_is_wrong_on_one_rank_is_an_error_on_all() -> Result<()> {
    for sharded in [false, true] {
        wrong_on_one_rank(&(ParamsSrkl::adamw(1e-2), sharded))?;
    }
    Ok(())
}

fn wrong_on_one_rank(params: &Case) -> Result<()> {
    let nothing = |_: &mut Srkl| {};
    let shape = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.step(&grads([(&vars[1], tensor(&[1.; 71], DType::F32)?)]))
    };
    fails_on_rank_1(params, shape, nothing, &["rank 1", "`b`", "shape"])?;
    let dtype = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.step(&grads([(&vars[1], Tensor::ones(70, DType::U32, &Device::Cpu)?)]))
    };
    fails_on_rank_1(params, dtype, nothing, &["rank 1", "`b`", "U32"])?;
    let rate = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.set_learning_rate(f64::NAN);
        opt.step(&pair_grads(vars, 1)?)
    };
    let mend = |opt: &mut Srkl| opt.set_learning_rate(1e-2);
    fails_on_rank_1(params, rate, mend, &["rank 1", "learning rate", "NaN"])?;
    let other_rate = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.set_learning_rate(3e-2);
        opt.step(&pair_grads(vars, 1)?)
    };
    fails_on_rank_1(params, other_rate, mend, &["learning rate", "rank 0", "rank 1", "3"])?;
    let scale = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.set_grad_scale(2.)?;
        opt.step(&pair_grads(vars, 1)?)
    };
    let mend = |opt: &mut Srkl| opt.set_grad_scale(1.).unwrap();
    fails_on_rank_1(params, scale, mend, &["gradient scale", "2", "rank 1"])?;
    let settings = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.set_params("default", ParamsSrkl { weight_decay: 0.5, ..ParamsSrkl::adamw(1e-2) })?;
        opt.step(&pair_grads(vars, 1)?)
    };
    let mend = |opt: &mut Srkl| opt.set_params("default", ParamsSrkl::adamw(1e-2)).unwrap();
    fails_on_rank_1(params, settings, mend, &["settings", "default", "0.5", "rank 1"])?;
    let more = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.accumulate(&pair_grads(vars, 1)?)?;
        opt.accumulate(&pair_grads(vars, 2)?)?;
        opt.step_accumulated()
    };
    let mend = |opt: &mut Srkl| opt.clear_accumulated();
    fails_on_rank_1(params, more, mend, &["micro-batches", "1 on rank 0", "2 on rank 1"])?;
    fails_on_rank_1(params, |opt, _| opt.step_accumulated(), nothing, &["rank 1", "accumulated"])?;
    let fails = |opt: &mut Srkl, _: &[Var; 2]| {
        opt.backward_step_with(|| candle_core::bail!("no batch")).map(|_| ())
    };
    fails_on_rank_1(params, fails, nothing, &["rank 1", "loss"])?;
    let unreached = |opt: &mut Srkl, _: &[Var; 2]| {
        let constant = Var::new(1f32, &Device::Cpu)?;
        opt.backward_step(&constant.sqr()?)
    };
    fails_on_rank_1(params, unreached, nothing, &["rank 1", "reaches none"])?;
    let observes = |opt: &mut Srkl, vars: &[Var; 2]| opt.observe(&pair_grads(vars, 1)?);
    fails_on_rank_1(params, observes, nothing, &["rank 1", "no step waits"])?;
    let seed = |opt: &mut Srkl, vars: &[Var; 2]| {
        opt.set_seed(7);
        opt.step(&pair_grads(vars, 1)?)
    };
    fails_on_rank_1(params, seed, |opt| opt.set_seed(0), &["seed", "7 on rank 1"])?;
    let none = |opt: &mut Srkl, _: &[Var; 2]| opt.mean_over_ranks(&[]).map(|_| ());
    fails_on_rank_1(params, none, nothing, &["rank 1", "mean_over_ranks"])?;
    if params.1 {
        let records = |opt: &mut Srkl, vars: &[Var; 2]| {
            opt.record_norms(true);
            opt.step(&pair_grads(vars, 1)?)
        };
        let mend = |opt: &mut Srkl| opt.record_norms(false);
        fails_on_rank_1(params, records, mend, &["norms", "rank 1"])?;
        let syncs = |opt: &mut Srkl, _: &[Var; 2]| opt.sync_master();
        fails_on_rank_1(params, syncs, nothing, &["sync_master", "step"])?;
        let masters = |opt: &mut Srkl, _: &[Var; 2]| opt.master("a").map(|_| ());
        fails_on_rank_1(params, masters, nothing, &["master", "step"])?;
    }
    let saves = |opt: &mut Srkl, _: &[Var; 2]| opt.save("never written");
    fails_on_rank_1(params, saves, nothing, &["rank 0", "step", "save", "rank 1"])?;
    let folder = tempfile::tempdir()?;
    let load = |opt: &mut Srkl, _: &[Var; 2]| opt.load(folder.path().join("none"));
    fails_on_rank_1(params, load, nothing, &["none"])
}

/// Of steps that measure: what one rank alone does between the two gradients.
#[test]
fn measurements_that_fail_on_one_rank() -> Result<()> {
    for params in [ParamsSrkl::braked_adam(), ParamsSrkl::hessian()] {
        for (case, sharded) in (0..3).flat_map(|case| [(case, false), (case, true)]) {
            let run = |rank: Threads| {
                let (mut opt, vars) = pair(rank, &(params.clone(), sharded))?;
                let other = opt.rank() == 1;
                let loss = |fails: bool| {
                    if fails {
                        candle_core::bail!("no batch")
                    }
                    vars[0].sqr()?.sum_all()? + vars[1].sqr()?.sum_all()?
                };
                let before = all_values(&vars)?;
                let mut calls = 0;
                let stepped = match case {
                    // The second gradient; the one to compare comes before.
                    0 => opt.backward_step_with(|| {
                        calls += 1;
                        loss(other && calls == 3)
                    }),
                    1 => {
                        if other {
                            opt.skip_measurement();
                        }
                        opt.backward_step_with(|| loss(false))
                    }
                    // Two calls that differ.
                    _ => opt.backward_step_with(|| {
                        calls += 1;
                        loss(false)? * if other { f64::from(calls) } else { 1. }
                    }),
                };
                assert!(stepped.is_err(), "{case}");
                // With `Step` the step is taken before its second gradient.
                let taken = case == 0 && opt.steps()? == 1;
                assert_eq!(all_values(&vars)? == before, !taken, "{case}");
                if case == 1 && !other {
                    opt.skip_measurement();
                }
                for _ in 0..3 {
                    opt.backward_step_with(|| loss(false))?;
                }
                all_values(&vars)
            };
            let after: Vec<Vec<f64>> = ranks(3, run).into_iter().collect::<Result<_>>()?;
            assert!(after.iter().all(|other| *other == after[0]), "{case}");
        }
    }
    Ok(())
}

/// An older file stays if not all ranks save; parameters that one rank has changed are noticed when they are saved or loaded; what is
/// changed on all of them is saved as by one process.
#[test]
fn saving_and_loading_by_several() -> Result<()> {
    for sharded in [false, true] {
        save_and_load(sharded)?;
    }
    Ok(())
}

fn save_and_load(sharded: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let params = ParamsSrkl { master_weights: MasterWeights::Auto, ..ParamsSrkl::adamw(1e-3) };
    let train = |opt: &mut Srkl, var: &Var, step: u64| {
        opt.step(&grads([(var, tensor(&noise(5000, 1., step), DType::BF16)?)]))
    };
    // Element 1 is none of those that a step looks at.
    let overwrite = |var: &Var| -> Result<()> {
        let mut changed = values(var)?;
        changed[1] += 8.;
        var.set(&tensor(&changed, DType::BF16)?)
    };
    let alone = {
        let var = var(&noise(5000, 1., 0), DType::BF16)?;
        let mut opt = Srkl::builder()
            .default_group(params.clone())
            .build([("w".to_string(), var.clone())])?;
        train(&mut opt, &var, 0)?;
        overwrite(&var)?;
        opt.save(folder.path().join("alone"))?;
        train(&mut opt, &var, 1)?;
        bits(&var)?
    };
    let run = |rank: Threads| {
        let var = var(&noise(5000, 1., 0), DType::BF16)?;
        let mut opt = Srkl::builder()
            .default_group(params.clone())
            .collective(rank)
            .sharded(sharded)
            .build([("w".to_string(), var.clone())])?;
        train(&mut opt, &var, 0)?;
        opt.save(&path)?;
        let first = contents(&path)?;
        let _ = opt.mean_over_ranks(&[Tensor::ones(1, DType::F32, &Device::Cpu)?])?;

        let failed = if opt.rank() == 1 { opt.load(&path) } else { opt.save(&path) };
        let error = failed.expect_err("rank 1 loads").to_string();
        assert!(error.contains("save") && error.contains("load"), "{error}");
        assert!(contents(&path)? == first);
        let error = opt.save("/nowhere/at/all").expect_err("no such folder").to_string();
        assert!(error.contains("rank 0") && error.contains("nowhere"), "{error}");

        let old = var.copy()?;
        if opt.rank() == 1 {
            overwrite(&var)?;
        }
        for failed in [opt.save(&path), opt.load(&path)] {
            let error = failed.expect_err("rank 1 has other parameters").to_string();
            assert!(error.contains("parameters") && error.contains("rank 1"), "{error}");
        }
        var.set(&old)?;
        overwrite(&var)?;
        opt.save(&path)?;
        train(&mut opt, &var, 1)?;
        bits(&var)
    };
    for after in ranks(2, run) {
        assert!(after? == alone);
    }
    Ok(())
}

/// A rank that fails while others save leaves the old file, or rank 0 has written the new one.
#[test]
fn failures_while_saving() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let mut failures = 0;
    for calls in 0..25 {
        for failing in [0, 1] {
            let run = |rank: Threads| {
                let left = Arc::new(AtomicU64::new(u64::MAX));
                let own = rank.rank();
                let var = var(&noise(40_000, 1., 0), DType::BF16)?;
                let builder = Srkl::builder().default_group(ParamsSrkl::adamw(1e-2)).sharded(true);
                let builder = builder.collective(Failing(rank, left.clone())).bucket_bytes(60_000);
                let mut opt = builder.build([("w".to_string(), var.clone())])?;
                opt.save(&path)?;
                let old = contents(&path)?;
                opt.step(&grads([(&var, tensor(&noise(40_000, 1., 1), DType::BF16)?)]))?;
                if own == failing {
                    left.store(calls, Ordering::Relaxed);
                }
                Ok((old, opt.save(&path).is_err()))
            };
            let ended: Vec<_> = ranks(3, run).into_iter().collect::<Result<_>>()?;
            let file = contents(&path)?;
            let is_old = file == ended[0].0;
            let (steps, failed) = (&file.0["steps"], ended.iter().any(|(_, failed)| *failed));
            assert!(is_old || steps == "1", "{calls} {failing}");
            assert!(!is_old || failed, "{calls} {failing}");
            failures += (failed && is_old) as u64;
        }
    }
    assert!(failures > 10, "{failures}");
    Ok(())
}

/// Gradients whose memory is used again, and parameters of no elements, no parameters at all, frozen ones.
#[test]
fn unusual_parameters() -> Result<()> {
    for sharded in [false, true] {
        unusual(sharded)?;
    }
    Ok(())
}

fn unusual(sharded: bool) -> Result<()> {
    let run = |rank: Threads| {
        let vars = noisy_vars(&[0, 1, 3000], 1., DType::F32)?;
        let named = vars.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone()));
        let frozen = ParamsSrkl { lr: 0., ..ParamsSrkl::adamw(1e-2) };
        let mut opt = Srkl::builder()
            .default_group(ParamsSrkl::adamw(1e-2))
            .group("frozen", frozen, |name, _| name == "1")
            .collective(rank)
            .sharded(sharded)
            .build(named)?;
        // One buffer for both micro-batches.
        let buffer = var(&[0.; 3000], DType::F32)?;
        for i in 0..2 {
            buffer.set(&tensor(&vec![1. + 2. * f64::from(i); 3000], DType::F32)?)?;
            let mut given = grads([(&vars[2], buffer.as_tensor().clone())]);
            if opt.rank() == 0 {
                given.insert(&vars[1], tensor(&[1.], DType::F32)?);
                given.insert(&vars[0], Tensor::zeros(0, DType::F32, &Device::Cpu)?);
            }
            opt.accumulate(&given)?;
        }
        opt.record_norms(true);
        opt.step_accumulated()?;
        assert!(opt.untrained().is_empty(), "{:?}", opt.untrained());
        let told = opt.telemetry()?;
        let norm = told[2].grad_norm.expect("recorded");
        assert!((norm - 2. * 3000f64.sqrt()).abs() < 1e-9, "{norm}");
        all_values(&vars)
    };
    let after: Vec<Vec<f64>> = ranks(2, run).into_iter().collect::<Result<_>>()?;
    assert!(after[0] == after[1]);
    let none = |rank: Threads| {
        let mut opt = Srkl::builder().collective(rank).sharded(sharded).build([])?;
        opt.step(&grads([]))
    };
    ranks(2, none).into_iter().collect::<Result<Vec<()>>>().map(|_| ())
}

/// Ranks of one process that have the same variables.
#[test]
fn a_model_of_each_ranks_own() -> Result<()> {
    let shared = var(&[1., 2.], DType::F32)?;
    let run = |rank: Threads| {
        let named = [("w".to_string(), shared.clone())];
        Srkl::builder().collective(rank).build(named).map(|_| ())
    };
    for built in ranks(2, run) {
        let error = built.expect_err("one variable for two ranks").to_string();
        assert!(error.contains("ranks 0 and 1") && error.contains("own"), "{error}");
    }
    let run = |rank: Threads| {
        let bytes = 100 + rank.rank();
        let named = [("w".to_string(), var(&[1.], DType::F32)?)];
        Srkl::builder().collective(rank).bucket_bytes(bytes).build(named).map(|_| ())
    };
    for built in ranks(2, run) {
        let error = built.expect_err("other messages").to_string();
        assert!(error.contains("bucket_bytes") && error.contains("101"), "{error}");
    }
    Ok(())
}

/// A NaN, and a gradient that is missing, on one rank: what the policy says, on all.
#[test]
fn a_nan_or_no_gradient_on_one_rank() -> Result<()> {
    for sharded in [false, true] {
        nan_or_none(sharded)?;
    }
    Ok(())
}

fn nan_or_none(sharded: bool) -> Result<()> {
    let run = |rank: Threads| {
        let (mut opt, vars) = pair(rank, &(ParamsSrkl::adamw(1e-2), sharded))?;
        let before = all_values(&vars)?;
        let mut g = noise(5000, 1., 0);
        if opt.rank() == 1 {
            g[77] = f64::NAN;
        }
        opt.step(&grads([(&vars[0], tensor(&g, DType::F32)?)]))?;
        assert_eq!((opt.steps()?, opt.skipped_steps()?), (0, 1));
        assert!(all_values(&vars)? == before);
        assert_eq!(opt.untrained(), ["b"]);

        let own: &[usize] = if opt.rank() == 1 { &[1] } else { &[0] };
        let given = own
            .iter()
            .map(|i| Ok((&vars[*i], tensor(&vec![1.; vars[*i].elem_count()], DType::F32)?)));
        opt.step(&grads(given.collect::<Result<Vec<_>>>()?))?;
        assert!(opt.untrained().is_empty());
        all_values(&vars)
    };
    let after: Vec<Vec<f64>> = ranks(3, run).into_iter().collect::<Result<_>>()?;
    assert!(after.iter().all(|other| *other == after[0]));
    // Adam's first step is of one size, whatever that of the gradient.
    let start = [noise(5000, 1., 0), noise(70, 1., 1)].concat();
    for (after, start) in after[0].iter().zip(start) {
        let decayed = start * (1. - 1e-2 * ParamsSrkl::adamw(1e-2).weight_decay);
        assert!((decayed - after - 1e-2).abs() < 1e-5, "{start} {after}");
    }
    Ok(())
}

#[test]
fn what_differs_when_ranks_are_built() -> Result<()> {
    type Change = (&'static str, usize, DType, f64, &'static [&'static str]);
    let changes: [Change; 4] = [
        ("other", 10, DType::F32, 1e-2, &["`w`", "`other`", "rank 0", "rank 2"]),
        ("w", 11, DType::F32, 1e-2, &["`w`", "[10]", "[11]", "rank 2"]),
        ("w", 10, DType::BF16, 1e-2, &["`w`", "F32", "BF16", "rank 2"]),
        ("w", 10, DType::F32, 5e-2, &["settings", "`default`", "0.05", "rank 2"]),
    ];
    for (name, n, dtype, lr, words) in changes {
        let run = |rank: Threads| {
            let (name, n, dtype, lr) = match rank.rank() {
                2 => (name, n, dtype, lr),
                _ => ("w", 10, DType::F32, 1e-2),
            };
            let var = var(&vec![1.; n], dtype)?;
            Srkl::builder()
                .default_group(ParamsSrkl::adamw(lr))
                .collective(rank)
                .build([(name.to_string(), var)])
                .map(|_| ())
        };
        for built in ranks(3, run) {
            let error = built.expect_err("rank 2 differs").to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
    // What `build` itself refuses on one of them.
    let run = |rank: Threads| {
        let lr = if rank.rank() == 1 { -1. } else { 1e-2 };
        let params = ParamsSrkl { lr, ..ParamsSrkl::adamw(1e-2) };
        Srkl::builder().default_group(params).collective(rank).build([]).map(|_| ())
    };
    for built in ranks(2, run) {
        let error = built.expect_err("rank 1 can't be built").to_string();
        assert!(error.contains("rank 1") || error.contains("lr"), "{error}");
    }
    Ok(())
}

/// With sharded state averages are swapped in by all ranks, or by none: a training goes on after an attempt of one.
#[test]
fn averages_of_all_ranks() -> Result<()> {
    let average = Some(Average::Exponential(0.9));
    let params = ParamsSrkl { average, ..ParamsSrkl::adamw(1e-2) };
    let run = |rank: Threads| {
        let (mut opt, vars) = pair(rank, &(params.clone(), true))?;
        let step =
            |opt: &mut Srkl, salt: u64| opt.step(&pair_grads(&vars, salt + opt.rank() as u64)?);
        step(&mut opt, 0)?;
        let before = all_values(&vars)?;
        let failed = match opt.rank() {
            0 => opt.swap_averaged().map(|_| ()),
            _ => step(&mut opt, 10),
        };
        let error = failed.expect_err("rank 0 does something else").to_string();
        assert!(error.contains("swap_averaged") && error.contains("step"), "{error}");
        assert!(all_values(&vars)? == before);
        step(&mut opt, 20)?;
        let averaged = {
            let _averaged = opt.swap_averaged()?;
            all_values(&vars)?
        };
        assert!(all_values(&vars)? != averaged);
        Ok((averaged, all_values(&vars)?))
    };
    let after: Vec<_> = ranks(3, run).into_iter().collect::<Result<_>>()?;
    assert!(after.iter().all(|other| *other == after[0]));
    Ok(())
}

/// Whoever leaves, panics, or calls something else: nobody waits for ever.
#[test]
fn ranks_that_leave() {
    let run = |how: usize| {
        move |rank: Threads| -> Result<()> {
            let (mut opt, vars) = pair(rank, &(ParamsSrkl::adamw(1e-2), how != 1))?;
            for step in 0..3 {
                if opt.rank() == 1 && step == 2 {
                    match how {
                        0 => return Ok(()),
                        1 => panic!("on purpose"),
                        _ => return opt.save("/nowhere/at/all"),
                    }
                }
                opt.step(&pair_grads(&vars, step)?)?;
            }
            Ok(())
        }
    };
    for (how, words) in [(0, "has left"), (1, "has panicked"), (2, "")] {
        let ended = ranks(3, run(how));
        for rank in [0, 2] {
            let error = ended[rank].as_ref().expect_err("rank 1 is gone").to_string();
            assert!(error.contains("rank 1") && error.contains(words), "{error}");
        }
    }
}

// -- The transport --

/// Counts the bytes that a rank sends to others.
struct Counted(Threads, Arc<AtomicU64>);

impl Collective for Counted {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn world_size(&self) -> usize {
        self.0.world_size()
    }
    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        let sent = from.len() - parts[self.rank()];
        self.1.fetch_add(sent as u64, Ordering::Relaxed);
        self.0.all_to_all(from, parts, to)
    }
    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        let sent = parts[self.rank()] * (self.world_size() - 1);
        self.1.fetch_add(sent as u64, Ordering::Relaxed);
        self.0.all_gather(whole, parts)
    }
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.exchange(own)
    }
    fn abort(&mut self, why: &str) {
        self.0.abort(why);
    }
}

/// A step of replicated ranks: the gradients in their own dtype, and their sums in f32. Of sharded ones: the gradients, the
/// parameters in their dtype, and sums over chunks, of less than 0.01 bytes.
#[test]
fn bytes_on_the_wire() -> Result<()> {
    let n = 100_000;
    for (dtype, accumulates, expected) in [
        (DType::F32, false, [8., 8.]),
        (DType::BF16, false, [6., 4.]),
        (DType::BF16, true, [8., 6.]),
    ] {
        for (world_size, sharded) in [2, 3, 4].into_iter().flat_map(|n| [(n, false), (n, true)]) {
            let run = |rank: Threads| {
                let sent = Arc::new(AtomicU64::new(0));
                let var = var(&vec![1.; n], dtype)?;
                let mut opt = Srkl::builder()
                    .default_group(ParamsSrkl::adamw(1e-2))
                    .collective(Counted(rank, sent.clone()))
                    .bucket_bytes(30_001)
                    .sharded(sharded)
                    .build([("w".to_string(), var.clone())])?;
                sent.store(0, Ordering::Relaxed);
                let g = grads([(&var, tensor(&vec![1.; n], dtype)?)]);
                if accumulates {
                    opt.accumulate(&g)?;
                    opt.step_accumulated()?;
                } else {
                    opt.step(&g)?;
                }
                Ok(sent.load(Ordering::Relaxed) as f64 / n as f64)
            };
            let sent: Vec<f64> = ranks(world_size, run).into_iter().collect::<Result<_>>()?;
            let count = world_size as f64;
            let expected = expected[sharded as usize] * (count - 1.) / count;
            let mean = sent.iter().sum::<f64>() / count;
            let case = format!("{dtype:?} {world_size} {sharded}: {sent:?} {expected}");
            assert!((0. ..0.01).contains(&(mean - expected)), "{case}");
            // Shards are whole chunks.
            let chunk = 8192. / n as f64 * 8. * (count - 1.);
            assert!(sent.iter().all(|sent| (sent - expected).abs() < chunk), "{case}");
        }
    }
    Ok(())
}

/// Saved by any number of ranks, and gone on with by any other.
#[test]
fn checkpoints_know_no_number_of_ranks() -> Result<()> {
    let params = ParamsSrkl {
        master_weights: MasterWeights::Split,
        direction: Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 },
        ..ParamsSrkl::adamw(1e-2)
    };
    let n = 20_000;
    let folder = tempfile::tempdir()?;
    let [state, model] = ["state", "model"].map(|name| folder.path().join(name));
    // Steps `steps`, by 4 micro-batches.
    let train = |(world_size, sharded), steps: std::ops::Range<u64>| -> Result<Vec<Vec<u64>>> {
        let run = |rank: Threads| {
            let each = 4 / rank.world_size();
            let own = rank.rank() * each..(rank.rank() + 1) * each;
            let mut varmap = VarMap::new();
            let init = candle_nn::Init::Const(0.5);
            varmap.get(n, "w", init, DType::BF16, &Device::Cpu)?;
            if steps.start > 0 {
                varmap.load(&model)?;
            }
            let var = varmap.all_vars()[0].clone();
            let mut opt = Srkl::builder()
                .default_group(params.clone())
                .collective(rank)
                .sharded(sharded)
                .build_varmap(&varmap)?;
            if steps.start > 0 {
                opt.load(&state)?;
                assert_eq!(opt.steps()?, steps.start);
            }
            for step in steps.clone() {
                for i in own.clone() {
                    let g = tensor(&noise(n, 1., 10 * step + i as u64), DType::BF16)?;
                    opt.accumulate(&grads([(&var, g)]))?;
                }
                opt.step_accumulated()?;
            }
            opt.save(&state)?;
            if opt.rank() == 0 {
                varmap.save(&model)?;
            }
            bits(&var)
        };
        ranks(world_size, run).into_iter().collect()
    };
    let whole = train((1, false), 0..6)?;
    let same = [((2, false), (4, false)), ((4, false), (1, false)), ((1, false), (2, false))];
    let shards = [((2, true), (4, true)), ((4, true), (1, false)), ((1, false), (4, true))];
    let both = [((2, true), (2, false)), ((4, false), (2, true))];
    for (before, after) in same.into_iter().chain(shards).chain(both) {
        train(before, 0..3)?;
        for each in train(after, 3..6)? {
            assert!(each == whole[0], "{before:?} {after:?}");
        }
    }
    Ok(())
}
