//! Ranks that are processes of `mpirun`, over loopback. Each test starts itself as several ranks.

mod common;

use std::env;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{Mpi, ParamsSrkl, Srkl};

use common::*;

/// Whether this process is a rank.
fn is_rank() -> bool {
    env::var_os("OMPI_COMM_WORLD_RANK").is_some()
}

/// Runs a test of this file as ranks, in `folder`.
fn mpirun(test: &str, world_size: usize, folder: &Path, how: &str) -> Output {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &world_size.to_string()]);
    // Ranks that wait for each other for ever are a fault.
    command.args(["--timeout", "100"]);
    // Loopback alone, and no waiting at full speed: there may be fewer cores than ranks.
    command.args(["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"]);
    command.args(["--mca", "mpi_yield_when_idle", "1"]);
    command.arg(env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    command.env("FOLDER", folder).env("HOW", how).output().expect("`mpirun` of Open MPI")
}

fn settings() -> ParamsSrkl {
    ParamsSrkl::braked_adam_averaged()
}

/// Trains by 4 micro-batches, by loss and by gradient, and saves what is left.
fn train(opt: &mut Srkl, var: &Var, path: &Path, steps: Range<usize>) -> Result<Vec<u64>> {
    let each = 4 / opt.world_size();
    let before = opt.rank() * each;
    for step in steps {
        opt.backward_step_over(each, |i| {
            let x = noise(var.elem_count(), 1., (10 * step + before + i) as u64);
            (var.as_tensor() * tensor(&x, DType::F32)?)?.sqr()?.sum_all()
        })?;
    }
    opt.save(path)?;
    bits(var)
}

#[test]
fn the_bits_of_one_process() -> Result<()> {
    let start = noise(20_001, 1., 77);
    let build = || {
        let var = var(&start, DType::F32)?;
        let builder = Srkl::builder().default_group(settings());
        Ok::<_, candle_core::Error>((builder, var))
    };
    if is_rank() {
        let (builder, var) = build()?;
        let named = [("w".to_string(), var.clone())];
        let how = env::var("HOW").unwrap();
        let folder = PathBuf::from(env::var_os("FOLDER").unwrap());
        let sharded = how.contains("sharded");
        // Half of it, or what others have left of it.
        let (first, rest) = (how.contains("first"), how.contains("rest"));
        if rest {
            let half = candle_core::safetensors::load(folder.join("half"), &Device::Cpu)?;
            var.set(&half["w"])?;
        }
        let builder = builder.collective(Mpi::new()?).bucket_bytes(10_000).sharded(sharded);
        let mut opt = builder.build(named)?;
        if rest {
            opt.load(folder.join("state"))?;
        }
        let steps = if first {
            0..3
        } else if rest {
            3..5
        } else {
            0..5
        };
        let left = train(&mut opt, &var, &folder.join("state"), steps)?;
        if first && opt.rank() == 0 {
            var.as_tensor().save_safetensors("w", folder.join("half"))?;
        }
        let bytes: Vec<u8> = left.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        std::fs::write(folder.join(format!("rank {}", opt.rank())), bytes)?;
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (builder, var) = build()?;
    let mut opt = builder.build([("w".to_string(), var.clone())])?;
    let left = train(&mut opt, &var, &folder.path().join("one"), 0..5)?;
    let expected: Vec<u8> = left.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let state = contents(&folder.path().join("one"))?;
    // The last two go on from what another number of ranks has saved.
    for (world_size, how, first) in [
        (2, "", None),
        (4, "", None),
        (2, "sharded", None),
        (4, "sharded", None),
        (4, "rest sharded", Some((2, "first sharded"))),
        (2, "rest", Some((4, "first sharded"))),
    ] {
        if let Some((world_size, how)) = first {
            let output = mpirun("the_bits_of_one_process", world_size, folder.path(), how);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let output = mpirun("the_bits_of_one_process", world_size, folder.path(), how);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for rank in 0..world_size {
            let path = folder.path().join(format!("rank {rank}"));
            assert!(std::fs::read(&path)? == expected, "rank {rank} of {world_size} {how}");
            std::fs::remove_file(path)?;
        }
        assert!(contents(&folder.path().join("state"))? == state, "{world_size} {how}");
    }
    Ok(())
}

/// An error of one rank is told to all, and nobody waits for one that leaves, panics or is killed.
#[test]
fn ranks_that_fail() -> Result<()> {
    if is_rank() {
        let var = var(&[1.; 5000], DType::F32)?;
        let named = [("w".to_string(), var.clone())];
        let builder = Srkl::builder().default_group(ParamsSrkl::adamw(1e-2));
        let how = env::var("HOW").unwrap();
        let (how, sharded) =
            how.split_once(' ').map_or((how.as_str(), false), |(how, _)| (how, true));
        let mut opt = builder.collective(Mpi::new()?).sharded(sharded).build(named)?;
        for step in 0..3 {
            let bad = step == 2 && opt.rank() == 1;
            match how {
                "leaves" if bad => return Ok(()),
                "panics" if bad => panic!("on purpose"),
                "killed" if bad => std::process::abort(),
                _ => {}
            }
            let n = if bad { 4999 } else { 5000 };
            let stepped = opt.step(&grads([(&var, tensor(&vec![1.; n], DType::F32)?)]));
            if let Err(e) = stepped {
                let path = Path::new(&env::var_os("FOLDER").unwrap()).join(opt.rank().to_string());
                std::fs::write(path, e.to_string())?;
                if how == "leaves" {
                    // Whoever goes on does not wait for the one that has left.
                    assert!(opt.save("never written").is_err());
                }
                return Err(e);
            }
        }
        return Ok(());
    }
    for (how, told, words) in [
        ("shape", "rank 1: gradient of `w`", &[][..]),
        ("leaves", "rank 1 has left", &[]),
        ("panics", "", &["on purpose"]),
        ("killed", "", &["signal"]),
        ("shape sharded", "rank 1: gradient of `w`", &[]),
        ("leaves sharded", "rank 1 has left", &[]),
        ("panics sharded", "", &["on purpose"]),
    ] {
        let folder = tempfile::tempdir()?;
        let started = Instant::now();
        let output = mpirun("ranks_that_fail", 3, folder.path(), how);
        // Not by the time that is allowed: somebody has told the others. (What mpirun says of it varies.)
        assert!(started.elapsed() < Duration::from_secs(60), "{how}");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(!output.status.success(), "{how}: {text}");
        assert!(words.iter().all(|word| text.contains(word)), "{how}: {text}");
        for rank in ["0", "2"].iter().filter(|_| !told.is_empty()) {
            let error = std::fs::read_to_string(folder.path().join(rank))?;
            assert!(error.contains(told), "{how}: {error}");
        }
    }
    Ok(())
}
