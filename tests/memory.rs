//! The memory of a step: that of parameters, gradients and state, and at most 1 MB; where it measures the
//! curvature along it, 4 MB.

mod common;

use std::sync::Barrier;
use std::thread;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, AverageFormat, MasterWeights, NonFinite, ParamsSrkl, Rounding, Scope, Srkl,
    StateFormat, Threads,
};
use peak_alloc::PeakAlloc;

use common::*;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One test, since the allocator counts all threads.
#[test]
fn a_step_allocates_little() -> Result<()> {
    let large = |dtype: DType| (dtype, vec![3_000_001, PIECE + 1, 1]);
    let lists =
        [large(DType::F32), large(DType::F64), large(DType::BF16), (DType::F32, vec![64; 10_000])];
    for (dtype, sizes) in lists {
        for strided in [false, true] {
            for params in settings() {
                let mut store = grads([]);
                let mut vars = vec![];
                for &n in &sizes {
                    let var = Var::zeros(n, dtype, &Device::Cpu)?;
                    // Every second element of a longer tensor.
                    let steps = if strided { 2 } else { 1 };
                    let grad = Tensor::ones((n, steps), dtype, &Device::Cpu)?;
                    store.insert(&var, grad.narrow(1, 0, 1)?.squeeze(1)?);
                    vars.push(var);
                }
                let mut opt = Srkl::new(vars, params.clone())?;
                let step = |opt: &mut Srkl| {
                    let measures = opt.measuring();
                    opt.step(&store)?;
                    if measures { opt.observe(&store) } else { Ok(()) }
                };
                // Its threads have started after a step.
                step(&mut opt)?;
                let before = ALLOCATOR.current_usage();
                ALLOCATOR.reset_peak_usage();
                let most = if opt.measuring() { 4_000_000 } else { 1_000_000 };
                step(&mut opt)?;
                let more = ALLOCATOR.peak_usage() - before;
                assert!(more <= most, "{more} bytes: {dtype:?}, {params:?}");
                step(&mut opt)?;
                let kept = ALLOCATOR.current_usage().saturating_sub(before);
                assert!(kept <= 100_000, "{kept} bytes kept: {dtype:?}, {params:?}");
            }
        }
    }
    products_alone()?;
    state_takes_what_the_docs_say()?;
    a_shard_takes_its_part_of_the_state()?;
    a_checkpoint_of_shards_is_written_by_tensors()?;
    a_checkpoint_is_written_by_tensors()
}

/// Saving takes the memory of one kind of state of one parameter.
fn a_checkpoint_is_written_by_tensors() -> Result<()> {
    let n = 1_000_000;
    let vars = noisy_vars(&[n; 4], 1., DType::BF16)?;
    let mut opt = Srkl::new(vars, ParamsSrkl::braked_adam_averaged())?;
    let file = tempfile::NamedTempFile::new()?;
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    opt.save(file.path())?;
    let more = ALLOCATOR.peak_usage() - before;
    // In f32; and what is written is buffered.
    assert!(more < 4 * n + 2_500_000, "{more} bytes");
    assert!(file.path().metadata()?.len() > 4 * 4 * 4 * n as u64);
    Ok(())
}

/// The bytes a parameter of each kind of state (docs/memory.md), and no more than a thousandth besides.
fn state_takes_what_the_docs_say() -> Result<()> {
    let compact = |params| ParamsSrkl { state: StateFormat::Compact, ..params };
    let split = |params| ParamsSrkl { master_weights: MasterWeights::Split, ..params };
    let adamw = ParamsSrkl::adamw(1e-3);
    let averaged = |average_format| ParamsSrkl {
        average: Some(Average::Polynomial(8.)),
        average_format,
        ..ParamsSrkl::sgd(1e-3)
    };
    let codes = 1. + 1. / 256.;
    let n = 3_000_001;
    for (params, dtype, bytes) in [
        (adamw.clone(), DType::F32, 8.),
        (adamw.clone(), DType::BF16, 12.),
        (compact(adamw.clone()), DType::F32, 2. * codes),
        (split(compact(adamw.clone())), DType::BF16, 2. + 2. * codes),
        (split(compact(adamw.clone())), DType::F16, 4. + 2. * codes),
        (compact(adamw), DType::F64, 16.),
        (compact(ParamsSrkl::kinetic()), DType::F32, codes),
        (averaged(AverageFormat::F32), DType::F32, 4.),
        (averaged(AverageFormat::BF16), DType::F32, 2.),
        (split(averaged(AverageFormat::BF16)), DType::BF16, 4.),
    ] {
        let var = Var::zeros(n, dtype, &Device::Cpu)?;
        let before = ALLOCATOR.current_usage();
        let opt = Srkl::new(vec![var], params.clone())?;
        let kept = (ALLOCATOR.current_usage() - before) as f64 / n as f64;
        // And some KB, whatever the number of parameters.
        let fixed = 8192. / n as f64;
        assert!((bytes..bytes + fixed).contains(&kept), "{kept} not {bytes}: {dtype:?} {params:?}");
        drop(opt);
    }
    Ok(())
}

