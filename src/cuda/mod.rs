//! What Rust and the kernels share, and the order of their work.

// Made by bindgen from kernels/abi.h.
#[allow(dead_code, missing_docs, clippy::all)]
pub(crate) mod abi;
pub(crate) mod work;
