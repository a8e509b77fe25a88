//! Times one optimizer step on a CUDA device, by events on its stream, against candle's optimizers and a
//! device-to-device copy.
//!
//! ```sh
//! cargo bench --features cuda --bench cuda_step                          # a table
//! cargo bench --features cuda --bench cuda_step -- --json cuda_step.json # and the figures as JSON
//! cargo bench --features cuda --bench cuda_step -- --list "GPT-2 small f32" --steps 3 # for a profiler
//! ```
//!
//! Bandwidth counts the bytes that a step cannot avoid moving: 12 a parameter, for f32 (read w and g, write
//! w) as for bf16 with f32 masters (read g, read and write the master, write w), and 28 for braked Adam (both
//! moments are read and written too) on a step that doesn't measure; 16 and 14 (f32, bf16) with packed state:
//! compact moments and split masters. The copy, of 512 MiB, reads and writes
//! every byte.

mod lists;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};
use candle_srkl::{Direction, Measure, NonFinite, ParamsSrkl, Srkl};
use clap::Parser;
use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUevent_flags;
use lists::{List, packed};
use serde_json::{Value, json};

/// Times one optimizer step on the first CUDA device.
#[derive(Parser)]
struct Options {
    /// Only lists whose name has this in it
    #[arg(long, default_value = "")]
    list: String,
    /// How often each step is timed
    #[arg(long, default_value = "30")]
    samples: usize,
    /// Where to write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// No timing: only so many steps of SRKL on each list, for a profiler
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// With --steps: what is done about gradients that are not finite
    #[arg(long, default_value = "skip-step", value_parser = ["skip-step", "skip-block", "propagate"])]
    policy: String,
    /// With --steps: the settings; braked Adam measures at the first step
    #[arg(long, default_value = "reference", value_parser = PRESETS)]
    preset: String,
    /// With --steps: compact moments, and split masters of bf16
    #[arg(long)]
    packed: bool,
    /// What cargo bench passes
    #[arg(long, hide = true)]
    bench: bool,
}

const PRESETS: [&str; 9] = [
    "reference",
    "braked-adam",
    "sgd",
    "adamw",
    "muon",
    "lion",
    "nesterov-adam",
    "amsgrad",
    "cautious-adamw",
];

const COPY_BYTES: usize = 512 << 20;

