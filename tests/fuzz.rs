//! The loader, the builder and the step on inputs that nobody thought of: what was found so far (`fuzz/corpus`), and new ones
//! for `FUZZ_SECONDS` (a second unless set) for each of the three, from `FUZZ_SEED`.
//!
//! An input that fails is left in a file, whose path is printed; `FUZZ_INPUT` set to a path runs that alone. `fuzz/README.md`
//! has how to search guided by coverage.

mod common;
#[path = "fuzz/targets.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{env, fs};

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// One target at a time: memory is counted.
static ALONE: Mutex<()> = Mutex::new(());

fn number(name: &str, otherwise: u64) -> u64 {
    env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

fn check(name: &str, target: fn(&[u8]), bytes: &[u8], place: &Path) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(bytes))) {
        if !place.exists() {
            fs::write(place, bytes).unwrap();
        }
        eprintln!("target `{name}` fails on {}", place.display());
        resume_unwind(panic)
    }
}

/// An input like `bytes`: some of them changed, left out, put in, or followed by those of another.
fn changed(bytes: &[u8], other: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..bytes.len() + 1);
        match rng.random_range(0..7) {
            0 => bytes.insert(at, rng.random()),
            1 => bytes.truncate(at),
            2 => bytes.extend((0..rng.random_range(1..40)).map(|_| rng.random::<u8>())),
            3 if !other.is_empty() => {
                bytes.truncate(at);
                bytes.extend(&other[rng.random_range(0..other.len())..]);
            }
            _ if at == bytes.len() => {}
            4 => bytes[at] ^= 1 << rng.random_range(0..8),
            5 => bytes[at] = rng.random(),
            _ => _ = bytes.remove(at),
        }
    }
    bytes
}

fn fuzz(name: &str, target: fn(&[u8])) {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Ok(path) = env::var("FUZZ_INPUT") {
        return check(name, target, &fs::read(&path).unwrap(), Path::new(&path));
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    let mut inputs = vec![];
    for path in &paths {
        let bytes = fs::read(path).unwrap();
        check(name, target, &bytes, path);
        inputs.push(bytes);
    }
    let seed = number("FUZZ_SEED", 0);
    let until = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS", 1));
    let mut tried = 0u64;
    while Instant::now() < until {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1 << 32).wrapping_add(tried));
        let bytes = if rng.random_range(0..3) == 0 {
            (0..rng.random_range(0..400)).map(|_| rng.random()).collect()
        } else {
            let mut pick = || &inputs[rng.random_range(0..inputs.len())];
            let (one, other) = (pick(), pick());
            changed(one, other, &mut rng)
        };
        let failed = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{seed}-{tried}"));
        check(name, target, &bytes, &failed);
        tried += 1;
    }
    println!("{name}: {} of the corpus and {tried} new inputs", paths.len());
}

#[test]
fn loader() {
    fuzz("loader", targets::loader);
}

#[test]
fn builder() {
    fuzz("builder", targets::builder);
}

#[test]
fn step() {
    fuzz("step", targets::step);
}
