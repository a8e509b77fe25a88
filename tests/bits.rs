//! The guard of the contract: a step gives the bits that it always gave, on every device.
//!
//! `bits.txt` has a hash of what each training of a fixed suite leaves: parameters, state and telemetry. A change of
//! these bits is a change that a training notices: it belongs in CHANGELOG.md under **Bits**, and the file is then made
//! anew by
//!
//! ```sh
//! WRITE_BITS=1 cargo test --release --test bits
//! ```

mod common;

use candle_core::{Device, Result};
use candle_srkl::Curvature;
use common::suite::{sizes, suite};
use common::training::{Kind, Left, STEPS, train};
use twox_hash::XxHash3_128;

/// A line of the file.
fn line(name: &str, left: &[Left]) -> String {
    let hash = |kind: Kind| {
        let mut hasher = XxHash3_128::new();
        let mut empty = true;
        for left in left.iter().filter(|left| left.kind == kind) {
            hasher.write(left.place.as_bytes());
            left.bits.iter().for_each(|bits| hasher.write(&bits.to_le_bytes()));
            empty = false;
        }
        if empty { "none".to_string() } else { format!("{:032x}", hasher.finish_128()) }
    };
    let [parameters, state, telemetry] = [Kind::Parameters, Kind::State, Kind::Telemetry].map(hash);
    format!("{name}: parameters {parameters}, state {state}, telemetry {telemetry}")
}

/// Trains the suite, each case on the next of these lists of devices, and compares with the file, or makes it anew.
fn check(devices: &[&[&Device]], may_write: bool) -> Result<()> {
    let expected: Vec<&str> = include_str!("bits.txt").lines().collect();
    let suite = suite();
    let mut wrong = vec![];
    let mut lines = vec![];
    for (case, (name, params)) in suite.iter().enumerate() {
        let devices = devices[case % devices.len()];
        let line = line(name, &train(params, sizes(params), 1 + case as u64, devices)?);
        if expected.get(case) != Some(&line.as_str()) {
            wrong.push(format!("  {line}\nnot {}", expected.get(case).unwrap_or(&"in the file")));
        }
        lines.push(line);
    }
    if may_write && std::env::var_os("WRITE_BITS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bits.txt");
        std::fs::write(path, lines.join("\n") + "\n")?;
        return Ok(());
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), suite.len(), wrong.join("\n"));
    assert_eq!(expected.len(), suite.len());
    Ok(())
}

#[test]
fn of_the_cpu() -> Result<()> {
    check(&[&[&Device::Cpu]], true)
}

#[cfg(feature = "cuda")]
#[test]
fn of_a_cuda_device() -> Result<()> {
    check(&[&[&Device::new_cuda(0)?]], false)
}

/// Parameters on the CPU and on two devices (of candle; they may be one card), in one optimizer.
#[cfg(feature = "cuda")]
#[test]
fn of_several_devices() -> Result<()> {
    let (a, b) = (Device::new_cuda(0)?, Device::new_cuda(0)?);
    check(&[&[&Device::Cpu, &a], &[&a, &Device::Cpu, &b], &[&a, &b]], false)
}

/// Else the suite would prove little.
#[test]
fn the_suite_moves_and_measures() -> Result<()> {
    for (case, (name, params)) in suite().iter().enumerate() {
        let left = train(params, sizes(params), 1 + case as u64, &[&Device::Cpu])?;
        let counters = |what: &str| {
            let place = format!("step {}, {what}", STEPS - 1);
            left.iter().find(|left| left.place == place).expect("in what is left").bits.clone()
        };
        assert!(counters("counters")[0] > 2, "{name}: {:?}", counters("counters"));
        let measured = !matches!(params.curvature, Curvature::GradSquare | Curvature::None);
        let taken = counters("measurements")[0];
        assert_eq!(taken > 0, measured, "{name}: {taken} measurements");
    }
    Ok(())
}
