//! Captures of a device's stream in CUDA graphs.
//!
//! In a capture nothing may be copied from memory that changes later. So
//!
//! - the addresses of gradients are copied from a page-locked buffer, which is written once and kept, to a table that
//!   only captured steps use;
//! - the settings must be on the device before the capture: their setters send them at once.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Result, bail};
use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, PinnedHostSlice, result};

use super::abi;
use super::table::NO_GRADIENT;

pub(crate) const SETTINGS_IN_CAPTURE: &str = "the optimizer's settings have changed inside a capture, where a \
    replay would set them back each time: set the learning rate, gradient scale and parameters of groups \
    before it begins, or after it has ended";

/// The memory of captured steps.
pub(crate) struct Captures {
    stream: Arc<CudaStream>,
    /// Their table of gradients, which each replay fills again.
    gradients: CudaSlice<abi::SrklGradient>,
    /// For the next capture. A step outside of a capture allocates it again.
    spare: Option<Pinned>,
    /// What recorded copies read, for as long as somebody may replay them.
    recorded: Vec<Pinned>,
}

/// Page-locked memory of the host, for one table of gradients.
struct Pinned {
    address: *mut abi::SrklGradient,
    _memory: PinnedHostSlice<abi::SrklGradient>,
}

// SAFETY: `address` points to `_memory`, which is `Send`.
unsafe impl Send for Pinned {}
// SAFETY: nothing is written through a shared reference.
unsafe impl Sync for Pinned {}

const ANOTHER_CAPTURE: &str =
    "two steps of one optimizer captured without one outside of a capture between them";

impl Captures {
    /// Room for `count` blocks.
    pub fn new(device: &CudaDevice, stream: &Arc<CudaStream>, count: usize) -> Result<Self> {
        Ok(Self {
            stream: stream.clone(),
            gradients: device.clone_htod(&vec![NO_GRADIENT; count])?,
            spare: Some(Pinned::new(stream, count)?),
            recorded: vec![],
        })
    }

    /// Makes room for the next capture, outside of one.
    pub fn refill(&mut self) -> Result<()> {
        if self.spare.is_none() {
            self.spare = Some(Pinned::new(&self.stream, self.gradients.len())?);
        }
        Ok(())
    }

    /// Whether there has been a capture.
    pub fn any(&self) -> bool {
        !self.recorded.is_empty()
    }

    /// An error if there is no room for another capture.
    pub fn refuse_another(&self) -> Result<()> {
        if self.spare.is_none() {
            bail!("{ANOTHER_CAPTURE}")
        }
        Ok(())
    }

    /// Records a copy of `gradients`, and returns the address that they are copied to.
    pub fn record(&mut self, gradients: &[abi::SrklGradient]) -> Result<u64> {
        if gradients.len() != self.gradients.len() {
            bail!("expected {} gradients, got {}", self.gradients.len(), gradients.len())
        }
        let Some(pinned) = self.spare.take() else { bail!("{ANOTHER_CAPTURE}") };
        let (to, _guard) = self.gradients.device_ptr_mut(&self.stream);
        // SAFETY:
        // 1. `address` points to as many entries as there are blocks, as `gradients` has;
        // 2. nobody else reads or writes them now: the memory was in `spare`, which no copy has read from;
        // 3. it is initialised before it is read;
        // 4. the recorded copy, of the same length, may read it at any later time, and it stays as it is
        //    in `recorded` until this is dropped.
        unsafe {
            pinned.address.copy_from_nonoverlapping(gradients.as_ptr(), gradients.len());
            let source = std::slice::from_raw_parts(pinned.address, gradients.len());
            result::memcpy_htod_async(to, source, self.stream.cu_stream()).w()?;
        }
        self.recorded.push(pinned);
        Ok(to)
    }
}

impl Drop for Captures {
    fn drop(&mut self) {
        if !self.recorded.is_empty() {
            // A replay may still be reading it. If this fails the device has failed.
            let _ = self.stream.synchronize();
        }
    }
}

impl Pinned {
    fn new(stream: &CudaStream, len: usize) -> Result<Self> {
        // SAFETY: `Captures::record` writes all of it before it is read.
        let mut memory = unsafe { stream.context().alloc_pinned(len) }.w()?;
        Ok(Self { address: memory.as_mut_ptr().w()?, _memory: memory })
    }
}

pub(crate) fn is_capturing(stream: &CudaStream) -> Result<bool> {
    let status = stream.capture_status().w()?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}
