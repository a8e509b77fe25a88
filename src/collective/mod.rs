//! Ranks: copies of a training that step together, and how bytes go between them.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod tcp;
mod threads;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use tcp::Tcp;
pub use threads::Threads;

/// Moves bytes between the ranks of a training; the optimizer does all adding itself, so that its bits depend on no
/// transport.
///
/// Each rank has a value of this type, with its own number. All methods but [`rank`](Self::rank),
/// [`world_size`](Self::world_size), [`abort`](Self::abort) and [`on_device`](Self::on_device) are collective: every rank calls the same ones in the same
/// order, with the same `parts`, and none returns before it has what it asked for. [`Threads`] are the ranks of one process, [`Tcp`]
/// those of several, `Mpi` (feature `mpi`) those that `mpirun` has started, and `Nccl` (feature `nccl`) those that have a CUDA device
/// each. For other transports implement it.
///
/// # Errors
///
/// A method fails if another rank has left, has failed, or calls something else, where a transport can tell. The training
/// can't go on then.
pub trait Collective: Send {
    /// The number of this rank, below [`world_size`](Self::world_size).
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world_size(&self) -> usize;

    /// Sends each rank a part of `from`, and receives one from each.
    ///
    /// `parts` has the length in bytes of what each rank receives of each other one, and `from` has these parts one after
    /// the other. `to` is `world_size` times as long as this rank's part: what the ranks have sent, in their order.
    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()>;

    /// Completes `whole`, of which each rank has a part: they lie one after the other, and `parts` has their lengths in
    /// bytes.
    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()>;

    /// What every rank has given, in their order. Lengths may differ. For few bytes: numbers to agree on, and errors.
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Makes the calls of all ranks fail, now and from now on, where the transport can; `why` is what they should say.
    fn abort(&mut self, why: &str);

    /// Moves tensors from device to device, if the transport can. Not unless implemented.
    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        None
    }
}

/// Moves tensors between the devices of ranks, in the order of candle's stream: nobody waits for a device.
///
/// The methods are collective, as those of [`Collective`], and fail as these do. Tensors are contiguous and on
/// [`device`](Self::device); those that are received are written to in place.
pub trait OnDevice {
    /// This rank's own.
    fn device(&self) -> Device;

    /// Sends tensors to ranks, and receives others from ranks. Between two ranks they come in the order in which they are sent,
    /// of the same number of elements and dtype.
    fn send_and_receive(
        &mut self,
        send: &[(usize, Tensor)],
        receive: &[(usize, Tensor)],
    ) -> Result<()>;

    /// Sends tensors from the rank that has each to all others: the same list on all ranks.
    fn broadcast(&mut self, parts: &[(usize, Tensor)]) -> Result<()>;
}

impl<C: Collective + ?Sized> Collective for Box<C> {
    fn rank(&self) -> usize {
        (**self).rank()
    }
    fn world_size(&self) -> usize {
        (**self).world_size()
    }
    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        (**self).all_to_all(from, parts, to)
    }
    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        (**self).all_gather(whole, parts)
    }
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        (**self).exchange(own)
    }
    fn abort(&mut self, why: &str) {
        (**self).abort(why);
    }
    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        (**self).on_device()
    }
}

/// The bytes of a rank's part.
pub(crate) fn part(parts: &[usize], rank: usize) -> std::ops::Range<usize> {
    let start = parts[..rank].iter().sum();
    start..start + parts[rank]
}
