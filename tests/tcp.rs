//! Ranks with connections between them: threads and processes, over loopback.

mod common;

use std::env;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Error, Result};
use candle_nn::Optimizer;
use candle_srkl::{Collective, ParamsSrkl, Srkl, Tcp};

use common::*;

/// An address that nobody listens at.
fn address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Runs ranks in threads, and ends the process if they wait for each other for ever.
fn ranks<T: Send>(world_size: usize, run: impl Fn(Tcp) -> Result<T> + Sync) -> Vec<Result<T>> {
    unless_they_wait(|| run_ranks(world_size, run))
}

fn run_ranks<T: Send>(world_size: usize, run: impl Fn(Tcp) -> Result<T> + Sync) -> Vec<Result<T>> {
    let address = address();
    thread::scope(|scope| {
        let start = |rank| {
            let run = &run;
            scope.spawn(move || run(Tcp::new(address, rank, world_size)?))
        };
        // The last ones first: they wait for rank 0.
        let started: Vec<_> = (0..world_size).rev().map(start).collect();
        let ended = started
            .into_iter()
            .rev()
            .map(|rank| rank.join().unwrap_or_else(|_| Err(Error::msg("a rank has panicked"))));
        ended.collect()
    })
}

/// What each rank's bytes are.
fn bytes(rank: usize, other: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + 31 * rank + 101 * other) as u8).collect()
}

/// All calls, with parts of nothing, of a few bytes, and of more than the system has room for.
#[test]
fn calls_move_what_they_say() -> Result<()> {
    for world_size in [1, 2, 3, 5] {
        let run = |mut tcp: Tcp| {
            let own = tcp.rank();
            assert_eq!(tcp.world_size(), world_size);
            for large in [0, 1, 9000, 3_000_000] {
                let parts: Vec<usize> =
                    (0..world_size).map(|rank| if rank % 2 == 0 { large } else { 5 }).collect();
                let from: Vec<u8> =
                    (0..world_size).flat_map(|to| bytes(own, to, parts[to])).collect();
                let mut to = vec![0; world_size * parts[own]];
                tcp.all_to_all(&from, &parts, &mut to)?;
                let expected: Vec<u8> =
                    (0..world_size).flat_map(|from| bytes(from, own, parts[own])).collect();
                assert!(to == expected);

                let mut whole = vec![0; parts.iter().sum()];
                let start: usize = parts[..own].iter().sum();
                whole[start..start + parts[own]].copy_from_slice(&bytes(own, 99, parts[own]));
                tcp.all_gather(&mut whole, &parts)?;
                let expected: Vec<u8> =
                    (0..world_size).flat_map(|rank| bytes(rank, 99, parts[rank])).collect();
                assert!(whole == expected);

                let told = tcp.exchange(&bytes(own, 7, own * large / 10))?;
                for (rank, told) in told.iter().enumerate() {
                    assert!(*told == bytes(rank, 7, rank * large / 10));
                }
            }
            Ok(())
        };
        ranks(world_size, run).into_iter().collect::<Result<Vec<()>>>()?;
    }
    Ok(())
}

/// A training of 4 micro-batches.
fn train(rank: Option<Tcp>) -> Result<Vec<u64>> {
    let var = var(&noise(20_001, 1., 77), DType::F32)?;
    let mut builder = Srkl::builder().default_group(ParamsSrkl::braked_adam_averaged());
    if let Some(rank) = rank {
        builder = builder.collective(rank).sharded(true);
    }
    let mut opt = builder.build([("w".to_string(), var.clone())])?;
    let each = 4 / opt.world_size();
    let before = opt.rank() * each;
    for step in 0..5 {
        opt.backward_step_over(each, |i| {
            let x = noise(var.elem_count(), 1., (10 * step + before + i) as u64);
            (var.as_tensor() * tensor(&x, DType::F32)?)?.sqr()?.sum_all()
        })?;
    }
    bits(&var)
}

#[test]
fn the_bits_of_one_process() -> Result<()> {
    let one = train(None)?;
    for world_size in [2, 4] {
        for each in ranks(world_size, |rank| train(Some(rank))) {
            assert!(each? == one, "{world_size}");
        }
    }
    Ok(())
}

