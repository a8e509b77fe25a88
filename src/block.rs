//! [`Block`]: a parameter tensor with its state, the unit that the rule works on.

use candle_core::{DType, Result, Shape, Storage, TensorId, Var, bail};

use crate::backend::cpu;
use crate::backend::gradient::{Gradient, is_supported};
use crate::params::MasterWeights;

/// A parameter tensor and its state.
///
/// What a step asks of the variable is kept beside it: with thousands of small tensors its time
/// goes into following pointers.
pub(crate) struct Block {
    pub name: String,
    pub var: Var,
    pub id: TensorId,
    pub dtype: DType,
    pub shape: Shape,
    /// Elements.
    pub n: usize,
    /// The addresses of the variable's storage, which it keeps for life, and of its first element.
    pub storage: usize,
    pub elements: usize,
    /// Its place in the optimizer's list of groups.
    pub group: usize,
    pub master: Option<Vec<f32>>,
    /// How often it was skipped alone.
    pub skipped: u64,
    /// Curvature and brake of the last step, if it moved this block.
    pub last: Option<(f64, f64)>,
}

impl Block {
    /// # Errors
    ///
    /// A variable that is not on the CPU, of a dtype that is not handled or loses bits in its
    /// master, or not as candle makes variables.
    pub fn new(name: String, var: Var, group: usize, masters: MasterWeights) -> Result<Self> {
        let dtype = var.dtype();
        if !var.device().is_cpu() {
            bail!(
                "`{name}`: expected a variable on the CPU, got one on {:?}",
                var.device().location()
            )
        }
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
        let is_half = matches!(dtype, DType::BF16 | DType::F16);
        let master = match masters {
            MasterWeights::Auto | MasterWeights::F32 if is_half => Some(cpu::new_master(&var)?),
            _ => None,
        };
        let (storage, elements) = {
            let (storage, layout) = var.storage_and_layout();
            (storage_address(&storage), Gradient::new(&storage, layout)?.address())
        };
        let (id, shape, n) = (var.id(), var.shape().clone(), var.elem_count());
        let (skipped, last) = (0, None);
        Ok(Self { name, var, id, dtype, shape, n, storage, elements, group, master, skipped, last })
    }
}

/// Equal for tensors that share their memory, as candle shares it: one storage behind one lock.
pub(crate) fn storage_address(storage: &Storage) -> usize {
    std::ptr::from_ref(storage).addr()
}
