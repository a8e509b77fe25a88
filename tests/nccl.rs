//! Ranks whose devices talk by NCCL: processes, and threads with a device each.

mod common;

use std::env;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{Collective, Nccl, ParamsSrkl, Srkl, Tcp, Threads};
use common::suite::{sizes, suite};
use common::training::{Rank, Share, assert_same, train_share};

use common::*;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

/// The number of this process and of all, if it is a rank.
fn rank() -> Option<(usize, usize)> {
    let number = |name| env::var(name).ok()?.parse().ok();
    Some((number("RANK")?, number("WORLD")?))
}

/// Whether these devices are a stand-in's, of which each process has its own.
fn is_stand_in() -> bool {
    env::var("CUDA_ON_CPU_LIB").is_ok()
}

/// Whether there are so many devices. Tests that need more pass by, and say so.
fn has_devices(count: usize) -> bool {
    let has = is_stand_in() || (0..count).all(|i| Device::new_cuda(i).is_ok());
    if !has {
        eprintln!("not run: it needs {count} devices");
    }
    has
}

/// Runs a test of this file as ranks. Returns what each has said, and whether all have ended well.
fn processes(test: &str, world_size: usize, how: &str) -> (bool, String) {
    processes_with(test, world_size, how, &[])
}

/// The same with more variables of their environment.
fn processes_with(
    test: &str,
    world_size: usize,
    how: &str,
    variables: &[(&str, String)],
) -> (bool, String) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let start = |rank: usize| {
        let mut command = Command::new(env::current_exe().unwrap());
        // A card for each; the stand-in has one for each process.
        command.env("CUDA_VISIBLE_DEVICES", rank.to_string());
        command.args(["--exact", test, "--nocapture"]).env("ADDRESS", address.to_string());
        command.env("RANK", rank.to_string()).env("WORLD", world_size.to_string()).env("HOW", how);
        command.envs(variables.iter().cloned());
        command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let started: Vec<_> = (0..world_size).map(start).collect();
    let ended: Vec<_> = started.into_iter().map(|p| p.wait_with_output().unwrap()).collect();
    let text = |output: &std::process::Output| {
        let text = [&output.stdout[..], &output.stderr].concat();
        String::from_utf8_lossy(&text).into_owned()
    };
    let text = ended.iter().map(text).collect::<Vec<_>>().join("\n");
    (ended.iter().all(|output| output.status.success()), text)
}

/// The ranks of processes, each with a device of its own.
fn of_processes(device: &Device) -> Result<Nccl> {
    let (rank, world_size) = rank().expect("started as a rank");
    Nccl::new(Tcp::new(env::var("ADDRESS").unwrap(), rank, world_size)?, device)
}

/// The bits of the suite's trainings in one process are those of ranks, which are processes.
#[test]
fn processes_have_the_bits_of_one() -> Result<()> {
    let suite = suite();
    let last = suite.len() - 1;
    let cases =
        [(7, false), (20, false), (last - 2, false), (7, true), (41, true), (last - 4, true)];
    if let Some((number, world_size)) = rank() {
        let device = Device::new_cuda(0)?;
        let rank: Rank = Arc::new(Mutex::new(Box::new(of_processes(&device)?)));
        for (case, sharded) in cases {
            let (name, params) = &suite[case];
            let shapes: Vec<Vec<usize>> = sizes(params).iter().map(|n| vec![*n]).collect();
            let one = train_share(
                params,
                &shapes,
                7,
                &[&Device::Cpu],
                &Share { micro_batches: 4, ..Share::ALL },
            )?;
            let share = Share {
                micro_batches: 4,
                rank: Some(rank.clone()),
                bucket_bytes: 20_000,
                sharded,
                folder: Some(PathBuf::from(env::var("HOW").unwrap())),
            };
            let each = train_share(params, &shapes, 7, &[&device], &share)?;
            assert_same(&each, &one, &format!("{name}, {sharded}, rank {number} of {world_size}"));
        }
        return Ok(());
    }
    for world_size in [2, 4].into_iter().filter(|count| has_devices(*count)) {
        let folder = tempfile::tempdir()?;
        let how = folder.path().display().to_string();
        let (good, text) = processes("processes_have_the_bits_of_one", world_size, &how);
        assert!(good, "{text}");
    }
    Ok(())
}

