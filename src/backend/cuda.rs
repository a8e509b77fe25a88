//! The stages on a CUDA device: packs tables, launches the kernels of `kernels/srkl.cu`, and owns
//! every `unsafe` of this.
//!
//! The kernels' launch contract stands at the top of that file. Addresses of parameters and masters
//! never change, so their table is written once; per step the addresses of gradients, the settings
//! and the scalars are compared with what the device has and uploaded if they differ.

use std::mem::size_of;

use candle_core::backprop::GradStore;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, ValidAsZeroBits,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaStorage, WrapErr};
use candle_core::{CudaDevice, DType, Result, Storage, Tensor, Var, bail};
use half::{bf16, f16};

use super::cpu::{PROBES, StepScalars};
use crate::block::{Block, Master, storage_address};
use crate::cuda::abi;
use crate::numerics::{CHUNK, LANES};
use crate::optimizer::Group;
use crate::params::{NonFinite, ParamsSrkl, Scope};

/// Machine code and PTX of `kernels/srkl.cu`, from `build.rs`.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/srkl.fatbin"));

/// Threads in a block of both kernels: `THREADS` there.
const THREADS: u32 = 128;

/// Blocks of threads for each multiprocessor: enough to fill it.
const BLOCKS_PER_SM: u32 = 16;

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
    abi::SrklSums,
    abi::SrklDecision,
    abi::SrklState,
    abi::SrklTable
);

/// Memory on the device, with what the host last wrote to it.
struct Uploaded<T> {
    host: Vec<T>,
    device: CudaSlice<T>,
}

impl<T: DeviceRepr + Clone + PartialEq + 'static> Uploaded<T> {
    fn new(device: &CudaDevice, host: Vec<T>) -> Result<Self> {
        Ok(Self { device: device.clone_htod(&host)?, host })
    }

    /// Copies `host` if it differs.
    fn set(&mut self, device: &CudaDevice, host: Vec<T>) -> Result<()> {
        if self.host != host {
            device.memcpy_htod(&host, &mut self.device)?;
            self.host = host;
        }
        Ok(())
    }
}

/// All blocks of an optimizer, on one device.
pub(crate) struct Cuda {
    device: CudaDevice,
    statistics: CudaFunction,
    update: CudaFunction,
    grid: u32,
    gradients: Uploaded<abi::SrklGradient>,
    groups: Uploaded<abi::SrklGroup>,
    scalars: Uploaded<abi::SrklScalars>,
    decisions: CudaSlice<abi::SrklDecision>,
    state: CudaSlice<abi::SrklState>,
    _memory: Memory,
    table: abi::SrklTable,
}

/// The rest of what the table points to, to keep it alive.
struct Memory {
    _blocks: CudaSlice<abi::SrklBlock>,
    _chunk_block: CudaSlice<u32>,
    _chunk_sums: CudaSlice<abi::SrklSums>,
    _chunks_done: CudaSlice<u32>,
    _block_sums: CudaSlice<abi::SrklSums>,
}

