//! [`Block`]: a parameter tensor with its state, the unit that the rule works on; [`Parameters`]: all of an
//! optimizer.

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::{DType, Device, Layout, Result, Shape, Storage, Tensor, TensorId, Var, bail};

use crate::matrices::Matrices;
use crate::params::{Group, MasterWeights, ParamsSrkl, Rounding};
use crate::state::State;

/// A parameter tensor and its state.
///
/// The properties of the variable that a step needs are copied here: with thousands of small tensors a step's time
/// goes into following pointers.
pub(crate) struct Block {
    pub name: String,
    /// Its other names.
    pub tied: Vec<String>,
    pub var: Var,
    /// A view of its first element, of rank 0, by which a step on the CPU writes to all of its storage: candle first looks whether
    /// a layout overlaps itself, for which it allocates unless the rank is 0. (All of the variable, if that has no elements.)
    pub memory: Tensor,
    pub id: TensorId,
    pub dtype: DType,
    pub shape: Shape,
    /// The number of its elements.
    pub whole: usize,
    /// Which of them each rank steps, or adds up the gradients of: whole chunks; nothing if there is one process.
    pub shards: Vec<Range<usize>>,
    /// The elements that this process steps and keeps state of, all of them unless state is sharded: their number, and the
    /// first of them.
    pub n: usize,
    pub first: usize,
    /// Whether its other elements, if there are any, are those of other ranks.
    pub sharded: bool,
    /// Where these are in the variable's storage.
    pub layout: Layout,
    pub on_cpu: bool,
    /// The addresses of the variable's storage, which never changes, and of the first element that is stepped (0 on a device).
    pub storage: usize,
    pub elements: usize,
    /// The index of its group.
    pub group: usize,
    /// Its index in the list that the optimizer was built from. Loading a checkpoint may reorder blocks.
    pub place: usize,
    pub state: State,
    /// What [`Direction::Muon`](crate::Direction::Muon) takes it for, if it is in a group of that.
    pub matrices: Option<Matrices>,
    /// Where these matrices are orthogonalised: a tensor of shape `(count, rows, cols)` that a backend makes.
    pub orthogonal: Option<Tensor>,
    /// A copy of the parameter, while it is perturbed or replaced.
    pub backup: Backup,
    /// Whether any step has had a gradient for it.
    pub trained: bool,
    /// Whether there is an estimate of its curvature, or the last measurement found no direction to measure along.
    pub known: bool,
}

/// A copy of a parameter. Its memory is reused: allocating costs more than copying.
#[derive(Default)]
pub(crate) struct Backup {
    pub memory: Option<Var>,
    pub valid: bool,
}

/// All parameters of an optimizer, in the order in which sums are added, and their settings.
pub(crate) struct Parameters {
    pub groups: Vec<Group>,
    pub blocks: Vec<Block>,
    /// The addresses of the variables' storages: a gradient must not be in one of them.
    pub storages: Addresses,
    /// Of all blocks.
    lengths: Lengths,
}

/// The elements that are stepped here of some blocks: of all together, and of the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Lengths {
    pub total: usize,
    pub largest: usize,
}

impl Parameters {
    pub fn new(groups: Vec<Group>, blocks: Vec<Block>) -> Self {
        let (storages, lengths) = (Addresses::of(&blocks), Lengths::of(&blocks));
        Self { groups, blocks, storages, lengths }
    }

    /// Notes what is known of all blocks, after the list has changed.
    pub fn note_blocks(&mut self) {
        self.storages = Addresses::of(&self.blocks);
        self.lengths = Lengths::of(&self.blocks);
    }

    /// The lengths of a run.
    pub fn lengths(&self, run: &Range<usize>) -> Lengths {
        debug_assert_eq!(self.lengths, Lengths::of(&self.blocks));
        match run.len() == self.blocks.len() {
            true => self.lengths,
            false => Lengths::of(&self.blocks[run.clone()]),
        }
    }

    /// Moves a block between its group and the twin of that, of the frozen.
    pub fn set_frozen(&mut self, place: usize, frozen: bool) {
        let groups = self.groups.len() / 2;
        let group = &mut self.blocks[place].group;
        *group = *group % groups + if frozen { groups } else { 0 };
    }

    pub fn is_frozen(&self, block: &Block) -> bool {
        self.groups[block.group].frozen
    }

    /// The settings of a block.
    pub fn of(&self, block: &Block) -> &ParamsSrkl {
        &self.groups[block.group].params
    }

    /// Whether something holds for the settings of any group.
    pub fn any(&self, holds: impl Fn(&ParamsSrkl) -> bool) -> bool {
        self.groups.iter().any(|group| holds(&group.params))
    }
}

