//! What Rust and the kernels share.

// Made by bindgen from kernels/abi.h.
#[allow(dead_code, missing_docs, clippy::all)]
pub(crate) mod abi;