impl Cuda {
    /// Prepares the steps of `blocks`, all on `device`.
    pub fn new(device: &CudaDevice, blocks: &[Block], groups: &[Group]) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
        let mut entries = vec![];
        let mut chunk_block = vec![];
        for (number, block) in blocks.iter().enumerate() {
            entries.push(abi::SrklBlock {
                w: address_of(&block.var, device)?,
                master: match &block.master {
                    Some(Master::Cuda(master)) => master.device_ptr(&stream).0,
                    _ => 0,
                },
                n: block.n as u64,
                first_chunk: chunk_block.len() as u64,
                dtype: dtype(block.dtype)?,
                group: block.group as u32,
            });
            chunk_block.resize(chunk_block.len() + block.n.div_ceil(CHUNK), number as u32);
        }
        let (block_count, chunk_count) = (blocks.len().max(1), chunk_block.len().max(1));
        let live_count = blocks.iter().filter(|block| block.n > 0).count() as u64;
        let scalars = StepScalars { schedule: 1., grad_scale: 1. };
        let gradients = Uploaded::new(device, vec![NO_GRADIENT; block_count])?;
        let groups = Uploaded::new(device, groups.iter().map(group).collect())?;
        let scalars = Uploaded::new(device, vec![scalars_of(&groups.host, scalars)])?;
        let entries = device.clone_htod(&entries)?;
        let chunk_blocks =
            device.clone_htod(if chunk_block.is_empty() { &[0][..] } else { &chunk_block })?;
        let chunk_sums = device.alloc_zeros::<abi::SrklSums>(chunk_count)?;
        let chunks_done = device.alloc_zeros::<u32>(block_count)?;
        let block_sums = device.alloc_zeros::<abi::SrklSums>(block_count)?;
        let decisions = device.alloc_zeros::<abi::SrklDecision>(block_count)?;
        let state = device.alloc_zeros::<abi::SrklState>(1)?;
        let table = abi::SrklTable {
            blocks: entries.device_ptr(&stream).0,
            gradients: gradients.device.device_ptr(&stream).0,
            groups: groups.device.device_ptr(&stream).0,
            scalars: scalars.device.device_ptr(&stream).0,
            chunk_block: chunk_blocks.device_ptr(&stream).0,
            chunk_sums: chunk_sums.device_ptr(&stream).0,
            chunks_done: chunks_done.device_ptr(&stream).0,
            block_sums: block_sums.device_ptr(&stream).0,
            decisions: decisions.device_ptr(&stream).0,
            state: state.device_ptr(&stream).0,
            block_count: blocks.len() as u64,
            live_count,
            chunk_count: chunk_block.len() as u64,
        };
        let multiprocessors = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .w()? as u32;
        let most = (multiprocessors * BLOCKS_PER_SM) as u64;
        Ok(Self {
            device: device.clone(),
            statistics: module.load_function("srkl_statistics").w()?,
            update: module.load_function("srkl_update").w()?,
            grid: table.chunk_count.min(most) as u32,
            gradients,
            groups,
            scalars,
            decisions,
            state,
            _memory: Memory {
                _blocks: entries,
                _chunk_block: chunk_blocks,
                _chunk_sums: chunk_sums,
                _chunks_done: chunks_done,
                _block_sums: block_sums,
            },
            table,
        })
    }

    /// One step: two launches, no synchronisation, nothing copied to the host.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient; nothing is launched then.
    pub fn step(
        &mut self,
        blocks: &[Block],
        storages: &[usize],
        groups: &[Group],
        grads: &GradStore,
        scalars: StepScalars,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        // The tensors must live until the kernels are launched; then the stream's order protects them.
        let mut alive = Vec::with_capacity(blocks.len());
        let mut gradients = Vec::with_capacity(blocks.len());
        for block in blocks {
            let Some(gradient) = grads.get_id(block.id) else {
                gradients.push(NO_GRADIENT);
                continue;
            };
            block.check_gradient(gradient)?;
            {
                let (storage, _) = gradient.storage_and_layout();
                block.check_alias(storage_address(&storage), storages)?;
            }
            let gradient = gradient.contiguous()?;
            let address = if block.n == 0 { 0 } else { address_of(&gradient, &self.device)? };
            gradients.push(abi::SrklGradient { address, dtype: dtype(gradient.dtype())? as u64 });
            alive.push(gradient);
        }
        if self.table.chunk_count == 0 {
            return Ok(());
        }
        self.gradients.set(&self.device, gradients)?;
        self.groups.set(&self.device, groups.iter().map(group).collect())?;
        let scalars = scalars_of(&self.groups.host, scalars);
        self.scalars.set(&self.device, vec![scalars])?;
        let config = LaunchConfig {
            grid_dim: (self.grid, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        for kernel in [&self.statistics, &self.update] {
            // SAFETY: the contract at the top of kernels/srkl.cu:
            // 1. grid and block are as it says, and the only argument is the table by value;
            // 2. `new` has allocated what the table points to, in the sizes that abi.h gives, with
            //    zeros where the contract asks for them, and `self` keeps it alive;
            // 3. the addresses in `gradients` are of contiguous tensors on this device of the
            //    parameter's size (`check_gradient`, `contiguous`), alive in `alive`, and none is of a
            //    parameter (`check_alias`); those in `blocks` are of variables that `Block` keeps;
            // 4. both launches go to the stream that candle's own work on these tensors went to.
            unsafe { stream.launch_builder(kernel).arg(&self.table).launch(config) }.w()?;
        }
        Ok(())
    }

    pub fn state(&self) -> Result<abi::SrklState> {
        Ok(self.device.clone_dtoh(&self.state)?[0])
    }

    pub fn decisions(&self) -> Result<Vec<abi::SrklDecision>> {
        self.device.clone_dtoh(&self.decisions)
    }

    /// Sets the counters, as a checkpoint has them.
    pub fn set_counters(&mut self, steps: u64, skipped_steps: u64, skipped: &[u64]) -> Result<()> {
        let state = abi::SrklState { steps, skipped_steps, grad_norm: 0., blocks_done: 0, pad: 0 };
        let mut decisions = self.decisions()?;
        for (decision, &skipped) in decisions.iter_mut().zip(skipped) {
            decision.skipped = skipped;
        }
        self.device.memcpy_htod(&decisions, &mut self.decisions)?;
        self.device.memcpy_htod(&[state], &mut self.state)
    }
}

const NO_GRADIENT: abi::SrklGradient = abi::SrklGradient { address: 0, dtype: 0 };

fn dtype(dtype: DType) -> Result<u32> {
    Ok(match dtype {
        DType::F32 => abi::SRKL_F32,
        DType::F64 => abi::SRKL_F64,
        DType::BF16 => abi::SRKL_BF16,
        DType::F16 => abi::SRKL_F16,
        dtype => bail!("expected f32, f64, bf16 or f16, got {dtype:?}"),
    })
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
            Scope::Element => abi::SRKL_ELEMENT,
        },
        nonfinite: match nonfinite {
            NonFinite::SkipStep => abi::SRKL_SKIP_STEP,
            NonFinite::SkipBlock => abi::SRKL_SKIP_BLOCK,
            NonFinite::Propagate => abi::SRKL_PROPAGATE,
        },
    }
}

