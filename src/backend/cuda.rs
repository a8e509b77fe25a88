//! The stages on a CUDA device: packs tables, launches the kernels of `kernels/srkl.cu`, and owns
//! every `unsafe` of this.
//!
//! The kernels' launch contract stands at the top of that file. What a step needs lives on the device:
//! the table of blocks, the list of work, settings, counters. A step compares the addresses of gradients
//! with those that the device has, copies them if they differ, and launches.
//!
//! # CUDA graphs
//!
//! In a capture nothing may be copied from memory that changes later. So the addresses of gradients go
//! through a page-locked buffer that is written once and kept, into a table that only captured steps
//! use, and the settings must be on the device already: those who set them launch a kernel that does it.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUstreamCaptureStatus};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PinnedHostSlice, PushKernelArg, ValidAsZeroBits, result,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Device, Layout, Result, Storage, Tensor, Var, bail};

use super::cpu::{Decision, PROBES, StepScalars};
use super::{Counters, Inputs};
use crate::block::{Block, Buffer, Last, storage_address};
use crate::cuda::abi;
use crate::numerics::{CHUNK, LANES, Sums};
use crate::optimizer::{Group, steps_whole, uses_norm, uses_total};
use crate::params::{NonFinite, ParamsSrkl, Scope};

/// Machine code and PTX of `kernels/srkl.cu`, from `build.rs`.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/srkl.fatbin"));

/// Blocks of threads for each multiprocessor, where a step is decided as a whole: as many as there is room for.
const BLOCKS_PER_SM: u32 = abi::SRKL_BLOCKS_PER_SM;

/// The same where each block is updated soon after its statistics. What lies between a chunk's two turns should
/// fit in L2: gradient and parameter of a chunk for each block of threads, and of the rest of the chunk's block.
const BLOCKS_PER_SM_IN_L2: u32 = 2;

// The kernels' copies of our constants.
const _: () = assert!(abi::SRKL_CHUNK as usize == CHUNK);
const _: () = assert!(abi::SRKL_LANES as usize == LANES);
const _: () = assert!(abi::SRKL_PROBES as usize == PROBES);

macro_rules! device_repr {
    ($($t:ty),*) => {$(
        // SAFETY: bindgen made it from the struct that the kernels use, `repr(C)`, of plain numbers.
        unsafe impl DeviceRepr for $t {}
        // SAFETY: all of its fields are numbers.
        unsafe impl ValidAsZeroBits for $t {}
    )*};
}
device_repr!(
    abi::SrklBlock,
    abi::SrklGradient,
    abi::SrklGroup,
    abi::SrklScalars,
    abi::SrklChunk,
    abi::SrklSums,
    abi::SrklStatistics,
    abi::SrklDecision,
    abi::SrklState,
    abi::SrklTable
);

/// Those blocks of an optimizer that are on one device.
pub(crate) struct Cuda {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Their places in the optimizer's list.
    places: Vec<usize>,
    step: CudaFunction,
    set: CudaFunction,
    multiprocessors: u32,
    /// What the device has: the blocks, the gradients and settings that were sent last.
    blocks: Vec<abi::SrklBlock>,
    gradients: Vec<abi::SrklGradient>,
    settings: Settings,
    memory: Memory,
    table: abi::SrklTable,
    captures: Captures,
}

/// What the settings of an optimizer come to for its kernels.
#[derive(Clone, PartialEq)]
struct Settings {
    groups: Vec<abi::SrklGroup>,
    scalars: abi::SrklScalars,
}

/// What the table points to.
struct Memory {
    blocks: CudaSlice<abi::SrklBlock>,
    gradients: CudaSlice<abi::SrklGradient>,
    groups: CudaSlice<abi::SrklGroup>,
    scalars: CudaSlice<abi::SrklScalars>,
    chunks: CudaSlice<abi::SrklChunk>,
    chunk_sums: CudaSlice<abi::SrklSums>,
    chunks_done: CudaSlice<u32>,
    ready: CudaSlice<u32>,
    statistics: CudaSlice<abi::SrklStatistics>,
    decisions: CudaSlice<abi::SrklDecision>,
    skipped: CudaSlice<u64>,
    state: CudaSlice<abi::SrklState>,
}