impl Lengths {
    fn of(blocks: &[Block]) -> Self {
        let total = blocks.iter().map(|block| block.n).sum();
        let largest = blocks.iter().map(|block| block.n).max().unwrap_or_default();
        Self { total, largest }
    }
}

/// A set of addresses, in which most lookups fail.
pub(crate) struct Addresses {
    sorted: Vec<usize>,
    /// The bits by [`Addresses::bit`] of all that are in the set, 16 bits or more for each: most others are not looked for further.
    filter: Vec<u64>,
}

impl Addresses {
    /// Those of the variables' storages.
    fn of(blocks: &[Block]) -> Self {
        Self::new(blocks.iter().map(|block| block.storage).collect())
    }

    fn new(mut sorted: Vec<usize>) -> Self {
        sorted.sort_unstable();
        let words = sorted.len().div_ceil(4).next_power_of_two();
        let mut filter = vec![0; words];
        for address in &sorted {
            let (word, bit) = Self::bit(*address, words);
            filter[word] |= bit;
        }
        Self { sorted, filter }
    }

    pub fn contain(&self, address: usize) -> bool {
        let (word, bit) = Self::bit(address, self.filter.len());
        self.filter[word] & bit != 0 && self.sorted.binary_search(&address).is_ok()
    }

    /// The word of a filter of so many of them, a power of two, and the bit there, by the upper bits of a product (Fibonacci hashing:
    /// Knuth, The Art of Computer Programming, volume 3).
    fn bit(address: usize, words: usize) -> (usize, u64) {
        let hash = (address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash >> 38) as usize & (words - 1), 1 << (hash >> 32 & 63))
    }
}

/// Whether gradients and parameters of this dtype are handled.
pub(crate) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
}

impl Block {
    /// A block of which the elements `own` are stepped here. Still lacks its masters, `elements`, `matrices` and `orthogonal`: see `backend/masters.rs`, `backend/cpu/access.rs`,
    /// and `matrices.rs`.
    ///
    /// # Errors
    ///
    /// A variable on a device or of a dtype that is not handled, one that would lose bits in its master, or one that
    /// is not contiguous at offset 0, as candle makes variables.
    pub fn new(
        name: String,
        var: Var,
        group: usize,
        params: &ParamsSrkl,
        own: Range<usize>,
    ) -> Result<Self> {
        let masters = params.master_weights;
        let dtype = var.dtype();
        let on_cpu = match var.device() {
            Device::Cpu => true,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => false,
            device => {
                let places =
                    if cfg!(feature = "cuda") { "the CPU or a CUDA device" } else { "the CPU" };
                bail!(
                    "`{name}`: expected a variable on {places}, got one on {:?}",
                    device.location()
                )
            }
        };
        if !is_supported(dtype) {
            bail!("`{name}`: expected a variable of f32, f64, bf16 or f16, got {dtype:?}")
        }
        if !var.is_contiguous() || var.layout().start_offset() != 0 {
            bail!("`{name}`: expected a contiguous variable at offset 0, got {:?}", var.layout())
        }
        if masters == MasterWeights::F32 && dtype == DType::F64 {
            bail!(
                "`{name}`: `MasterWeights::F32` would lose bits of an f64 variable; use \
                 `MasterWeights::Auto` or `None`"
            )
        }
        let state = State::new(params, &var, own.len())?;
        let storage = storage_address(&var.storage_and_layout().0);
        let (id, shape, whole) = (var.id(), var.shape().clone(), var.elem_count());
        let (n, first) = (own.len(), own.start);
        let layout = Layout::contiguous_with_offset(n, first);
        let memory = match whole {
            0 => var.detach(),
            _ => var.detach().flatten_all()?.get(0)?,
        };
        Ok(Self {
            name,
            tied: vec![],
            var,
            memory,
            id,
            dtype,
            shape,
            whole,
            shards: vec![],
            n,
            first,
            sharded: false,
            layout,
            on_cpu,
            storage,
            elements: 0,
            group,
            place: 0,
            state,
            matrices: None,
            orthogonal: None,
            backup: Backup::default(),
            trained: false,
            known: false,
        })
    }

    /// Whether the parameter is on this device.
    #[cfg(feature = "cuda")]
    pub fn is_on(&self, device: &CudaDevice) -> bool {
        matches!(self.var.device(), Device::Cuda(other) if other.id() == device.id())
    }

    /// Whether the parameter is on this device. (One on the CPU is not looked at: that would be a miss of the caches.)
    fn is_beside(&self, device: &Device) -> bool {
        match self.on_cpu {
            true => device.is_cpu(),
            false => device.same_device(self.var.device()),
        }
    }