fn scalars_of(groups: &[abi::SrklGroup], scalars: StepScalars) -> abi::SrklScalars {
    let norm = groups.iter().any(|group| group.max_grad_norm > 0.);
    let total = norm || groups.iter().any(|group| group.scope == abi::SRKL_GLOBAL);
    abi::SrklScalars {
        schedule: scalars.schedule,
        grad_scale: scalars.grad_scale,
        norm: norm as u32,
        total: total as u32,
    }
}

/// The device address of a tensor's first element.
fn address_of(tensor: &Tensor, device: &CudaDevice) -> Result<u64> {
    fn of<T: CudaDType + DeviceRepr>(
        storage: &CudaStorage,
        offset: usize,
        device: &CudaDevice,
    ) -> Result<u64> {
        let stream = device.cuda_stream();
        let (address, _guard) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
        Ok(address + (offset * size_of::<T>()) as u64)
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("expected a tensor on a CUDA device") };
    let offset = layout.start_offset();
    match tensor.dtype() {
        DType::F32 => of::<f32>(storage, offset, device),
        DType::F64 => of::<f64>(storage, offset, device),
        DType::BF16 => of::<bf16>(storage, offset, device),
        DType::F16 => of::<f16>(storage, offset, device),
        dtype => bail!("expected f32, f64, bf16 or f16, got {dtype:?}"),
    }
}

/// The values of a variable of 16 bits, as f32 on its device.
pub(crate) fn new_master(var: &Var) -> Result<CudaSlice<f32>> {
    let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    upload_master(var, &values)
}

pub(crate) fn upload_master(var: &Var, values: &[f32]) -> Result<CudaSlice<f32>> {
    var.device().as_cuda_device()?.clone_htod(if values.is_empty() { &[0.][..] } else { values })
}
