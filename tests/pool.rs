//! The threads of many optimizers: those of one.
#![cfg(target_os = "linux")]

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{ParamsSrkl, Srkl};
use common::{LARGE, pool};

/// Of this process, as the kernel counts them.
fn threads() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    line.unwrap().trim().parse().unwrap()
}

/// One test, since the kernel counts all threads of the process.
#[test]
fn many_optimizers_share_their_threads() -> Result<()> {
    let pool = pool(5)?;
    let before = threads();
    // Enough for threads, in one piece and in many.
    let large = Var::zeros(LARGE, DType::F32, &Device::Cpu)?;
    let small: Vec<Var> =
        (0..400).map(|_| Var::zeros(3, DType::F32, &Device::Cpu)).collect::<Result<_>>()?;
    let mut optimizers = vec![];
    for i in 0..300 {
        let vars = if i % 2 == 0 { vec![large.clone()] } else { small.clone() };
        let mut store = GradStore::default();
        vars.iter().try_for_each(|var| var.ones_like().map(|g| drop(store.insert(var, g))))?;
        let mut opt = pool.install(|| Srkl::new(vars, ParamsSrkl::reference()))?;
        opt.step(&store)?;
        optimizers.push(opt);
        assert_eq!(threads(), before + 5, "{} optimizers", i + 1);
    }
    drop(optimizers);
    Ok(())
}