/// What captured steps use.
struct Captures {
    /// Their table of gradients, which each replay fills anew.
    gradients: CudaSlice<abi::SrklGradient>,
    /// For the next capture; a step outside of one replaces it.
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

const NO_GRADIENT: abi::SrklGradient = abi::SrklGradient { address: 0, dtype: 0 };

const SETTINGS_IN_CAPTURE: &str = "the optimizer's settings have changed inside a capture, where a \
    replay would set them back each time: set the learning rate, gradient scale and parameters of groups \
    before it begins, or after it has ended";

/// The CUDA devices that blocks are on.
pub(crate) fn devices_of(blocks: &[Block], groups: &[Group]) -> Result<Vec<Cuda>> {
    let mut devices: Vec<&CudaDevice> = vec![];
    let plain = |group: &Group| {
        let ParamsSrkl { direction, curvature, trust, average, .. } = group.params;
        let reference = ParamsSrkl::reference();
        (direction, curvature) == (reference.direction, reference.curvature)
            && (trust, average) == (None, None)
    };
    if blocks.iter().any(|block| !block.on_cpu && !plain(&groups[block.group])) {
        bail!("on a CUDA device there are the reference's direction and curvature alone, so far")
    }
    for block in blocks {
        if let Device::Cuda(device) = block.var.device()
            && !devices.iter().any(|known| block.is_on(known))
        {
            devices.push(device);
        }
    }
    devices.into_iter().map(|device| Cuda::new(device, blocks, groups)).collect()
}

impl Cuda {
    /// Prepares the steps of those of `blocks` that are on `device`.
    fn new(device: &CudaDevice, blocks: &[Block], groups: &[Group]) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
        let attribute = |attribute| context.attribute(attribute).w();
        let multiprocessors =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let l2 = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;

        let (mut places, mut entries, mut chunks) = (vec![], vec![], vec![]);
        for (place, block) in blocks.iter().enumerate() {
            if !block.is_on(device) {
                continue;
            }
            let chunk_count = block.n.div_ceil(CHUNK) as u64;
            // Of the gradient, which L2 must hold beside the parameter and what comes next.
            let bytes = block.n * block.dtype.size_in_bytes();
            let master = match &block.state.master {
                Some(Buffer::CudaF32(master)) => master.device_ptr(&stream).0,
                _ => 0,
            };
            let (storage, layout) = block.var.storage_and_layout();
            entries.push(abi::SrklBlock {
                w: address_of(&storage, layout, &stream)?,
                master,
                n: block.n as u64,
                first_chunk: chunks.len() as u64,
                chunk_count,
                dtype: dtype(block.dtype)?,
                group: block.group as u32,
                from_end: (bytes > l2 / 4) as u32,
                pad: 0,
            });
            let start = |chunk| chunk * CHUNK as u64;
            let number = places.len() as u64;
            chunks.extend(
                (0..chunk_count).map(|chunk| abi::SrklChunk { start: start(chunk), block: number }),
            );
            places.push(place);
        }
        let count = entries.len();
        let settings = Settings::new(groups, StepScalars { schedule: 1., grad_scale: 1. });
        let memory = Memory {
            blocks: device.clone_htod(&entries)?,
            gradients: device.clone_htod(&vec![NO_GRADIENT; count])?,
            groups: device.clone_htod(&settings.groups)?,
            scalars: device.clone_htod(&[settings.scalars])?,
            chunk_sums: device.alloc_zeros(chunks.len())?,
            chunks: device.clone_htod(&chunks)?,
            chunks_done: device.alloc_zeros(count)?,
            ready: device.alloc_zeros(count)?,
            statistics: device.alloc_zeros(count)?,
            decisions: device.alloc_zeros(count)?,
            skipped: device.alloc_zeros(count)?,
            state: device.alloc_zeros(1)?,
        };
        let captures = Captures {
            gradients: device.clone_htod(&vec![NO_GRADIENT; count])?,
            spare: Some(Pinned::new(&stream, count)?),
            recorded: vec![],
        };
        let live_count = entries.iter().filter(|entry| entry.chunk_count > 0).count();
        // Whatever thread steps, and so whatever its stream is, finds all of this there.
        stream.synchronize().w()?;
        Ok(Self {
            device: device.clone(),
            places,
            step: module.load_function("srkl_step").w()?,
            set: module.load_function("srkl_set").w()?,
            multiprocessors,
            blocks: entries,
            gradients: vec![NO_GRADIENT; count],
            settings,
            table: memory.table(&stream, live_count),
            memory,
            captures,
            stream,
        })
    }