/// The ranks of threads, with several devices of one process.
#[test]
fn devices_of_one_process() -> Result<()> {
    const HOW: &str = "CUDA_ON_CPU_DEVICES";
    if !has_devices(2) {
        return Ok(());
    }
    if env::var(HOW).is_err() && is_stand_in() {
        // One device here: the test starts itself where there are two, if it can.
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "devices_of_one_process", "--nocapture"]).env(HOW, "2");
        assert!(command.status()?.success());
        return Ok(());
    }
    let values = noise(30_000, 1., 3);
    let train = |rank: Option<Box<dyn Collective>>, device: &Device| -> Result<Vec<u64>> {
        let var = Var::from_tensor(&tensor(&values, DType::BF16)?.to_device(device)?)?;
        let mut builder = Srkl::builder().default_group(ParamsSrkl::braked_adam());
        if let Some(rank) = rank {
            builder = builder.collective(rank);
        }
        let mut opt = builder.build([("w".to_string(), var.clone())])?;
        let each = 2 / opt.world_size();
        for step in 0..4 {
            let first = opt.rank() * each;
            opt.backward_step_over(each, |i| {
                let x = noise(var.elem_count(), 1., (10 * step + first + i) as u64);
                let x = tensor(&x, DType::BF16)?.to_device(device)?;
                (var.as_tensor() * x)?.sqr()?.sum_all()
            })?;
        }
        bits(&var.to_device(&Device::Cpu)?)
    };
    let one = train(None, &Device::new_cuda(0)?)?;
    let each: Vec<Result<Vec<u64>>> = thread::scope(|scope| {
        let start = |rank: Threads| {
            let train = &train;
            scope.spawn(move || {
                let device = Device::new_cuda(rank.rank())?;
                train(Some(Box::new(Nccl::new(rank, &device)?)), &device)
            })
        };
        let ranks: Vec<_> = Threads::new(2).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    });
    for each in each {
        assert!(each? == one);
    }
    Ok(())
}

/// A captured step: its exchange is part of each replay.
#[test]
fn captured_steps() -> Result<()> {
    let n = 30_000;
    let params = ParamsSrkl { max_grad_norm: Some(1.), ..ParamsSrkl::adamw(1e-2) };
    let gradient = |rank: usize| tensor(&noise(n, 1., rank as u64), DType::BF16);
    let start = tensor(&noise(n, 1., 9), DType::BF16)?;
    let (before, replays) = (2, 3);
    if let Some((number, _)) = rank() {
        // One stream, and no events, which candle would wait for.
        let device = Device::new_cuda_with_stream(0)?;
        // SAFETY: all work on the device goes to its one stream.
        unsafe { device.as_cuda_device()?.disable_event_tracking() };
        let sharded = env::var("HOW").unwrap() == "sharded";
        let var = Var::from_tensor(&start.to_device(&device)?)?;
        let named = [("w".to_string(), var.clone())];
        let builder = Srkl::builder().default_group(params).sharded(sharded);
        let mut opt = builder.collective(of_processes(&device)?).build(named)?;
        let given = grads([(&var, gradient(number)?.to_device(&device)?)]);
        for _ in 0..before {
            opt.step(&given)?;
        }
        let stream = device.as_cuda_device()?.cuda_stream();
        stream.synchronize().w()?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let captured = opt.step(&given);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).w()?.expect("a graph");
        captured?;
        for _ in 0..replays {
            graph.launch().w()?;
        }
        stream.synchronize().w()?;
        assert_eq!(opt.steps()?, before + replays);
        // And a step that is not captured goes on.
        opt.step(&given)?;
        let bits = bits(&var.to_device(&Device::Cpu)?)?;
        println!("left {bits:?}");
        return Ok(());
    }
    let var = Var::from_tensor(&start)?;
    let mut opt = Srkl::new(vec![var.clone()], params)?;
    for _ in 0..before + replays + 1 {
        for rank in 0..2 {
            opt.accumulate(&grads([(&var, gradient(rank)?)]))?;
        }
        opt.step_accumulated()?;
    }
    let expected = format!("left {:?}", bits(&var)?);
    for how in ["replicated", "sharded"].into_iter().filter(|_| has_devices(2)) {
        let (good, text) = processes("captured_steps", 2, how);
        assert!(good, "{how}: {}", text.chars().take(5000).collect::<String>());
        let left: Vec<&str> = text.lines().filter(|line| line.starts_with("left")).collect();
        assert!(left.len() == 2 && left.iter().all(|left| *left == expected), "{how}");
    }
    Ok(())
}

