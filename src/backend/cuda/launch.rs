//! The launches of `kernels/srkl.cu`, whose launch contract stands at the top of that file.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use super::abi;

/// Machine code and PTX of `kernels/srkl.cu`, from `build.rs`.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/srkl.fatbin"));

/// The kernels in each context that has used them, by the context's address. Each entry keeps its context, so the address is of
/// no other one; a device has one context, whoever opens it.
static MODULES: Mutex<Vec<(usize, Arc<CudaModule>)>> = Mutex::new(vec![]);

/// The kernels in a context, loaded once, however many optimizers come and go.
pub(crate) fn module(context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
    let key = context.cu_ctx() as usize;
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, module)) = modules.iter().find(|(known, _)| *known == key) {
        return Ok(module.clone());
    }
    let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
    modules.push((key, module.clone()));
    Ok(module)
}

/// CTAs for each multiprocessor: as many as there is room for. (With fewer, meant to keep a gradient in L2 until its
/// block is updated, a step took up to twice the time on an H100: too few loads are in flight for the bandwidth of
/// its memory.)
const CTAS_PER_SM: u32 = abi::SRKL_CTAS_PER_SM;

/// Which kernel runs a step.
#[derive(Clone, Copy)]
pub(crate) enum StepKernel {
    Plain,
    /// For directions that few use, and elements that have their own brakes.
    Elements,
    /// Any of these, and the update writes `step_sums`.
    Measuring,
    /// For state that is packed, and parameters that are rounded at random.
    Packed,
    /// Any of these, and the update writes `step_sums`.
    PackedMeasuring,
}

/// The kernels of a device, and how they are launched. Each gets a table, which keeps the launch contract if the
/// memory that it points to does.
pub(crate) struct Kernels {
    stream: Arc<CudaStream>,
    multiprocessors: u32,
    step: CudaFunction,
    step_elements: CudaFunction,
    step_measuring: CudaFunction,
    step_packed: CudaFunction,
    step_packed_measuring: CudaFunction,
    decide: CudaFunction,
    sums: CudaFunction,
    gather: CudaFunction,
    replace: CudaFunction,
    momentum: CudaFunction,
    normalize: CudaFunction,
    combine: CudaFunction,
    set: CudaFunction,
}

