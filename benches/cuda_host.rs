//! Counts the host's time of one optimizer step on a CUDA device: from the call to its return, without the
//! work of the device, which is waited for between steps.
//!
//! ```sh
//! cargo bench --features cuda --bench cuda_host
//! ```

use std::time::Instant;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};
use candle_srkl::{Measure, ParamsSrkl, Srkl};
use clap::Parser;

/// Counts the host's time of one optimizer step on the first CUDA device.
#[derive(Parser)]
struct Options {
    /// How often each step is timed
    #[arg(long, default_value = "21")]
    samples: usize,
    /// Elements of a tensor
    #[arg(long, default_value = "64")]
    elements: usize,
    /// What cargo bench passes
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = Device::new_cuda(0)?;
    println!("Microseconds of the host a step, median of {}:\n", options.samples);
    println!(
        "| tensors | SRKL | SRKL, gradients at new addresses | braked Adam, new | candle SGD | candle AdamW \
         | SGD / SRKL, new | AdamW / braked Adam |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for tensors in [1, 100, 1000, 10_000] {
        let (mut braked, vars) = measured(tensors, &options, &device)?;
        let ones = || Tensor::ones(options.elements, DType::F32, &device);
        let grads = || -> Result<GradStore> {
            let mut grads = GradStore::default();
            for var in &vars {
                grads.insert(var, ones()?);
            }
            Ok(grads)
        };
        let stores = [grads()?, grads()?];
        // Every second step finds other addresses.
        let other = |i: usize| &stores[i % 2];
        let mut srkl = Srkl::new(vars.clone(), ParamsSrkl::reference())?;
        let same = time(&device, &options, |_| Ok(srkl.step(other(0))?))?;
        let new = time(&device, &options, |i| Ok(srkl.step(other(i))?))?;
        let braked = time(&device, &options, |i| Ok(braked.step(other(i))?))?;
        let mut sgd = SGD::new(vars.clone(), 1e-3)?;
        let sgd = time(&device, &options, |i| Ok(sgd.step(other(i))?))?;
        let mut adamw = AdamW::new(vars.clone(), ParamsAdamW::default())?;
        let adamw = time(&device, &options, |i| Ok(adamw.step(other(i))?))?;
        println!(
            "| {tensors} | {same:.1} | {new:.1} | {braked:.1} | {sgd:.1} | {adamw:.1} | {:.1} | {:.1} |",
            sgd / new,
            adamw / braked
        );
    }
    Ok(())
}

/// Braked Adam over as many parameters on the device, which has measured the curvature of `sum w^2 / 2` and measures
/// no more, and these. It was measured on the CPU, so that there is an estimate also where kernels don't run.
fn measured(tensors: usize, options: &Options, device: &Device) -> Result<(Srkl, Vec<Var>)> {
    let measure = Measure { every: u64::MAX, first: 1, ..Measure::default() };
    let params = ParamsSrkl { measure, ..ParamsSrkl::braked_adam() };
    let mut on_cpu = vec![];
    for _ in 0..tensors {
        on_cpu.push(Var::ones(options.elements, DType::F32, &Device::Cpu)?);
    }
    let mut opt = Srkl::new(on_cpu.clone(), params.clone())?;
    for measuring in [false, true] {
        let mut grads = GradStore::default();
        for var in &on_cpu {
            grads.insert(var, var.copy()?);
        }
        if measuring { opt.observe(&grads)? } else { opt.step(&grads)? }
    }
    let folder = tempfile::tempdir()?;
    let checkpoint = folder.path().join("measured.safetensors");
    opt.save(&checkpoint)?;
    let mut vars = vec![];
    for var in &on_cpu {
        vars.push(Var::from_tensor(&var.to_device(device)?)?);
    }
    let mut opt = Srkl::new(vars.clone(), params)?;
    opt.load(&checkpoint)?;
    Ok((opt, vars))
}

/// The median of the microseconds that a call takes, after three to warm up; it is given its number.
fn time(
    device: &Device,
    options: &Options,
    mut step: impl FnMut(usize) -> Result<()>,
) -> Result<f64> {
    let mut micros = vec![];
    for i in 0..3 + options.samples.max(1) {
        device.synchronize()?;
        let start = Instant::now();
        step(i)?;
        micros.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let timed = &mut micros[3..];
    timed.sort_by(f64::total_cmp);
    Ok(timed[timed.len() / 2])
}
