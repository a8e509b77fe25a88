//! [`Direction::Muon`]: the matrices of a device, those of equal shape in one batch.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::super::newton_schulz::newton_schulz;
use super::abi;
use super::launch::Kernels;
use super::table::numbers;
use crate::block::{Block, Parameters};
use crate::numerics::CHUNK;
use crate::params::Direction;

/// The matrices of a device, and the memory that kernels find them by.
pub(crate) struct Orthogonalizer {
    stream: Arc<CudaStream>,
    batches: Vec<Batch>,
    table: abi::SrklMatrices,
    _matrices: CudaSlice<abi::SrklMatrix>,
    _chunks: CudaSlice<abi::SrklChunk>,
    _chunk_sums: CudaSlice<abi::SrklSums>,
    _sums: CudaSlice<abi::SrklSums>,
    _chunks_done: CudaSlice<u32>,
}

/// Matrices of one shape and group, frozen or not, which are multiplied together.
struct Batch {
    /// `(count, rows, cols)`
    room: Tensor,
    group: usize,
    /// Of its blocks, among all.
    places: Vec<usize>,
}

impl Orthogonalizer {
    /// Makes room for the matrices of all blocks on `device`; `None` if there are none.
    pub fn new(
        device: &CudaDevice,
        stream: &Arc<CudaStream>,
        all: &mut Parameters,
    ) -> Result<Option<Self>> {
        // Those that are frozen are orthogonalised when they are not.
        let groups = all.groups.len() / 2;
        // By what the matrices of a batch share, the places of its blocks.
        let mut alike: BTreeMap<(usize, [usize; 2], &str), Vec<usize>> = BTreeMap::new();
        let (mut matrices, mut chunks) = (vec![], vec![]);
        // The number of a block among those of this device, and its place among all.
        let here = all.blocks.iter().enumerate().filter(|(_, block)| block.is_on(device));
        for (number, (place, block)) in here.enumerate() {
            let Some(of) = block.matrices.filter(|_| block.n > 0) else { continue };
            let dtype = products(block, all.groups[block.group].params.direction);
            let key = (block.group % groups, [of.rows, of.cols], dtype.as_str());
            alike.entry(key).or_default().push(place);
            let n = of.rows * of.cols;
            for matrix in 0..of.count {
                let chunk_count = n.div_ceil(CHUNK);
                let first_chunk = chunks.len() as u64;
                let block = matrices.len() as u64;
                let chunk = |i| abi::SrklChunk { start: (i * CHUNK) as u64, block };
                chunks.extend((0..chunk_count).map(chunk));
                matrices.push(abi::SrklMatrix {
                    block: number as u64,
                    start: (matrix * n) as u64,
                    n: n as u64,
                    first_chunk,
                    chunk_count: chunk_count as u64,
                });
            }
        }
        if matrices.is_empty() {
            return Ok(None);
        }
        let mut batches = vec![];
        for ((group, [rows, cols], _), places) in alike {
            let counts = places.iter().map(|&place| count(&all.blocks[place]));
            let shape = (counts.sum::<usize>(), rows, cols);
            let dtype = products(&all.blocks[places[0]], all.groups[group].params.direction);
            let room = Tensor::zeros(shape, dtype, &Device::Cuda(device.clone()))?;
            let mut first = 0;
            for &place in &places {
                let count = count(&all.blocks[place]);
                all.blocks[place].orthogonal = Some(room.narrow(0, first, count)?);
                first += count;
            }
            batches.push(Batch { room, group, places });
        }
        let chunk_sums = device.alloc_zeros(chunks.len())?;
        let sums = device.alloc_zeros(matrices.len())?;
        let chunks_done = device.alloc_zeros(matrices.len())?;
        let (matrices, chunks) = (device.clone_htod(&matrices)?, device.clone_htod(&chunks)?);
        let table = abi::SrklMatrices {
            matrices: matrices.device_ptr(stream).0,
            chunks: chunks.device_ptr(stream).0,
            chunk_sums: chunk_sums.device_ptr(stream).0,
            sums: sums.device_ptr(stream).0,
            chunks_done: chunks_done.device_ptr(stream).0,
            chunk_count: chunks.len() as u64,
        };
        Ok(Some(Self {
            stream: stream.clone(),
            batches,
            table,
            _matrices: matrices,
            _chunks: chunks,
            _chunk_sums: chunk_sums,
            _sums: sums,
            _chunks_done: chunks_done,
        }))
    }

    pub fn table(&self) -> &abi::SrklMatrices {
        &self.table
    }

    /// Orthogonalises what is in the rooms, but for batches that are frozen altogether; in a capture those too, which a replay
    /// may find thawed.
    pub fn run(&self, all: &Parameters, kernels: &Kernels, captured: bool) -> Result<()> {
        for Batch { room, group, places } in &self.batches {
            let params = &all.groups[*group].params;
            let Direction::Muon { steps, .. } = params.direction else {
                bail!("expected `Direction::Muon`, got {:?}", params.direction)
            };
            let still = places.iter().all(|&place| all.of(&all.blocks[place]).lr == 0.);
            if still && !captured {
                continue;
            }
            newton_schulz(room, steps, |y, a, x, b| {
                let n = y.elem_count();
                let (to, from) = (numbers(y, &self.stream)?, numbers(x, &self.stream)?);
                // SAFETY: `y` is a room or a product, `x` another product, contiguous and of the same shape and dtype;
                // what is dropped after this is freed in the order of candle's stream, which is ours.
                unsafe { kernels.combine((to, a), (from, b), n) }
            })?;
        }
        Ok(())
    }
}

/// How many matrices a block has.
fn count(block: &Block) -> usize {
    block.matrices.map_or(0, |matrices| matrices.count)
}

/// The dtype of the products for a block.
fn products(block: &Block, direction: Direction) -> DType {
    match (block.dtype, direction) {
        (DType::F64, _) => DType::F64,
        (_, Direction::Muon { bf16: true, .. }) => DType::BF16,
        _ => DType::F32,
    }
}