impl Kernels {
    pub fn load(stream: &Arc<CudaStream>) -> Result<Self> {
        let context = stream.context();
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).w()? as u32;
        let module = module(context)?;
        let load = |name| module.load_function(name).w();
        Ok(Self {
            stream: stream.clone(),
            multiprocessors,
            step: load("srkl_step")?,
            step_elements: load("srkl_step_elements")?,
            step_measuring: load("srkl_step_measuring")?,
            step_packed: load("srkl_step_packed")?,
            step_packed_measuring: load("srkl_step_packed_measuring")?,
            decide: load("srkl_decide")?,
            sums: load("srkl_sums")?,
            gather: load("srkl_gather")?,
            replace: load("srkl_replace")?,
            momentum: load("srkl_momentum")?,
            normalize: load("srkl_normalize")?,
            combine: load("srkl_combine")?,
            set: load("srkl_set")?,
        })
    }

    /// Runs those of stages 1 to 3 that the table asks for.
    ///
    /// # Safety
    ///
    /// The contract at the top of kernels/srkl.cu:
    /// 1. what the table points to is there, in the sizes that abi.h gives, with zeros where the contract asks for
    ///    them, until the stream has passed this launch;
    /// 2. the addresses of gradients are those of contiguous tensors on this device of their parameters' sizes, which
    ///    live as long, and none is of a parameter;
    /// 3. the addresses of parameters and their state are memory of their own, aligned to 16 bytes;
    /// 4. all work on these goes to this stream, and launches with one table follow each other there.
    pub unsafe fn step(&self, table: &abi::SrklTable, kind: StepKernel) -> Result<()> {
        let step = match kind {
            StepKernel::Plain => &self.step,
            StepKernel::Elements => &self.step_elements,
            StepKernel::Measuring => &self.step_measuring,
            StepKernel::Packed => &self.step_packed,
            StepKernel::PackedMeasuring => &self.step_packed_measuring,
        };
        // SAFETY: the grid and the size of a CTA are as the contract says, the only argument is the table by value,
        // and the caller keeps the rest.
        unsafe { self.stream.launch_builder(step).arg(table).launch(self.grid(table.chunk_count)) }
            .w()?;
        Ok(())
    }

    /// Runs stage 2 alone, if it needs no statistics.
    ///
    /// # Safety
    ///
    /// As [`Kernels::step`].
    pub unsafe fn decide(&self, table: &abi::SrklTable) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.decide);
        // SAFETY: as for `step`; any grid is right.
        unsafe { launch.arg(table).launch(self.grid(table.chunk_count)) }.w()?;
        Ok(())
    }

    /// Computes the sums of the kind `what`.
    ///
    /// # Safety
    ///
    /// As [`Kernels::step`], and what comes before it by the contract at the top of kernels/curvature.cuh has been
    /// launched.
    pub unsafe fn sums(&self, table: &abi::SrklTable, what: u32, delta: f64) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.sums);
        launch.arg(table).arg(&what).arg(&delta);
        // SAFETY: the arguments are the kernel's, by value, and the caller keeps the contract.
        unsafe { launch.launch(self.grid(table.chunk_count)) }.w()?;
        Ok(())
    }

    /// Uses the sums of all ranks, of the kind `what`.
    ///
    /// # Safety
    ///
    /// As [`Kernels::step`], by the contract at the top of kernels/gather.cuh.
    pub unsafe fn gather(&self, table: &abi::SrklTable, what: u32, delta: f64) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.gather);
        launch.arg(table).arg(&what).arg(&delta);
        // SAFETY: the arguments are the kernel's, by value, and the caller keeps the contract.
        unsafe { launch.launch(self.grid(table.block_count)) }.w()?;
        Ok(())
    }

    /// Perturbs parameters or swaps in their averages, or restores them from their backups.
    ///
    /// # Safety
    ///
    /// As [`Kernels::step`], by the contract at the top of kernels/replace.cuh, and every block has a backup.
    pub unsafe fn replace(
        &self,
        table: &abi::SrklTable,
        what: u32,
        seed: u64,
        draw: u64,
    ) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.replace);
        launch.arg(table).arg(&what).arg(&seed).arg(&draw);
        // SAFETY: the arguments are the kernel's, by value, and the caller keeps the contract.
        unsafe { launch.launch(self.grid(table.chunk_count)) }.w()?;
        Ok(())
    }

    /// Writes the momentum of all matrices to their room, each divided by its norm.
    ///
    /// # Safety
    ///
    /// As [`Kernels::step`], by the contract at the top of kernels/orthogonal.cuh.
    pub unsafe fn momentum(
        &self,
        table: &abi::SrklTable,
        matrices: &abi::SrklMatrices,
    ) -> Result<()> {
        for kernel in [&self.momentum, &self.normalize] {
            let mut launch = self.stream.launch_builder(kernel);
            launch.arg(table).arg(matrices);
            // SAFETY: the arguments are the kernel's, by value, and the caller keeps the contract.
            unsafe { launch.launch(self.grid(matrices.chunk_count)) }.w()?;
        }
        Ok(())
    }

    /// `y <- a y + b x`, of `n` elements.
    ///
    /// # Safety
    ///
    /// `y` and `x` are the addresses of so many elements of one dtype, f32, f64 or bf16, on this device; they don't
    /// overlap, live until the stream has passed this launch, and all work on them goes to this stream.
    pub unsafe fn combine(
        &self,
        (y, a): (abi::SrklGradient, f64),
        (x, b): (abi::SrklGradient, f64),
        n: usize,
    ) -> Result<()> {
        let n = n as u64;
        let mut launch = self.stream.launch_builder(&self.combine);
        launch.arg(&y).arg(&x).arg(&n).arg(&a).arg(&b);
        // SAFETY: the arguments are the kernel's, by value, and the caller keeps the contract.
        unsafe { launch.launch(self.grid(n.div_ceil(abi::SRKL_THREADS as u64))) }.w()?;
        Ok(())
    }

    /// Writes the scalars, in the order of the stream.
    ///
    /// # Safety
    ///
    /// The table's place for scalars is there until the stream has passed this launch.
    pub unsafe fn set(&self, table: &abi::SrklTable, scalars: &abi::SrklScalars) -> Result<()> {
        let config =
            LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(&self.set);
        launch.arg(table).arg(scalars);
        // SAFETY: the arguments are the kernel's, by value, and it writes to that place alone.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }

    /// One CTA for each piece of work, but no more than there is room for.
    fn grid(&self, work: u64) -> LaunchConfig {
        let most = (self.multiprocessors * CTAS_PER_SM) as u64;
        LaunchConfig {
            grid_dim: (work.clamp(1, most) as u32, 1, 1),
            block_dim: (abi::SRKL_THREADS, 1, 1),
            shared_mem_bytes: 0,
        }
    }
}
