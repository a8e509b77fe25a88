//! Ranks whose tensors go from device to device, by NCCL.

use std::ffi::c_char;
use std::thread;
use std::time::{Duration, Instant};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, Error, InplaceOp1, Layout, Result, Tensor,
    bail,
};
use cudarc::nccl::result::NcclError;
use cudarc::nccl::{Comm, Id, NcclType, group_end, group_start};
use half::{bf16, f16};

use super::{Collective, OnDevice};

/// Ranks that have a CUDA device each, in processes or threads of their own, between whose devices NCCL moves gradients and
/// parameters: feature `nccl`.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap, linear};
/// use candle_srkl::{Nccl, ParamsSrkl, Srkl, Tcp};
///
/// # let (rank, world_size) = (0, 2);
/// let device = Device::new_cuda(rank)?;
/// let varmap = VarMap::new();
/// let model = linear(4, 2, VarBuilder::from_varmap(&varmap, DType::F32, &device))?;
/// let hosts = Tcp::new("127.0.0.1:29400", rank, world_size)?;
/// let mut opt = Srkl::builder()
///     .default_group(ParamsSrkl::braked_adam())
///     .collective(Nccl::new(hosts, &device)?)
///     .build_varmap(&varmap)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// What ranks agree on goes between the hosts, by another [`Collective`]: [`Tcp`](crate::Tcp), [`Threads`](crate::Threads) or
/// `Mpi`. So what is wrong on one is an error of all before anything is launched, and no rank waits for a device to find that
/// out. A rank that fails after that, for want of memory, leaves the devices of others waiting, as one that dies.
///
/// All parameters must be on the device; if they are not, everything goes by way of the hosts.
pub struct Nccl {
    hosts: Box<dyn Collective>,
    comm: Comm,
    device: CudaDevice,
    /// Whether its work may never end: another rank has failed.
    failed: bool,
}

// SAFETY: a communicator may be used by any thread, one at a time, and all methods that use it take `&mut self`.
unsafe impl Send for Nccl {}

impl Nccl {
    /// Waits until all ranks have come. They talk to each other by `hosts`; `device` is this one's own.
    ///
    /// # Errors
    ///
    /// A device that is no CUDA device, on any rank; what `hosts` or NCCL refuse, as two ranks on one device.
    pub fn new(hosts: impl Collective + 'static, device: &Device) -> Result<Self> {
        let mut hosts: Box<dyn Collective> = Box::new(hosts);
        let (rank, world_size) = (hosts.rank(), hosts.world_size());
        // Whoever could not begin would let the others wait.
        let begun = device.as_cuda_device().cloned().and_then(|device| {
            // NCCL goes by the device of the thread.
            device.cuda_stream().context().bind_to_thread().w()?;
            let id = if rank == 0 { Some(named("ncclGetUniqueId", Id::new())?) } else { None };
            let bytes = id.map_or(vec![], |id| id.internal().map(|byte| byte as u8).to_vec());
            Ok((device, bytes))
        });
        let told = match &begun {
            Ok((_, id)) => hosts.exchange(&[&[1], &id[..]].concat()),
            Err(e) => hosts.exchange(&[&[0], e.to_string().as_bytes()].concat()),
        }?;
        for (rank, told) in told.iter().enumerate() {
            if told.first() != Some(&1) {
                let why = String::from_utf8_lossy(told.get(1..).unwrap_or_default());
                bail!("`Nccl::new`: rank {rank}: {why}")
            }
        }
        let (device, _) = begun?;
        let mut id = [0; 128];
        for (to, from) in id.iter_mut().zip(&told[0][1..]) {
            *to = *from as c_char;
        }
        let stream = device.cuda_stream();
        let comm = Comm::from_rank(stream, rank, world_size, Id::uninit(id));
        Ok(Self { hosts, comm: named("ncclCommInitRank", comm)?, device, failed: false })
    }

