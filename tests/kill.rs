//! A process that is killed while it saves leaves the old file or the new one, whole.
#![cfg(unix)]

mod common;

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;
use std::{env, fs};

use candle_core::{DType, Result};
use candle_nn::Optimizer;
use candle_srkl::{ParamsSrkl, Srkl};
use common::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Its file, of 2.4 MB, takes milliseconds to write.
fn optimizer(steps: u64) -> Result<Srkl> {
    let w = var(&noise(300_000, 1., 0), DType::F32)?;
    let builder = Srkl::builder().default_group(ParamsSrkl::adamw(1e-3));
    let mut opt = builder.build([("w".to_string(), w.clone())])?;
    for step in 0..steps {
        opt.step(&grads([(&w, tensor(&noise(w.elem_count(), 1., 1 + step), DType::F32)?)]))?;
    }
    Ok(opt)
}

/// Saves two optimizers in turn, for ever.
fn save_until_killed(path: &Path) -> Result<()> {
    let mut both = [optimizer(1)?, optimizer(2)?];
    for turn in 0.. {
        both[turn % 2].save(path)?;
        if turn == 0 {
            println!("saving");
        }
    }
    Ok(())
}

/// As often as `KILLS` says, 40 times unless set.
#[test]
fn the_old_file_or_the_new_one() -> Result<()> {
    if let Ok(path) = env::var("SAVE_TO") {
        return save_until_killed(Path::new(&path));
    }
    let kills: usize = env::var("KILLS").map_or(40, |kills| kills.parse().unwrap());
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    let both = [saved(&mut optimizer(1)?)?, saved(&mut optimizer(2)?)?];
    assert!(both[0] != both[1]);
    optimizer(1)?.save(&path)?;
    let mut rng = StdRng::seed_from_u64(0);
    let (mut found, mut left_over) = ([0; 2], 0);
    for kill in 0..kills {
        let mut command = Command::new(env::current_exe()?);
        command.args(["--exact", "the_old_file_or_the_new_one", "--nocapture"]);
        let mut child = command.env("SAVE_TO", &path).stdout(Stdio::piped()).spawn()?;
        let mut told = vec![];
        let mut stdout = child.stdout.take().unwrap();
        while !told.ends_with(b"saving\n") {
            let mut byte = [0];
            stdout.read_exact(&mut byte)?;
            told.extend(byte);
        }
        thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
        child.kill()?;
        child.wait()?;

        let contents = contents(&path)?;
        let which = both.iter().position(|whole| *whole == contents);
        let which = which.unwrap_or_else(|| panic!("kill {kill}: neither file"));
        found[which] += 1;
        let mut opt = optimizer(0)?;
        opt.load(&path)?;
        assert_eq!(opt.steps()?, 1 + which as u64);
        // At most the temporary files that `save` speaks of.
        let others = fs::read_dir(folder.path())?.map(|entry| Ok(entry?.path()));
        let others: Vec<_> = others.collect::<Result<Vec<_>>>()?;
        let others: Vec<_> = others.into_iter().filter(|other| *other != path).collect();
        assert!(others.len() <= 2, "kill {kill}: {others:?}");
        left_over += !others.is_empty() as usize;
        for other in others {
            let name = other.file_name().unwrap().to_str().unwrap();
            assert!([".srkl-", ".tmp"].iter().any(|start| name.starts_with(start)), "{name}");
            fs::remove_file(&other)?;
        }
    }
    println!("{kills} kills: {found:?} of the two files, {left_over} in the middle of a save");
    // Else nothing has been tried.
    assert!(kills < 40 || left_over > kills / 10 && found.iter().all(|found| *found > 0));
    Ok(())
}
