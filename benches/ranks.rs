//! Times a step of several ranks that are threads: how much of it the exchange and the sums of gradients take.
//!
//! ```sh
//! cargo bench --bench ranks
//! mpirun -n 2 --bind-to none cargo bench --features mpi --bench ranks -- sharded   # without this word replicated
//! ```
//!
//! The ranks share the machine's cores, so that N whole steps take N times as long; what is more than that is the exchange.

#[allow(dead_code)] // Other benches use more of it.
mod lists;

use std::thread;
use std::time::Instant;

use anyhow::Result;
use candle_core::Device;
use candle_nn::Optimizer;
use candle_srkl::{Collective, NonFinite, ParamsSrkl, Srkl, Threads};
use lists::List;

/// Steps that are timed.
const STEPS: usize = 10;

fn main() -> Result<()> {
    if std::env::args().any(|arg| arg == "--test") {
        return Ok(());
    }
    #[cfg(feature = "mpi")]
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        let (rank, sharded) =
            (candle_srkl::Mpi::new()?, std::env::args().any(|arg| arg == "sharded"));
        let (number, world_size) = (rank.rank(), rank.world_size());
        let mut times = time("16M f32", rank, sharded)?;
        times.sort_by(f64::total_cmp);
        if number == 0 {
            let median = times[times.len() / 2];
            println!("16M f32, {world_size} processes, sharded {sharded}: {median:.1} ms a step");
        }
        return Ok(());
    }
    println!("| list | ranks | state | ms a step, median | steps without an exchange |");
    println!("|---|---|---|---|---|");
    for name in ["16M f32", "16M bf16", "4 layers of 256 f32"] {
        let mut alone = 0.;
        for (world_size, sharded) in [(1, false), (2, false), (2, true), (4, false), (4, true)] {
            let ranks: Vec<Result<Vec<f64>>> = thread::scope(|scope| {
                let start = |rank| scope.spawn(move || time(name, rank, sharded));
                let ranks: Vec<_> = Threads::new(world_size).into_iter().map(start).collect();
                ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
            });
            let mut times = ranks.into_iter().collect::<Result<Vec<_>>>()?.concat();
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            if world_size == 1 {
                alone = median;
            }
            // Sharded ranks step each parameter once.
            let (state, steps) = match sharded {
                true => ("sharded", alone),
                false => ("replicated", alone * world_size as f64),
            };
            println!("| {name} | {world_size} | {state} | {median:.1} | {steps:.1} |");
        }
    }
    Ok(())
}

/// Milliseconds of each step of a rank.
fn time(name: &str, rank: impl Collective + 'static, sharded: bool) -> Result<Vec<f64>> {
    let list = List::all().into_iter().find(|list| list.name == name).expect("a list");
    let (vars, grads) = list.tensors(&Device::Cpu)?;
    let params = ParamsSrkl { nonfinite: NonFinite::Propagate, ..ParamsSrkl::adamw(1e-3) };
    let named = vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var));
    let mut opt =
        Srkl::builder().default_group(params).collective(rank).sharded(sharded).build(named)?;
    opt.step(&grads)?;
    let step = |_| -> Result<f64> {
        let start = Instant::now();
        opt.step(&grads)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    (0..STEPS).map(step).collect()
}