    /// Runs calls with tensors as one group: they begin together.
    fn group<'t>(&self, calls: impl Iterator<Item = (Call, &'t Tensor)>) -> Result<()> {
        let comm = &self.comm;
        named("ncclGroupStart", group_start())?;
        let mut calls = calls;
        let called =
            calls.try_for_each(|(call, tensor)| tensor.inplace_op1(&InPlace { comm, call }));
        let ended = named("ncclGroupEnd", group_end());
        called.and(ended.map(|_| ()))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // The communicator ends what has been launched and is not done: parameters on their way.
        if self.failed || thread::panicking() {
            return;
        }
        if let Ok(event) = self.device.cuda_stream().record_event(None) {
            let until = Instant::now() + PATIENCE;
            while !event.is_complete() && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// How long a rank that leaves waits for its device, which may wait for one that has left before.
const PATIENCE: Duration = Duration::from_secs(30);

/// How many broadcasts a group has at most: NCCL takes some thousands.
const GROUP: usize = 1024;

/// The result of a function of NCCL.
fn named<T>(function: &str, result: std::result::Result<T, NcclError>) -> Result<T> {
    // `NCCL_DEBUG=WARN` makes it say more.
    result.map_err(|e| Error::msg(format!("{function}: {:?}", e.0)))
}

/// What happens to the elements of a tensor.
#[derive(Clone, Copy)]
enum Call {
    SendTo(usize),
    ReceiveFrom(usize),
    BroadcastFrom(usize),
}

/// A call with a contiguous tensor, in place.
struct InPlace<'a> {
    comm: &'a Comm,
    call: Call,
}

impl InPlace<'_> {
    fn run<T: CudaDType + NcclType>(
        &self,
        storage: &mut CudaStorage,
        layout: &Layout,
    ) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("expected a contiguous tensor")
        };
        if storage.device().cuda_stream().context() != self.comm.context() {
            bail!("expected a tensor on the device of this rank")
        }
        let mut elements = storage.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
        match self.call {
            Call::SendTo(rank) => named("ncclSend", self.comm.send(&elements, rank as i32)),
            Call::ReceiveFrom(rank) => {
                named("ncclRecv", self.comm.recv(&mut elements, rank as i32)).map(|_| ())
            }
            Call::BroadcastFrom(rank) => {
                let done = self.comm.broadcast_in_place(&mut elements, rank as i32);
                named("ncclBroadcast", done).map(|_| ())
            }
        }
    }
}

impl InplaceOp1 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "srkl-nccl"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("expected a tensor on a CUDA device")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        match storage.dtype() {
            DType::F32 => self.run::<f32>(storage, layout),
            DType::F64 => self.run::<f64>(storage, layout),
            DType::BF16 => self.run::<bf16>(storage, layout),
            DType::F16 => self.run::<f16>(storage, layout),
            dtype => bail!("expected a tensor of f32, f64, bf16 or f16, got {dtype:?}"),
        }
    }
}

impl OnDevice for Nccl {
    fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    fn send_and_receive(
        &mut self,
        send: &[(usize, Tensor)],
        receive: &[(usize, Tensor)],
    ) -> Result<()> {
        let send = send.iter().map(|(rank, tensor)| (Call::SendTo(*rank), tensor));
        let receive = receive.iter().map(|(rank, tensor)| (Call::ReceiveFrom(*rank), tensor));
        self.group(send.chain(receive))
    }

    fn broadcast(&mut self, parts: &[(usize, Tensor)]) -> Result<()> {
        // The same groups on all ranks.
        parts.chunks(GROUP).try_for_each(|parts| {
            self.group(parts.iter().map(|(rank, tensor)| (Call::BroadcastFrom(*rank), tensor)))
        })
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.hosts.rank()
    }
    fn world_size(&self) -> usize {
        self.hosts.world_size()
    }
    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        let done = self.hosts.all_to_all(from, parts, to);
        done.inspect_err(|_| self.failed = true)
    }
    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        let done = self.hosts.all_gather(whole, parts);
        done.inspect_err(|_| self.failed = true)
    }
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let done = self.hosts.exchange(own);
        done.inspect_err(|_| self.failed = true)
    }
    fn abort(&mut self, why: &str) {
        self.failed = true;
        self.hosts.abort(why);
    }
    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        Some(self)
    }
}