/// What is wrong on one rank: all are told, and nobody waits for a device.
#[test]
fn errors_of_one_rank() -> Result<()> {
    if let Some((rank, _)) = rank() {
        let how = env::var("HOW").unwrap();
        let device = if how == "cpu" && rank == 1 { Device::Cpu } else { Device::new_cuda(0)? };
        let nccl = match of_processes(&device) {
            Ok(nccl) => nccl,
            Err(e) => {
                assert!(how == "cpu" && e.to_string().contains("rank 1"), "{e}");
                return Ok(());
            }
        };
        let at = if how == "elsewhere" && rank == 1 { Device::Cpu } else { device.clone() };
        let var = Var::from_tensor(&Tensor::ones(5000, DType::F32, &at)?)?;
        let named = [("w".to_string(), var.clone())];
        let builder = Srkl::builder().default_group(ParamsSrkl::adamw(1e-2));
        let mut opt = match builder.collective(nccl).build(named) {
            Ok(opt) => opt,
            Err(e) => {
                assert!(how == "elsewhere" && e.to_string().contains("device to device"), "{e}");
                return Ok(());
            }
        };
        for (step, n) in [5000, if rank == 1 { 4999 } else { 5000 }, 5000].into_iter().enumerate() {
            let gradient = Tensor::ones(n, DType::F32, &device)?;
            let stepped = opt.step(&grads([(&var, gradient)]));
            match (step, stepped) {
                (1, Err(e)) => assert!(e.to_string().contains("rank 1"), "{e}"),
                (1, Ok(())) => return Err(Error::msg("a gradient of a wrong shape")),
                (_, stepped) => stepped?,
            }
        }
        // A NaN is decided on alike.
        let mut values = vec![1f32; 5000];
        if rank == 1 {
            values[4321] = f32::NAN;
        }
        opt.step(&grads([(&var, Tensor::new(values, &device)?)]))?;
        assert_eq!((opt.steps()?, opt.skipped_steps()?), (2, 1));
        return Ok(());
    }
    for how in ["shape", "cpu", "elsewhere"].into_iter().filter(|_| has_devices(2)) {
        let (good, text) = processes("errors_of_one_rank", 2, how);
        assert!(good, "{how}: {text}");
    }
    Ok(())
}

/// A step that does not measure does not wait for its device, nor copies from it: what is counted is what the stand-in for NCCL
/// does, one copy and one wait for each message.
#[test]
fn no_step_waits_for_its_device() -> Result<()> {
    const STATS: &str = "CUDA_ON_CPU_STATS";
    if let Some((number, _)) = rank() {
        let device = Device::new_cuda(0)?;
        let how = env::var("HOW").unwrap();
        let (steps, sharded) = how.split_once(' ').expect("steps, and whether state is sharded");
        let var = Var::from_tensor(&Tensor::ones(50_000, DType::BF16, &device)?)?;
        let named = [("w".to_string(), var.clone())];
        let params = ParamsSrkl { max_grad_norm: Some(1.), ..ParamsSrkl::adamw(1e-2) };
        let builder = Srkl::builder().default_group(params).sharded(sharded == "true");
        let mut opt = builder.collective(of_processes(&device)?).build(named)?;
        let given = grads([(&var, Tensor::ones(50_000, DType::BF16, &device)?)]);
        for _ in 0..steps.parse().unwrap() {
            opt.step(&given)?;
        }
        println!("rank {number} has stepped");
        return Ok(());
    }
    if !is_stand_in() {
        eprintln!("not counted: this is no stand-in");
        return Ok(());
    }
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0) as i64;
    for sharded in [false, true] {
        let folder = tempfile::tempdir()?;
        let mut counts = vec![];
        for steps in [2, 12] {
            let file = folder.path().join(format!("{steps}-%p"));
            let how = format!("{steps} {sharded}");
            let variables = [(STATS, file.display().to_string())];
            let (good, text) = processes_with("no_step_waits_for_its_device", 2, &how, &variables);
            assert!(good, "{text}");
            for entry in std::fs::read_dir(folder.path())? {
                let entry = entry?;
                if !entry.file_name().to_string_lossy().starts_with(&format!("{steps}-")) {
                    continue;
                }
                let stats: serde_json::Value =
                    serde_json::from_slice(&std::fs::read(entry.path())?).map_err(Error::wrap)?;
                let (mut calls, mut bytes) = (0, 0);
                let ranks = stats["nccl"].as_object().expect("NCCL was used");
                for (call, of_call) in ranks.values().flat_map(|rank| rank.as_object().unwrap()) {
                    bytes += number(&of_call["sent_bytes"]);
                    calls += if call == "ncclSend" { 0 } else { number(&of_call["calls"]) };
                }
                let to_host = &stats["device_to_host"];
                let more_bytes = number(&to_host["bytes"]) - bytes;
                let more_waits = number(&stats["syncs"]) - number(&to_host["count"]) - calls;
                counts.push((steps, more_bytes, more_waits));
            }
        }
        counts.sort_unstable();
        let [a, b, c, d] = counts[..] else { panic!("{counts:?}") };
        assert!(a.1 == c.1 && a.2 == c.2 && (b.1, b.2) == (d.1, d.2), "{sharded}: {counts:?}");
    }
    Ok(())
}