    /// Whether this is one of its names.
    pub fn is_named(&self, name: &str) -> bool {
        self.name == name || self.tied.iter().any(|tied| tied == name)
    }

    /// An error if what a step is given does not fit: the gradient, or of a sharded parameter a sum of the elements that are
    /// stepped here.
    pub fn check_followed(&self, gradient: &Tensor) -> Result<()> {
        match self.sharded && gradient.dims() == [self.n] {
            true => Ok(()),
            false => self.check_gradient(gradient),
        }
    }

    /// An error if a gradient does not fit its parameter in device, shape or dtype.
    pub fn check_gradient(&self, gradient: &Tensor) -> Result<()> {
        let Self { name, shape, .. } = self;
        if !self.is_beside(gradient.device()) {
            bail!(
                "gradient of `{name}`: expected it on {:?}, got {:?}",
                self.var.device().location(),
                gradient.device().location()
            )
        }
        if gradient.dims() != shape.dims() {
            bail!("gradient of `{name}`: expected shape {shape:?}, got {:?}", gradient.shape())
        }
        if !is_supported(gradient.dtype()) {
            bail!(
                "gradient of `{name}`: expected f32, f64, bf16 or f16, got {:?}",
                gradient.dtype()
            )
        }
        Ok(())
    }

    /// An error if a gradient is in the storage of a variable. `storages` are their addresses.
    pub fn check_alias(&self, address: usize, storages: &Addresses) -> Result<()> {
        if storages.contain(address) {
            bail!(
                "gradient of `{}`: it shares its memory with a parameter, which the step writes to; \
                 pass a copy",
                self.name
            )
        }
        Ok(())
    }

    /// The elements that are stepped here: in the variable's memory, or if that is on a device and has others a copy.
    pub fn own(&self) -> Result<Tensor> {
        let own = self.var.flatten_all()?.narrow(0, self.first, self.n)?;
        match !self.on_cpu && 0 < self.n && self.n < self.whole {
            true => own.force_contiguous(),
            false => Ok(own),
        }
    }

    /// The copy of the parameter, while it is perturbed or replaced.
    pub fn backup(&self) -> Option<&Tensor> {
        let Backup { memory, valid } = &self.backup;
        memory.as_deref().filter(|_| *valid)
    }

    /// Backs up all of the parameter, by candle: for ranks on devices, whose kernels know of their shard alone.
    pub fn back_up_whole(&mut self) -> Result<()> {
        if self.whole > 0 {
            match &self.backup.memory {
                Some(memory) => memory.set(&self.var)?,
                None => self.backup.memory = Some(Var::from_tensor(&self.var.detach())?),
            }
            self.backup.valid = true;
        }
        Ok(())
    }

    /// Restores all of the parameter, if there is a backup.
    pub fn restore_whole(&mut self) -> Result<()> {
        let restored = match self.backup() {
            Some(old) => self.var.set(old),
            None => Ok(()),
        };
        self.backup.valid = false;
        restored
    }

    /// What the orthogonal matrices of the block are multiplied by; 1 if there are none.
    pub fn matrix_scale(&self) -> f64 {
        self.matrices.as_ref().map_or(1., Matrices::scale)
    }

    /// Whether its parameter is rounded at random.
    pub fn rounds(&self, params: &ParamsSrkl) -> bool {
        let kept = self.state.master.is_some();
        params.rounding == Rounding::Stochastic && self.dtype == DType::BF16 && !kept
    }

    /// Whether a step packs anything.
    pub fn is_packed(&self, params: &ParamsSrkl) -> bool {
        self.rounds(params) || self.state.is_packed()
    }
}

/// The same for tensors that share memory: in candle these share one storage behind one lock.
pub(crate) fn storage_address(storage: &Storage) -> usize {
    std::ptr::from_ref(storage).addr()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Addresses;

    proptest! {
        #[test]
        fn addresses_are_those_of_the_set(
            set in proptest::collection::vec(any::<usize>(), 0..300),
            others in proptest::collection::vec(any::<usize>(), 0..300),
            neighbours in any::<bool>(),
        ) {
            // As storages are in memory, or anywhere.
            let place = |x: &usize| if neighbours { 0x7f00_0000_0000 + x % 1000 * 16 } else { *x };
            let set: Vec<usize> = set.iter().map(place).collect();
            let addresses = Addresses::new(set.clone());
            for address in others.iter().map(place).chain(set.iter().copied()) {
                prop_assert_eq!(addresses.contain(address), set.contains(&address));
            }
        }
    }
}