/// Of N ranks with sharded state each keeps an Nth of it, within a chunk; a step allocates the sums of its shard, and three
/// buckets.
fn a_shard_takes_its_part_of_the_state() -> Result<()> {
    let n = 3_000_001;
    for world_size in [2, 4] {
        for params in [ParamsSrkl::adamw(1e-3), ParamsSrkl::braked_adam_averaged()] {
            let state = if params.average.is_some() { 16. } else { 12. };
            let step = |(opt, store): &mut (Srkl, GradStore)| {
                opt.skip_measurement();
                opt.step(store)
            };
            let build = |rank| {
                let var = Var::zeros(n, DType::BF16, &Device::Cpu)?;
                let builder = Srkl::builder().default_group(params.clone()).sharded(true);
                let builder = builder.collective(rank).bucket_bytes(1 << 18);
                let store = grads([(&var, Tensor::ones(n, DType::BF16, &Device::Cpu)?)]);
                let mut rank = (builder.build([("w".to_string(), var)])?, store);
                step(&mut rank)?;
                Ok(rank)
            };
            let (kept, more) = bytes_of_ranks(world_size, build, step);
            let count = world_size as f64;
            // Without parameters and gradients.
            let kept = (kept - world_size * 4 * n) as f64 / count;
            let more = more as f64 / count;
            // `Threads` keep the last message.
            let most = state * (n as f64 / world_size as f64 + 8192.) + f64::from(1 << 18);
            assert!(kept <= most, "{kept} of {most}: {world_size}, {params:?}");
            let most = 4. * n as f64 / world_size as f64 + 5. * f64::from(1 << 18) + 200_000.;
            assert!(more <= most, "{more} of {most}: {world_size}, {params:?}");
        }
    }
    Ok(())
}

/// Rank 0 takes the memory of one tensor to save what several have, and each that of a shard of one.
fn a_checkpoint_of_shards_is_written_by_tensors() -> Result<()> {
    let n = 1_000_000;
    let file = tempfile::NamedTempFile::new()?;
    let build = |rank| {
        let vars = noisy_vars(&[n; 4], 1., DType::BF16)?;
        let named = vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var));
        let builder = Srkl::builder().default_group(ParamsSrkl::braked_adam_averaged());
        builder.collective(rank).sharded(true).bucket_bytes(1 << 18).build(named)
    };
    let (_, more) = bytes_of_ranks(2, build, |opt| opt.save(file.path()));
    // In f32: the whole tensor, two shards as they are read, and one that comes.
    assert!(more < 4 * n + 3 * 2 * n + 3_500_000, "{more} bytes");
    assert!(file.path().metadata()?.len() > 4 * 4 * 4 * n as u64);
    Ok(())
}

/// The bytes that all ranks together keep of what they `build`, and take at most while they `work`.
fn bytes_of_ranks<T>(
    world_size: usize,
    build: impl Fn(Threads) -> Result<T> + Sync,
    work: impl Fn(&mut T) -> Result<()> + Sync,
) -> (usize, usize) {
    let together = Barrier::new(world_size + 1);
    let run = &|rank| {
        let build_and_work = || -> Result<()> {
            let mut built = build(rank)?;
            together.wait();
            together.wait();
            work(&mut built)?;
            together.wait();
            together.wait();
            Ok(())
        };
        // Others would wait for it.
        if let Err(e) = build_and_work() {
            eprintln!("{e}");
            std::process::abort();
        }
    };
    thread::scope(|scope| {
        let before = ALLOCATOR.current_usage();
        let start = |rank| scope.spawn(move || run(rank));
        let ranks: Vec<_> = Threads::new(world_size).into_iter().map(start).collect();
        together.wait();
        let kept = ALLOCATOR.current_usage() - before;
        ALLOCATOR.reset_peak_usage();
        let before = ALLOCATOR.current_usage();
        together.wait();
        together.wait();
        let more = ALLOCATOR.peak_usage() - before;
        together.wait();
        ranks.into_iter().for_each(|rank| rank.join().expect("no panic"));
        (kept, more)
    })
}

/// With Muon a step allocates the products of one matrix at a time: two squares of the shorter side, and one matrix.
fn products_alone() -> Result<()> {
    let (rows, cols) = (300, 500);
    let mut store = grads([]);
    let mut vars = vec![];
    for i in 0..10 {
        let var = Var::zeros((rows, cols), DType::F32, &Device::Cpu)?;
        store.insert(&var, noisy_matrix((rows, cols), 1., i, DType::F32)?);
        vars.push(var);
    }
    let mut opt = Srkl::new(vars, ParamsSrkl::muon(0.1))?;
    opt.step(&store)?;
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    opt.step(&store)?;
    let (more, kept) =
        (ALLOCATOR.peak_usage() - before, ALLOCATOR.current_usage().saturating_sub(before));
    let products = 4 * (2 * rows * rows + rows * cols);
    assert!(more <= products + 1_000_000, "{more} bytes, of which products {products}");
    assert!(kept <= 100_000, "{kept} bytes kept");
    Ok(())
}

/// The reference rule in its variants, and steps that measure the curvature along them.
fn settings() -> Vec<ParamsSrkl> {
    let packed = |params| ParamsSrkl {
        state: StateFormat::Compact,
        master_weights: MasterWeights::None,
        rounding: Rounding::Stochastic,
        average: Some(Average::Polynomial(8.)),
        average_format: AverageFormat::BF16,
        ..params
    };
    let mut all = vec![ParamsSrkl::braked_adam(), ParamsSrkl::kinetic()];
    all.extend([packed(ParamsSrkl::braked_adam()), packed(ParamsSrkl::kinetic())]);
    all.push(ParamsSrkl {
        master_weights: MasterWeights::Split,
        ..packed(ParamsSrkl::adamw(1e-3))
    });
    for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
        for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock] {
            let max_grad_norm = Some(1.);
            all.push(ParamsSrkl { scope, nonfinite, max_grad_norm, ..ParamsSrkl::reference() });
        }
    }
    all
}
