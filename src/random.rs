//! stub
/// stub
pub fn with_seed<T>(_seed: u64, f: impl FnOnce() -> T) -> T { f() }
/// stub
pub fn current_seed() -> Option<u64> { None }