    /// One step, decided on the device: one launch, no synchronisation, nothing copied to the host.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient, or with a capture; nothing is launched then.
    pub fn step(&mut self, inputs: &Inputs) -> Result<()> {
        let (gradients, alive) = self.find(inputs)?;
        let settings = Settings::new(inputs.groups, inputs.scalars);
        let all = abi::SRKL_STATISTICS | abi::SRKL_DECIDE | abi::SRKL_UPDATE;
        let mut table = self.for_stages(all);
        if self.is_capturing()? {
            if settings != self.settings {
                bail!("{SETTINGS_IN_CAPTURE}")
            }
            table.gradients = self.send_captured(&gradients)?;
        } else {
            self.send(settings)?;
            self.send_gradients(gradients)?;
        }
        // The gradients must live until the kernel is launched; then the stream's order protects them.
        let launched = self.launch(&table);
        drop(alive);
        launched
    }

    /// Stage 1 alone: launches the statistics, for a step that the host decides. Returns what it
    /// reads, to be kept until [`Cuda::update`] has returned.
    ///
    /// # Errors
    ///
    /// As [`Cuda::step`]; and such a step cannot be captured.
    pub fn statistics(&mut self, inputs: &Inputs) -> Result<Vec<Tensor>> {
        if self.is_capturing()? {
            bail!(
                "a step of parameters on several devices is decided on the host, which waits for them; \
                 it can't be captured in a CUDA graph"
            )
        }
        let (gradients, alive) = self.find(inputs)?;
        self.send(Settings::new(inputs.groups, inputs.scalars))?;
        self.send_gradients(gradients)?;
        self.launch(&self.for_stages(abi::SRKL_STATISTICS))?;
        Ok(alive)
    }

    /// What [`Cuda::statistics`] found: the places of blocks that have a gradient, with their sums. Waits
    /// for the device.
    pub fn found(&self) -> Result<Vec<(usize, Sums)>> {
        let found = self.device.clone_dtoh(&self.memory.statistics)?;
        let with_place = self.places.iter().zip(&self.gradients).zip(found);
        let present = with_place.filter(|((_, gradient), _)| gradient.address != 0);
        let sums =
            |s: abi::SrklSums| Sums { sum2: s.sum2, sum4: s.sum4, exponent: s.exponent as i32 };
        Ok(present.map(|((&place, _), found)| (place, sums(found.sums))).collect())
    }

    /// Sends decisions of the host, about all blocks of the optimizer.
    pub fn send_decisions(&mut self, decisions: &[Option<Decision>]) -> Result<()> {
        let decision = |&place: &usize| match &decisions[place] {
            Some(Decision { c, curvature, phi, .. }) => {
                abi::SrklDecision { c: *c, curvature: *curvature, phi: *phi, step: 1 }
            }
            None => abi::SrklDecision::default(),
        };
        let decisions: Vec<_> = self.places.iter().map(decision).collect();
        self.upload(&decisions, |memory| &mut memory.decisions)
    }

