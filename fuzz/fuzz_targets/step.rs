#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/fuzz/targets.rs"]
#[allow(dead_code)] // Of the other targets.
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::step(bytes));
