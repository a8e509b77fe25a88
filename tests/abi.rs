//! `src/backend/cuda/abi.rs` is what bindgen makes of `kernels/abi.h`; with `WRITE_ABI=1` it becomes that.

const MADE: &str = include_str!(concat!(env!("OUT_DIR"), "/abi.rs"));
const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/backend/cuda/abi.rs");

#[test]
fn the_committed_abi_is_that_of_the_header() {
    if std::env::var_os("WRITE_ABI").is_some() {
        std::fs::write(COMMITTED, MADE).unwrap();
    }
    let committed = std::fs::read_to_string(COMMITTED).unwrap();
    let first = MADE.lines().zip(committed.lines()).find(|(made, committed)| made != committed);
    assert!(
        MADE == committed,
        "src/backend/cuda/abi.rs differs from what kernels/abi.h makes, first in (made, committed) {first:?}; \
         WRITE_ABI=1 cargo test --features bindgen --test abi writes it"
    );
}