    /// Stage 3 alone, by the decisions that were sent. The gradients are those of the last
    /// [`Cuda::statistics`], and still alive.
    pub fn update(&mut self) -> Result<()> {
        self.launch(&self.for_stages(abi::SRKL_UPDATE))
    }

    /// Sends settings ahead of the next step, so that a replay of a captured one finds them.
    ///
    /// # Errors
    ///
    /// In a capture, where a replay would set them back each time.
    pub fn set(&mut self, groups: &[Group], scalars: StepScalars) -> Result<()> {
        let settings = Settings::new(groups, scalars);
        if settings != self.settings && self.is_capturing()? {
            bail!("{SETTINGS_IN_CAPTURE}")
        }
        self.send(settings)
    }

    /// What the device has counted. Waits for it, as all that reads from it.
    pub fn counters(&self) -> Result<Counters> {
        let state = self.state()?;
        Ok(Counters {
            steps: state.steps,
            skipped_steps: state.skipped_steps,
            grad_norm: (state.has_norm != 0).then_some(state.grad_norm),
        })
    }

    /// For each block what the last step did, and how often it was skipped.
    pub fn outcomes(&self) -> Result<Vec<(Last, u64)>> {
        let skipped_step = self.state()?.skipped != 0;
        let decisions = self.device.clone_dtoh(&self.memory.decisions)?;
        let skipped = self.device.clone_dtoh(&self.memory.skipped)?;
        let last =
            |d: abi::SrklDecision| (d.step != 0 && !skipped_step).then_some((d.curvature, d.phi));
        Ok(decisions.into_iter().map(last).zip(skipped).collect())
    }

    fn state(&self) -> Result<abi::SrklState> {
        if self.is_capturing()? {
            bail!(
                "counters and telemetry can't be read while the device's stream is being captured"
            )
        }
        Ok(self.device.clone_dtoh(&self.memory.state)?[0])
    }

    /// Sets the counters, as a checkpoint has them, and forgets the last step.
    pub fn set_counters(&mut self, steps: u64, skipped_steps: u64, skipped: &[u64]) -> Result<()> {
        let state = abi::SrklState { steps, skipped_steps, ..Default::default() };
        let none = vec![abi::SrklDecision::default(); self.places.len()];
        self.upload(&none, |memory| &mut memory.decisions)?;
        self.upload(skipped, |memory| &mut memory.skipped)?;
        self.upload(&[state], |memory| &mut memory.state)
    }

    /// Whether it has as many blocks as this.
    pub fn has_all(&self, block_count: usize) -> bool {
        self.places.len() == block_count
    }

    // -- What a step is made of --

    /// Finds and checks the gradient of every block. The tensors that come along are what is read: the
    /// gradients, or contiguous copies of them.
    fn find(&self, inputs: &Inputs) -> Result<(Vec<abi::SrklGradient>, Vec<Tensor>)> {
        let mut alive = Vec::with_capacity(self.places.len());
        let mut gradients = Vec::with_capacity(self.places.len());
        for (&place, entry) in self.places.iter().zip(&self.blocks) {
            let block = &inputs.blocks[place];
            let (storage, layout) = block.var.storage_and_layout();
            if address_of(&storage, layout, &self.stream)? != entry.w {
                bail!(
                    "`{}`: its memory is not where it was when the optimizer was built: something has \
                     replaced it instead of writing to it; build a new optimizer",
                    block.name
                )
            }
            drop(storage);
            let Some(gradient) = inputs.grads.get_id(block.id) else {
                gradients.push(NO_GRADIENT);
                continue;
            };
            block.check_gradient(gradient)?;
            block
                .check_alias(storage_address(&gradient.storage_and_layout().0), inputs.storages)?;
            let gradient = gradient.contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let address = address_of(&storage, layout, &self.stream)?;
            drop(storage);
            let address = if block.n == 0 { 0 } else { address };
            gradients.push(abi::SrklGradient { address, dtype: dtype(gradient.dtype())? as u64 });
            alive.push(gradient);
        }
        Ok((gradients, alive))
    }