/// Whoever leaves, panics, or calls something else.
#[test]
fn ranks_that_fail() {
    let sizes = [10, 5_000_000].into_iter().flat_map(|large| [(2, large), (3, large), (4, large)]);
    for (world_size, large) in sizes {
        for (how, words) in [
            ("leaves", "has left"),
            ("panics", "has panicked"),
            ("differs", "calls"),
            ("differs much", "calls"),
        ] {
            let run = |mut tcp: Tcp| -> Result<()> {
                for call in 0..3 {
                    if tcp.rank() == 1 && call == 2 {
                        match how {
                            "leaves" => return Ok(()),
                            "panics" => panic!("on purpose"),
                            "differs" => {
                                tcp.all_gather(&mut vec![1; 2 * world_size], &vec![2; world_size])?
                            }
                            _ => {
                                let parts = vec![large; world_size];
                                tcp.all_gather(&mut vec![1; large * world_size], &parts)?;
                            }
                        }
                    }
                    tcp.exchange(&vec![1; large])?;
                }
                Ok(())
            };
            let started = Instant::now();
            let ended = ranks(world_size, run);
            let case = format!("{how} {large} {world_size}");
            assert!(started.elapsed() < Duration::from_secs(20), "{case}");
            for rank in (0..world_size).filter(|rank| *rank != 1) {
                let error = ended[rank].as_ref().expect_err("rank 1 is gone").to_string();
                let told = error.contains("rank 1") || how.starts_with("differs");
                assert!(told && error.contains(words), "{case}: {error}");
            }
        }
    }
    let run = |mut tcp: Tcp| -> Result<()> {
        if tcp.rank() == 1 {
            tcp.abort("no more batches");
        }
        tcp.exchange(&[]).map(|_| ())
    };
    for ended in ranks(3, run) {
        let error = ended.expect_err("rank 1 has aborted").to_string();
        assert!(error.contains("rank 1") && error.contains("no more batches"), "{error}");
    }
}

/// What is wrong when ranks come; somebody else who connects is not a rank.
#[test]
fn ranks_that_do_not_fit() -> Result<()> {
    let error = Tcp::new(address(), 2, 2).expect_err("no such rank").to_string();
    assert!(error.contains("below its `world_size` 2"), "{error}");
    for (second, words) in [((1, 3), "expects 3"), ((0, 2), "")] {
        let address = address();
        let failed = thread::scope(|scope| {
            let (rank, world_size) = second;
            let first = scope.spawn(move || Tcp::new(address, 0, 2).map(|_| ()));
            thread::sleep(Duration::from_millis(100));
            if rank == 0 {
                // Its address is taken.
                let error = Tcp::new(address, rank, world_size).expect_err("taken").to_string();
                assert!(error.contains("rank 0"), "{error}");
                return Tcp::new(address, 1, 2).map(|_| ()).and(first.join().unwrap());
            }
            let told = Tcp::new(address, rank, world_size).expect_err("another world").to_string();
            assert!(told.contains("expects 3"), "{told}");
            first.join().unwrap()
        });
        match failed {
            Err(e) => assert!(!words.is_empty() && e.to_string().contains(words), "{e}"),
            Ok(()) => assert_eq!(words, ""),
        }
    }
    let address = address();
    thread::scope(|scope| {
        let first =
            scope.spawn(move || Tcp::new(address, 0, 2).and_then(|mut tcp| tcp.exchange(&[1])));
        thread::sleep(Duration::from_millis(100));
        let mut stranger = TcpStream::connect(address)?;
        stranger.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let second = Tcp::new(address, 1, 2)?.exchange(&[2])?;
        assert_eq!(first.join().unwrap()?, second);
        Ok(())
    })
}

/// Real processes, of which one is killed.
#[test]
fn a_process_that_is_killed() -> Result<()> {
    if let Ok(rank) = env::var("RANK") {
        let tcp = Tcp::new(env::var("ADDRESS").unwrap(), rank.parse().unwrap(), 3)?;
        let var = var(&[1.; 5000], DType::F32)?;
        let named = [("w".to_string(), var.clone())];
        let builder = Srkl::builder().default_group(ParamsSrkl::adamw(1e-2));
        let mut opt = builder.collective(tcp).sharded(true).build(named)?;
        loop {
            opt.step(&grads([(&var, tensor(&[1.; 5000], DType::F32)?)]))?;
            std::fs::write(env::var("STEPPED").unwrap(), "")?;
        }
    }
    let folder = tempfile::tempdir()?;
    let stepped = folder.path().join("stepped");
    let address = address().to_string();
    let start = |rank: usize| -> Child {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "a_process_that_is_killed", "--nocapture"]);
        command.env("RANK", rank.to_string()).env("ADDRESS", &address).env("STEPPED", &stepped);
        command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let mut started: Vec<Child> = (0..3).map(start).collect();
    let until = Instant::now() + Duration::from_secs(60);
    while !stepped.exists() && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    started[1].kill()?;
    for (rank, process) in started.into_iter().enumerate() {
        let output = process.wait_with_output()?;
        assert!(!output.status.success(), "rank {rank}");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(rank == 1 || text.contains("rank 1 has left"), "rank {rank}: {text}");
    }
    Ok(())
}
