//! Times a step of several ranks that are threads: how much of it the exchange and the sums of gradients take.
//!
//! ```sh
//! cargo bench --bench ranks
//! ```
//!
//! The ranks share the machine's cores, so that N steps take N times as long; what is more than that is the exchange.

#[allow(dead_code)] // Other benches use more of it.
mod lists;

use std::thread;
use std::time::Instant;

use anyhow::Result;
use candle_core::Device;
use candle_nn::Optimizer;
use candle_srkl::{NonFinite, ParamsSrkl, Srkl, Threads};
use lists::List;

/// Steps that are timed.
const STEPS: usize = 10;

fn main() -> Result<()> {
    if std::env::args().any(|arg| arg == "--test") {
        return Ok(());
    }
    println!("| list | ranks | ms a step, median | of one rank, times their number |");
    println!("|---|---|---|---|");
    for name in ["16M f32", "16M bf16", "4 layers of 256 f32"] {
        let mut alone = 0.;
        for world_size in [1, 2, 4] {
            let ranks: Vec<Result<Vec<f64>>> = thread::scope(|scope| {
                let start = |rank| scope.spawn(move || time(name, rank));
                let ranks: Vec<_> = Threads::new(world_size).into_iter().map(start).collect();
                ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
            });
            let mut times = ranks.into_iter().collect::<Result<Vec<_>>>()?.concat();
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            if world_size == 1 {
                alone = median;
            }
            println!("| {name} | {world_size} | {median:.1} | {:.1} |", alone * world_size as f64);
        }
    }
    Ok(())
}

/// Milliseconds of each step of a rank.
fn time(name: &str, rank: Threads) -> Result<Vec<f64>> {
    let list = List::all().into_iter().find(|list| list.name == name).expect("a list");
    let (vars, grads) = list.tensors(&Device::Cpu)?;
    let params = ParamsSrkl { nonfinite: NonFinite::Propagate, ..ParamsSrkl::adamw(1e-3) };
    let named = vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var));
    let mut opt = Srkl::builder().default_group(params).collective(rank).build(named)?;
    opt.step(&grads)?;
    let step = |_| -> Result<f64> {
        let start = Instant::now();
        opt.step(&grads)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    (0..STEPS).map(step).collect()
}