    fn send_gradients(&mut self, gradients: Vec<abi::SrklGradient>) -> Result<()> {
        if gradients != self.gradients {
            self.upload(&gradients, |memory| &mut memory.gradients)?;
            self.gradients = gradients;
        }
        if self.captures.spare.is_none() {
            self.captures.spare = Some(Pinned::new(&self.stream, self.places.len())?);
        }
        Ok(())
    }

    /// Records a copy of `gradients`, and returns the address that they are copied to.
    fn send_captured(&mut self, gradients: &[abi::SrklGradient]) -> Result<u64> {
        let Some(pinned) = self.captures.spare.take() else {
            bail!(
                "two steps of one optimizer captured without one outside of a capture between them"
            )
        };
        let (to, _guard) = self.captures.gradients.device_ptr_mut(&self.stream);
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
        self.captures.recorded.push(pinned);
        Ok(to)
    }

    /// Sends what differs from the settings that the device has.
    fn send(&mut self, settings: Settings) -> Result<()> {
        if settings.groups != self.settings.groups {
            self.upload(&settings.groups, |memory| &mut memory.groups)?;
            self.settings.groups = settings.groups;
        }
        if settings.scalars != self.settings.scalars {
            let config =
                LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
            let mut launch = self.stream.launch_builder(&self.set);
            launch.arg(&self.table).arg(&settings.scalars);
            // SAFETY: its two arguments are the table and the scalars by value, and it writes to the place
            // for scalars, which `memory` keeps, in the order of the stream.
            unsafe { launch.launch(config) }.w()?;
            self.settings.scalars = settings.scalars;
        }
        Ok(())
    }

    /// By cudarc alone: candle's own copy keeps what it has copied while its cache for graphs is on.
    fn upload<T: DeviceRepr>(
        &mut self,
        values: &[T],
        to: impl FnOnce(&mut Memory) -> &mut CudaSlice<T>,
    ) -> Result<()> {
        self.stream.memcpy_htod(values, to(&mut self.memory)).w()
    }

    fn for_stages(&self, stages: u32) -> abi::SrklTable {
        abi::SrklTable { stages: stages as u64, ..self.table }
    }

