//! Ranks that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use candle_core::{Result, bail};

use super::{Collective, part};

/// The ranks of one process, each in a thread of its own.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use candle_srkl::{ParamsSrkl, Srkl, Threads};
///
/// let train = |rank: Threads| -> candle_core::Result<f32> {
///     let half = (candle_srkl::Collective::rank(&rank) + 1) as f64;
///     let w = Var::new(1f32, &Device::Cpu)?;
///     let mut opt = Srkl::builder()
///         .default_group(ParamsSrkl::sgd(0.1))
///         .collective(rank)
///         .build([("w".to_string(), w.clone())])?;
///     // Gradients of 1 and 2, whose mean is 1.5.
///     opt.backward_step(&(w.as_tensor() * half)?)?;
///     w.to_scalar()
/// };
/// let after: Vec<f32> = std::thread::scope(|scope| {
///     let ranks = Threads::new(2).into_iter().map(|rank| scope.spawn(move || train(rank)));
///     ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect::<Result<_, _>>()
/// })?;
/// assert_eq!(after, [0.85, 0.85]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// A rank that is dropped, for instance since its thread panics, makes the calls of the others fail.
///
/// Each rank needs a thread: one after the other in one thread the first would wait for the second for ever. And each needs a
/// model of its own: a clone of a `VarMap` is the same variables.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    room: Arc<Room>,
}

/// Where ranks meet.
#[derive(Debug)]
struct Room {
    world_size: usize,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Meeting {
    /// The number of meetings that are over.
    number: u64,
    /// What those who have come to the current one have brought.
    brought: Vec<Option<(String, Vec<u8>)>>,
    /// What was brought to the last one.
    last: Arc<Vec<Vec<u8>>>,
    /// Why there are no more.
    failed: Option<String>,
}

impl Threads {
    /// The ranks of a training by `world_size` threads, to be distributed to these.
    #[must_use]
    pub fn new(world_size: usize) -> Vec<Self> {
        let brought = (0..world_size).map(|_| None).collect();
        let meeting = Mutex::new(Meeting { brought, ..Meeting::default() });
        let room = Arc::new(Room { world_size, meeting, changed: Condvar::new() });
        (0..world_size).map(|rank| Self { rank, room: room.clone() }).collect()
    }

    /// Waits for all ranks. Returns what each has brought, if they all make the same `call`.
    fn meet(&self, call: String, bytes: &[u8]) -> Result<Arc<Vec<Vec<u8>>>> {
        let Room { meeting, changed, .. } = &*self.room;
        let mut meeting = locked(meeting);
        let number = meeting.number;
        meeting.brought[self.rank] = Some((call, bytes.to_vec()));
        if meeting.failed.is_none() && meeting.brought.iter().all(Option::is_some) {
            let brought: Vec<_> = meeting.brought.iter_mut().filter_map(Option::take).collect();
            match brought.iter().position(|(call, _)| *call != brought[0].0) {
                Some(rank) => {
                    let calls = [&brought[0].0, &brought[rank].0];
                    let why = format!("rank 0 calls {}, rank {rank} calls {}", calls[0], calls[1]);
                    meeting.failed = Some(why);
                }
                None => {
                    meeting.last = Arc::new(brought.into_iter().map(|(_, bytes)| bytes).collect());
                    meeting.number += 1;
                }
            }
            changed.notify_all();
        }
        while meeting.failed.is_none() && meeting.number == number {
            meeting = changed.wait(meeting).unwrap_or_else(PoisonError::into_inner);
        }
        match &meeting.failed {
            // Whoever leaves after a meeting does not undo it.
            _ if meeting.number > number => Ok(meeting.last.clone()),
            Some(why) => bail!("{why}"),
            None => bail!("the ranks have not met"),
        }
    }

    fn fail(&self, why: String) {
        locked(&self.room.meeting).failed.get_or_insert(why);
        self.room.changed.notify_all();
    }
}

/// Nothing panics while it holds the lock.
fn locked(meeting: &Mutex<Meeting>) -> MutexGuard<'_, Meeting> {
    meeting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.room.world_size
    }

    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        let own = part(parts, self.rank);
        let sent = self.meet(format!("all_to_all of {parts:?}"), from)?;
        if !own.is_empty() {
            let received = to.chunks_mut(own.len()).zip(&*sent);
            received.for_each(|(to, from)| to.copy_from_slice(&from[own.clone()]));
        }
        Ok(())
    }

    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        let own = &whole[part(parts, self.rank)];
        let sent = self.meet(format!("all_gather of {parts:?}"), own)?;
        for (rank, from) in sent.iter().enumerate() {
            whole[part(parts, rank)].copy_from_slice(from);
        }
        Ok(())
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.meet("exchange".to_string(), own)?.to_vec())
    }

    fn abort(&mut self, why: &str) {
        self.fail(format!("rank {}: {why}", self.rank));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let why = if thread::panicking() { "has panicked" } else { "has left" };
        self.fail(format!("rank {} {why}", self.rank));
    }
}