fn main() -> Result<()> {
    let options = Options::parse();
    let device = Device::new_cuda(0)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    let lists = List::all().into_iter().filter(|list| list.name.contains(&options.list));
    if let Some(steps) = options.steps {
        for list in lists {
            let (vars, grads) = list.tensors(&device)?;
            let mut srkl =
                optimizer(&vars, settings(&options.preset, &options.policy, options.packed))?;
            (0..steps).try_for_each(|_| step(&mut srkl, &vars, &grads))?;
            let taken = srkl.steps()?;
            ensure!(taken == steps as u64, "{}: {taken} of {steps} steps taken", list.name);
            println!("{}: {steps} steps of {} parameters", list.name, list.parameters());
        }
        return Ok(());
    }

    let name = stream.context().name().w()?;
    let from = Tensor::zeros(COPY_BYTES / 4, DType::F32, &device)?;
    let to = Var::from_tensor(&from)?;
    let copy = time(&stream, options.samples, || Ok(to.set(&from)?))?;
    ensure!(copy > 0., "{name} says that a copy took no time: its events keep none");
    let copy_bandwidth = 2. * COPY_BYTES as f64 / copy;
    drop((from, to));
    println!("{name}: a device-to-device copy moves {:.0} GB/s\n", copy_bandwidth / 1e9);
    println!("| list | step | ms | GB/s | of the copy | candle SGD / this | candle AdamW / this |");
    println!("|---|---|---|---|---|---|---|");

    let mut rows: Vec<Value> = vec![];
    for list in lists {
        let (vars, grads) = list.tensors(&device)?;
        let mut seconds: Vec<(&str, f64, f64)> = vec![];
        let packed_bytes = if list.dtype == DType::BF16 { 14. } else { 16. };
        for (contender, bytes, preset, policy, packs) in [
            ("SRKL", 12., "reference", "skip-step", false),
            ("SRKL, SkipBlock", 12., "reference", "skip-block", false),
            ("braked Adam", 28., "braked-adam", "skip-step", false),
            ("braked Adam, SkipBlock", 28., "braked-adam", "skip-block", false),
            ("braked Adam, Propagate", 28., "braked-adam", "propagate", false),
            ("braked Adam, packed", packed_bytes, "braked-adam", "skip-step", true),
            ("braked Adam, packed, Propagate", packed_bytes, "braked-adam", "propagate", true),
            ("SGD, Propagate", 12., "sgd", "propagate", false),
            ("AdamW", 28., "adamw", "skip-step", false),
            ("AdamW, Propagate", 28., "adamw", "propagate", false),
            ("Muon, Propagate", 36., "muon", "propagate", false),
            ("Lion, Propagate", 20., "lion", "propagate", false),
            ("Nesterov Adam, Propagate", 28., "nesterov-adam", "propagate", false),
            ("AMSGrad, Propagate", 36., "amsgrad", "propagate", false),
            ("cautious AdamW, Propagate", 28., "cautious-adamw", "propagate", false),
        ] {
            let mut srkl = optimizer(&vars, settings(preset, policy, packs))?;
            step(&mut srkl, &vars, &grads)?;
            let time = time(&stream, options.samples, || Ok(step(&mut srkl, &vars, &grads)?))?;
            seconds.push((contender, bytes, time));
        }
        let mut sgd = SGD::new(vars.clone(), 1e-3)?;
        let sgd = time(&stream, options.samples, || Ok(sgd.step(&grads)?))?;
        let mut adamw = AdamW::new(vars, ParamsAdamW::default())?;
        let adamw = time(&stream, options.samples, || Ok(adamw.step(&grads)?))?;
        seconds.extend([("candle SGD", 12., sgd), ("candle AdamW", 28., adamw)]);
        for (contender, bytes, time) in seconds {
            let bandwidth = bytes * list.parameters() as f64 / time;
            println!(
                "| {} | {contender} | {:.3} | {:.0} | {:.0}% | {:.1} | {:.1} |",
                list.name,
                time * 1e3,
                bandwidth / 1e9,
                100. * bandwidth / copy_bandwidth,
                sgd / time,
                adamw / time,
            );
            rows.push(json!({
                "list": list.name,
                "parameters": list.parameters(),
                "tensors": list.shapes.len(),
                "step": contender,
                "seconds": time,
                "bytes_per_second": bandwidth,
                "share_of_copy": bandwidth / copy_bandwidth,
            }));
        }
    }
    if let Some(path) = options.json {
        let figures =
            json!({ "device": name, "copy_bytes_per_second": copy_bandwidth, "steps": rows });
        let text = serde_json::to_string_pretty(&figures)?;
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// `packs`: with compact moments, and split masters of bf16.
fn settings(preset: &str, policy: &str, packs: bool) -> ParamsSrkl {
    let preset = match preset {
        "reference" => ParamsSrkl::reference(),
        "sgd" => ParamsSrkl::sgd(1e-3),
        "adamw" => ParamsSrkl::adamw(1e-3),
        "muon" => ParamsSrkl::muon(1e-3),
        "lion" => ParamsSrkl::lion(1e-4),
        "nesterov-adam" => ParamsSrkl {
            direction: Direction::NesterovAdam { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            ..ParamsSrkl::adamw(1e-3)
        },
        "amsgrad" => ParamsSrkl {
            direction: Direction::AmsGrad { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            ..ParamsSrkl::adamw(1e-3)
        },
        "cautious-adamw" => ParamsSrkl { cautious: true, ..ParamsSrkl::adamw(1e-3) },
        // Measures at its first step alone.
        _ => ParamsSrkl {
            measure: Measure { every: u64::MAX, first: 1, ..Measure::default() },
            ..ParamsSrkl::braked_adam()
        },
    };
    let nonfinite = match policy {
        "skip-step" => NonFinite::SkipStep,
        "skip-block" => NonFinite::SkipBlock,
        _ => NonFinite::Propagate,
    };
    let params = ParamsSrkl { nonfinite, ..preset };
    if packs { packed(params) } else { params }
}

/// With Muon for all matrices but embeddings, which have many rows.
fn optimizer(vars: &[Var], params: ParamsSrkl) -> Result<Srkl> {
    let named = vars.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone()));
    let hidden = |_: &str, var: &Var| usize::from(var.rank() == 2 && var.dims()[0] < 10_000);
    Ok(Srkl::builder().default_group(params).matrices(hidden).build(named)?)
}

/// A step, with its measurement where one is due: by the values of the parameters in place of second gradients.
fn step(srkl: &mut Srkl, vars: &[Var], grads: &GradStore) -> candle_core::Result<()> {
    let measures = srkl.measuring();
    srkl.step(grads)?;
    if !measures {
        return Ok(());
    }
    let mut others = GradStore::default();
    for var in vars {
        others.insert(var, var.as_tensor().copy()?);
    }
    srkl.observe(&others)
}

/// The median of the seconds that `step` takes on the device, after three to warm up.
fn time(stream: &CudaStream, samples: usize, mut step: impl FnMut() -> Result<()>) -> Result<f64> {
    (0..3).try_for_each(|_| step())?;
    let mut seconds = vec![];
    for _ in 0..samples.max(1) {
        let start = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        step()?;
        let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        seconds.push(start.elapsed_ms(&end).w()? as f64 / 1e3);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}