    fn launch(&self, table: &abi::SrklTable) -> Result<()> {
        let whole = self.settings.scalars.whole != 0;
        let most = self.multiprocessors * if whole { BLOCKS_PER_SM } else { BLOCKS_PER_SM_IN_L2 };
        let config = LaunchConfig {
            grid_dim: (table.chunk_count.clamp(1, most as u64) as u32, 1, 1),
            block_dim: (abi::SRKL_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the contract at the top of kernels/srkl.cu:
        // 1. grid and block are as it says, and the only argument is the table by value;
        // 2. `new` has allocated what the table points to, in the sizes that abi.h gives, with zeros where
        //    the contract asks for them, and `memory` keeps it;
        // 3. the addresses in `gradients` are of contiguous tensors on this device of the parameter's size
        //    (`find`), which its callers keep, and none is of a parameter (`check_alias`);
        // 4. those in `blocks` are what candle has for the variables, as `find` has seen in this step, and
        //    of the masters that `Block` keeps; both are memory of their own, which CUDA aligns to 256
        //    bytes, at offset 0 (`Block::new`);
        // 5. all launches go to the stream that candle's own work on these tensors goes to, and one follows
        //    the other there, as long as one thread steps: `Srkl` says so.
        unsafe { self.stream.launch_builder(&self.step).arg(table).launch(config) }.w()?;
        Ok(())
    }

    fn is_capturing(&self) -> Result<bool> {
        let status = self.stream.capture_status().w()?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if !self.captures.recorded.is_empty() {
            // A replay may still be reading them. If this fails the device has failed.
            let _ = self.stream.synchronize();
        }
    }
}

impl Memory {
    fn table(&self, stream: &CudaStream, live_count: usize) -> abi::SrklTable {
        abi::SrklTable {
            blocks: self.blocks.device_ptr(stream).0,
            gradients: self.gradients.device_ptr(stream).0,
            groups: self.groups.device_ptr(stream).0,
            scalars: self.scalars.device_ptr(stream).0,
            chunks: self.chunks.device_ptr(stream).0,
            chunk_sums: self.chunk_sums.device_ptr(stream).0,
            chunks_done: self.chunks_done.device_ptr(stream).0,
            ready: self.ready.device_ptr(stream).0,
            statistics: self.statistics.device_ptr(stream).0,
            decisions: self.decisions.device_ptr(stream).0,
            skipped: self.skipped.device_ptr(stream).0,
            state: self.state.device_ptr(stream).0,
            block_count: self.blocks.len() as u64,
            live_count: live_count as u64,
            chunk_count: self.chunks.len() as u64,
            stages: 0,
        }
    }
}

impl Pinned {
    fn new(stream: &CudaStream, len: usize) -> Result<Self> {
        // SAFETY: `Cuda::send_captured` writes all of it before it is read.
        let mut memory = unsafe { stream.context().alloc_pinned(len) }.w()?;
        Ok(Self { address: memory.as_mut_ptr().w()?, _memory: memory })
    }
}

impl Settings {
    fn new(groups: &[Group], scalars: StepScalars) -> Self {
        let any = |holds: fn(&ParamsSrkl) -> bool| groups.iter().any(|group| holds(&group.params));
        let (norm, total, whole) = (any(uses_norm), any(uses_total), any(steps_whole));
        let scalars = abi::SrklScalars {
            schedule: scalars.schedule,
            grad_scale: scalars.grad_scale,
            norm: norm as u32,
            total: total as u32,
            whole: whole as u32,
            pad: 0,
        };
        Self { groups: groups.iter().map(group).collect(), scalars }
    }
}

fn group(group: &Group) -> abi::SrklGroup {
    let ParamsSrkl { lr, weight_decay, max_grad_norm, scope, nonfinite, .. } = group.params;
    abi::SrklGroup {
        lr,
        beta: group.params.beta_value(),
        weight_decay,
        max_grad_norm: max_grad_norm.unwrap_or(0.),
        scope: match scope {
            Scope::Tensor => abi::SRKL_TENSOR,
            Scope::Global => abi::SRKL_GLOBAL,
            Scope::Element | Scope::Mixed(_) => abi::SRKL_ELEMENT,
        },
        nonfinite: match nonfinite {
            NonFinite::SkipStep => abi::SRKL_SKIP_STEP,
            NonFinite::SkipBlock => abi::SRKL_SKIP_BLOCK,
            NonFinite::Propagate => abi::SRKL_PROPAGATE,
        },
    }
}

fn dtype(dtype: DType) -> Result<u32> {
    Ok(match dtype {
        DType::F32 => abi::SRKL_F32,
        DType::F64 => abi::SRKL_F64,
        DType::BF16 => abi::SRKL_BF16,
        DType::F16 => abi::SRKL_F16,
        dtype => bail!("expected f32, f64, bf16 or f16, got {dtype:?}"),
    })
}

/// The device address of a tensor's first element.
fn address_of(storage: &Storage, layout: &Layout, stream: &CudaStream) -> Result<u64> {
    let Storage::Cuda(storage) = storage else { bail!("expected a tensor on a CUDA device") };
    let (address, size) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::F64(slice) => (slice.device_ptr(stream).0, 8),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(stream).0, 2),
        _ => bail!("expected f32, f64, bf16 or f16"),
    };
    Ok(address + (layout.start_offset() * size) as u64)
}

