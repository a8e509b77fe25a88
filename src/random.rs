//! Seeds for random layers, so that a loss can be computed again with the same masks.
//!
//! A random layer such as [`Dropout`](crate::Dropout) numbers its draws. Inside of [`with_seed`] the `n`-th
//! draw of the thread depends on the seed and on `n` alone: two runs of the same code with the same seed draw
//! the same numbers, while layers, and calls of one layer, differ from each other.
//!
//! Outside of [`with_seed`] every draw of the process has its own number, in whatever thread, and no number is used
//! twice. To make a training reproducible, wrap each step, with any optimizer:
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{AdamW, Module, Optimizer, VarBuilder, VarMap, linear};
//! use candle_srkl::{Dropout, random::with_seed};
//!
//! fn train() -> Result<f32> {
//!     let varmap = VarMap::new();
//!     let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//!     let (layer, dropout) = (linear(4, 3, vb)?, Dropout::new(0.2));
//! #   for var in varmap.all_vars() { var.set(&var.ones_like()?)?; }
//!     let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
//!     let loss = || layer.forward(&dropout.forward(&x, true)?)?.sqr()?.mean_all();
//!
//!     let mut opt = AdamW::new_lr(varmap.all_vars(), 0.01)?;
//!     for step in 0..10 {
//!         with_seed(step, || opt.backward_step(&loss()?))?;
//!     }
//!     with_seed(0, loss)?.to_scalar()
//! }
//! assert_eq!(train()?, train()?);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Ranks that train on parts of a batch must use different seeds: [`Srkl::micro_batch_seed`](crate::Srkl::micro_batch_seed).

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The seed of draws outside of [`with_seed`]: an arbitrary number that nobody is likely to use as a seed.
const NO_SEED: u64 = u64::from_be_bytes(*b"no seed\0");

/// The number of the next draw outside of [`with_seed`], of all threads.
static NEXT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// What the innermost `with_seed` of this thread draws from.
    static CURRENT: Cell<Option<Draws>> = const { Cell::new(None) };
}

#[derive(Clone, Copy)]
struct Draws {
    seed: u64,
    next: u64,
}

/// Runs `f`; random layers that it calls on this thread draw from `seed`, each draw with the next number from 0
/// on.
///
/// Calls can be nested: the inner one has numbers of its own, and the outer one goes on where it was, also
/// when the inner one panics. Threads that `f` starts are not inside.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_srkl::{Dropout, random::with_seed};
///
/// let (dropout, x) = (Dropout::new(0.5), Tensor::ones(64, DType::F32, &Device::Cpu)?);
/// let twice = || -> candle_core::Result<[Vec<f32>; 2]> {
///     Ok([dropout.forward(&x, true)?.to_vec1()?, dropout.forward(&x, true)?.to_vec1()?])
/// };
/// let [first, second] = with_seed(7, twice)?;
/// assert_ne!(first, second);
/// assert_eq!(with_seed(7, twice)?, [first, second]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn with_seed<T>(seed: u64, f: impl FnOnce() -> T) -> T {
    let _restore = Restore(CURRENT.replace(Some(Draws { seed, next: 0 })));
    f()
}

/// Puts back what was there before `with_seed`, also in a panic.
struct Restore(Option<Draws>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// The seed of the innermost [`with_seed`] that this thread is in, if any: for random layers of one's own.
///
/// ```
/// use candle_srkl::random::{current_seed, with_seed};
///
/// assert_eq!(with_seed(7, current_seed), Some(7));
/// assert_eq!(current_seed(), None);
/// ```
#[must_use]
pub fn current_seed() -> Option<u64> {
    CURRENT.get().map(|draws| draws.seed)
}

/// The seed and the number of the next draw of this thread.
pub(crate) fn next_draw() -> (u64, u64) {
    match CURRENT.get() {
        Some(Draws { seed, next }) => {
            CURRENT.set(Some(Draws { seed, next: next + 1 }));
            (seed, next)
        }
        None => (NO_SEED, NEXT.fetch_add(1, Ordering::Relaxed)),
    }
}
