//! Ranks that are processes started by `mpirun`.

use std::panic;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Result, bail};
use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

use super::Collective;

/// The ranks of a job that `mpirun` has started, one in each process, on one machine or on several: feature `mpi`.
///
/// ```no_run
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use candle_srkl::{Mpi, ParamsSrkl, Srkl};
///
/// let w = Var::new(1f32, &Device::Cpu)?;
/// let mut opt = Srkl::builder()
///     .default_group(ParamsSrkl::sgd(0.1))
///     .collective(Mpi::new()?)
///     .build([("w".to_string(), w.clone())])?;
/// opt.backward_step(&w.sqr()?)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// ```sh
/// mpirun -n 4 target/release/train
/// ```
///
/// Gradients on a device go by way of the host's memory.
///
/// A rank that panics ends the job, with its message ([`Mpi::new`] sets a panic hook for that). One that returns, so that its
/// optimizer is dropped, makes the next step of the others fail. One that is killed ends the job by `mpirun`'s own means.
pub struct Mpi {
    /// Whether ranks can no longer meet, so that leaving is not told to them.
    failed: bool,
    /// Its drop finalizes MPI.
    _universe: Universe,
}

/// All ranks of the job. (Not kept: it may not go to another thread, which nothing but its type says.)
fn world() -> SimpleCommunicator {
    SimpleCommunicator::world()
}

/// Whether this process is a rank: MPI is initialized, and not yet finalized.
static ACTIVE: AtomicBool = AtomicBool::new(false);

/// The length that a rank tells which leaves.
const LEAVES: u64 = u64::MAX;

impl Mpi {
    /// Initializes MPI in this process, for as long as what it returns lives. It can be done once, for one optimizer: one
    /// that could not be built, or that is dropped, has used it up.
    ///
    /// # Errors
    ///
    /// MPI that has been initialized already, or that allows calls by the main thread alone.
    pub fn new() -> Result<Self> {
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized)
        else {
            bail!("`Mpi::new`: MPI is initialized already; a process can be one rank, once")
        };
        if threading < Threading::Serialized {
            bail!("`Mpi::new`: expected MPI that may be called from any thread, got {threading:?}")
        }
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                before(info);
                // Unwinding would finalize MPI, for which all others would wait.
                if ACTIVE.load(Ordering::Relaxed) {
                    world().abort(1);
                }
            }));
        });
        ACTIVE.store(true, Ordering::Relaxed);
        Ok(Self { failed: false, _universe: universe })
    }

    /// The lengths that all ranks tell.
    fn lengths(&mut self, own: u64) -> Vec<u64> {
        let mut lengths = vec![0; self.world_size()];
        world().all_gather_into(&own, &mut lengths[..]);
        lengths
    }

    /// An error if a rank has left: a call would wait for it.
    fn refuse_failed(&self) -> Result<()> {
        if self.failed {
            bail!("another rank has left before")
        }
        Ok(())
    }

    /// Lengths and places of parts, as MPI counts them.
    fn counts(&self, parts: &[usize]) -> Result<(Vec<i32>, Vec<i32>)> {
        let total: usize = parts.iter().sum();
        if parts.len() != self.world_size() || i32::try_from(total).is_err() {
            bail!(
                "expected {} parts of less than 2 GiB in all (see `bucket_bytes`), got {} of {total} bytes",
                self.world_size(),
                parts.len()
            )
        }
        let mut start = 0;
        let places = parts.iter().map(|part| {
            start += *part as i32;
            start - *part as i32
        });
        Ok((parts.iter().map(|part| *part as i32).collect(), places.collect()))
    }
}

/// An empty slice may point to what MPI takes for a sign (Open MPI's `MPI_IN_PLACE` is 1): where there are no bytes another
/// place is given.
impl Collective for Mpi {
    fn rank(&self) -> usize {
        world().rank() as usize
    }

    fn world_size(&self) -> usize {
        world().size() as usize
    }

    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        self.refuse_failed()?;
        let (sent, places) = self.counts(parts)?;
        let own = vec![parts[self.rank()]; self.world_size()];
        let (received, origins) = self.counts(&own)?;
        let (empty, mut room) = ([0], [0]);
        let from = Partition::new(if from.is_empty() { &empty[..0] } else { from }, sent, places);
        let to = if to.is_empty() { &mut room[..0] } else { to };
        let mut to = PartitionMut::new(to, received, origins);
        world().all_to_all_varcount_into(&from, &mut to);
        Ok(())
    }

    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        self.refuse_failed()?;
        let (counts, places) = self.counts(parts)?;
        let own = whole[super::part(parts, self.rank())].to_vec();
        let (empty, mut room) = ([0], [0]);
        let own = if own.is_empty() { &empty[..0] } else { &own[..] };
        let whole = if whole.is_empty() { &mut room[..0] } else { whole };
        world().all_gather_varcount_into(own, &mut PartitionMut::new(whole, counts, places));
        Ok(())
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.refuse_failed()?;
        let lengths = self.lengths(own.len() as u64);
        if let Some(rank) = lengths.iter().position(|length| *length == LEAVES) {
            self.failed = true;
            bail!("rank {rank} has left")
        }
        let parts: Vec<usize> = lengths.iter().map(|length| *length as usize).collect();
        let mut whole = vec![0; parts.iter().sum()];
        whole[super::part(&parts, self.rank())].copy_from_slice(own);
        self.all_gather(&mut whole, &parts)?;
        Ok((0..parts.len()).map(|rank| whole[super::part(&parts, rank)].to_vec()).collect())
    }

    fn abort(&mut self, why: &str) {
        eprintln!("rank {} ends the job: {why}", self.rank());
        world().abort(1);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        ACTIVE.store(false, Ordering::Relaxed);
        // Else the others would wait for this rank in their next step, and this one for them to finalize.
        if !self.failed {
            self.lengths(LEAVES);
        }
    }
}