/// The values of a variable of 16 bits, as f32 on its device.
pub(crate) fn new_master(var: &Var) -> Result<CudaSlice<f32>> {
    let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    upload_master(var, &values)
}

pub(crate) fn upload_master(var: &Var, values: &[f32]) -> Result<CudaSlice<f32>> {
    var.device().as_cuda_device()?.clone_htod(if values.is_empty() { &[0.][..] } else { values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::backprop::GradStore;
    use candle_core::{Device, Var};
    use candle_nn::Optimizer;

    use crate::{MasterWeights, ParamsSrkl, Srkl};

    /// A chunk that starts past the 2^31st and the 2^32nd element, of a tensor of which no more than that chunk
    /// exists: its table says that everything lies so much further ahead. Needs a CUDA device.
    #[test]
    fn elements_past_32_bits_are_stepped() -> Result<()> {
        let device = Device::new_cuda(0)?;
        for dtype in [DType::F32, DType::BF16] {
            for start in [1u64 << 31, 1 << 32, (1 << 32) + (1 << 31)] {
                let values: Vec<f32> = (0..5001).map(|i| (i as f32 * 0.37).sin()).collect();
                let tensor = |x: &[f32]| Tensor::new(x, &device)?.to_dtype(dtype);
                let step = |start: u64| -> Result<Vec<f32>> {
                    let var = Var::from_tensor(&tensor(&values)?)?;
                    let g = tensor(&values)?.affine(0.5, 0.1)?;
                    // No masters: a step looks at some of all elements of theirs.
                    let master_weights = MasterWeights::None;
                    let params = ParamsSrkl { lr: 0.1, master_weights, ..ParamsSrkl::reference() };
                    let mut opt = Srkl::new(vec![var.clone()], params)?;
                    let mut grads = GradStore::default();
                    grads.insert(&var, g);
                    opt.step(&grads)?;
                    opt.cuda[0].shift(start)?;
                    let inputs = Inputs {
                        blocks: &opt.blocks,
                        storages: &[],
                        groups: &opt.groups,
                        grads: &grads,
                        scalars: StepScalars { schedule: 1., grad_scale: 1. },
                    };
                    opt.cuda[0].launch_shifted(&inputs, start)?;
                    var.to_dtype(DType::F32)?.to_vec1()
                };
                assert_eq!(step(0)?, step(start)?, "{dtype:?} {start}");
            }
        }
        Ok(())
    }

    impl Cuda {
        /// Moves the only block's beginning `by` elements back, and its only chunk as many ahead.
        fn shift(&mut self, by: u64) -> Result<()> {
            let block = &self.blocks[0];
            let size = if block.dtype == abi::SRKL_F32 { 4 } else { 2 };
            let w = block.w.wrapping_sub(size * by);
            let moved = abi::SrklBlock { w, n: block.n + by, ..*block };
            self.device.memcpy_htod(&[moved], &mut self.memory.blocks)?;
            let chunk = abi::SrklChunk { start: by, block: 0 };
            self.device.memcpy_htod(&[chunk], &mut self.memory.chunks)
        }

        /// A step whose gradient is shifted likewise.
        fn launch_shifted(&mut self, inputs: &Inputs, by: u64) -> Result<()> {
            let (mut gradients, _alive) = self.find(inputs)?;
            let size = inputs.blocks[0].dtype.size_in_bytes() as u64;
            gradients[0].address = gradients[0].address.wrapping_sub(size * by);
            self.send(Settings::new(inputs.groups, inputs.scalars))?;
            self.send_gradients(gradients)?;
            let all = abi::SRKL_STATISTICS | abi::SRKL_DECIDE | abi::SRKL_UPDATE;
            self.launch(&self.for_stages(all))
        }
    }
}
