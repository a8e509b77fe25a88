//! The threads that all optimizers of a process share.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// By their number of threads; in most programs there is one.
static POOLS: Mutex<BTreeMap<usize, Arc<Pool>>> = Mutex::new(BTreeMap::new());

thread_local! {
    static IS_WORKER: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is one of a [`Pool`], so that rayon's `par_` functions share its work there. Elsewhere
/// they would move it to rayon's global pool, where candle computes.
pub(crate) fn has_helpers() -> bool {
    IS_WORKER.get()
}

/// Threads, which one optimizer at a time may use.
///
/// Work in the pool holds a tensor's lock while it waits for the threads that share a large block, and a waiting
/// thread takes up other work of its pool. That work must not wait for a lock, so only one optimizer at a time has
/// work here.
pub(crate) struct Pool {
    threads: ThreadPool,
    taken: Mutex<bool>,
    free: Condvar,
}

/// The right to use the threads.
pub(crate) struct Turn<'a>(&'a Pool);

impl Pool {
    /// The pool with as many threads as the rayon pool that this is called in; `None` if that is one, the caller
    /// itself.
    pub fn shared() -> Result<Option<Arc<Self>>> {
        let count = rayon::current_num_threads();
        if count == 1 {
            return Ok(None);
        }
        let mut pools = lock(&POOLS);
        if let Some(pool) = pools.get(&count) {
            return Ok(Some(pool.clone()));
        }
        let threads = ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|i| format!("srkl-{i}"))
            .start_handler(|_| IS_WORKER.set(true))
            .build()
            .map_err(Error::wrap)?;
        let pool = Arc::new(Self { threads, taken: Mutex::new(false), free: Condvar::new() });
        pools.insert(count, pool.clone());
        Ok(Some(pool))
    }

    /// Waits for the turn. A rayon thread does not wait, and gets `None` instead: it may be running this step in the
    /// middle of other work that holds locks, for which the optimizer whose turn it is waits.
    pub fn turn(&self) -> Option<Turn<'_>> {
        let mut taken = lock(&self.taken);
        while *taken {
            if rayon::current_thread_index().is_some() {
                return None;
            }
            taken = self.free.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken = true;
        Some(Turn(self))
    }
}

impl Turn<'_> {
    /// Runs `work` on the threads. The turn ends with the work, not with the caller's wait for it: a caller in
    /// another pool may take up other, long work while it waits.
    pub fn run<R: Send>(self, work: impl FnOnce(usize) -> R + Send) -> R {
        let threads = &self.0.threads;
        threads.install(move || {
            let _turn = self;
            work(threads.current_num_threads())
        })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.taken) = false;
        self.0.free.notify_one();
    }
}

/// Nothing panics while it holds one of these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
