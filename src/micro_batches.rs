//! Sums of gradients over micro-batches, by a tree whose shape depends on their number alone.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor};

use crate::block::Block;

/// What a step goes by, of the gradients of several micro-batches: [`Srkl::set_reduction`](crate::Srkl::set_reduction).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reduction {
    /// Their mean, over the micro-batches of all ranks.
    #[default]
    Mean,
    /// Their sum: for losses that are divided by the number of all samples or tokens beforehand.
    Sum,
}

impl Reduction {
    /// What the sum over `count` micro-batches is divided by.
    pub(crate) fn divisor(self, count: u64) -> f64 {
        match self {
            Self::Mean => count as f64,
            Self::Sum => 1.,
        }
    }
}

/// Sums of gradients so far: complete trees over micro-batches, each of fewer than the one before it, as the digits of a binary
/// number.
#[derive(Debug, Default)]
pub(crate) struct Accumulated {
    pub count: u64,
    /// The height of each tree, and its sums in the order of blocks.
    trees: Vec<(u32, Vec<Option<Tensor>>)>,
}

impl Accumulated {
    /// Nothing has changed if an addition fails, for want of memory.
    pub fn push(&mut self, gradients: Vec<Option<Tensor>>) -> Result<()> {
        let (mut height, mut sums) = (0, gradients);
        let mut joined = 0;
        for (other, before) in self.trees.iter().rev() {
            if *other != height {
                break;
            }
            sums = add_all(before, sums)?;
            (height, joined) = (height + 1, joined + 1);
        }
        self.trees.truncate(self.trees.len() - joined);
        self.trees.push((height, sums));
        self.count += 1;
        Ok(())
    }

    pub fn total(&self, blocks: &[Block]) -> Result<GradStore> {
        let mut total: Option<Vec<Option<Tensor>>> = None;
        for (_, sums) in self.trees.iter().rev() {
            total = Some(match total {
                Some(total) => add_all(sums, total)?,
                None => sums.clone(),
            });
        }
        let mut grads = GradStore::default();
        for (block, sum) in blocks.iter().zip(total.unwrap_or_default()) {
            if let Some(sum) = sum {
                grads.insert_id(block.id, sum);
            }
        }
        Ok(grads)
    }
}

fn add_all(a: &[Option<Tensor>], b: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
    a.iter().zip(b).map(|(a, b)| add_present(a.clone(), b, add)).collect()
}

/// The gradients of a micro-batch, as they are added up. They are copied if their memory may be `reused`.
pub(crate) fn leaf(
    blocks: &[Block],
    grads: &GradStore,
    reused: bool,
) -> Result<Vec<Option<Tensor>>> {
    let gradient = |block: &Block| {
        let Some(gradient) = grads.get_id(block.id) else { return Ok(None) };
        block.check_gradient(gradient)?;
        let sum = sum_dtype(block.dtype, gradient.dtype());
        let same = reused && sum == gradient.dtype();
        let gradient = if same { gradient.copy()? } else { gradient.to_dtype(sum)? };
        Ok(Some(gradient.detach()))
    };
    blocks.iter().map(gradient).collect()
}

/// The dtype in which gradients of a parameter are added up.
pub(crate) fn sum_dtype(parameter: DType, gradient: DType) -> DType {
    if parameter == DType::F64 || gradient == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The sum of all that are there: of neighbours, then of neighbours among these sums, and so on; what has no neighbour is
/// taken along. So the sum of an aligned power of two of them is a node of the tree, and may have been computed before.
pub(crate) fn tree<T>(
    mut items: Vec<Option<T>>,
    add: impl Fn(T, T) -> Result<T>,
) -> Result<Option<T>> {
    while items.len() > 1 {
        let mut left = items.into_iter();
        let mut sums = vec![];
        while let Some(first) = left.next() {
            sums.push(match left.next() {
                Some(second) => add_present(first, second, &add)?,
                None => first,
            });
        }
        items = sums;
    }
    Ok(items.pop().flatten())
}

/// The sum of two; what is not there is not a 0, which would turn -0 into +0.
fn add_present<T>(
    a: Option<T>,
    b: Option<T>,
    add: impl Fn(T, T) -> Result<T>,
) -> Result<Option<T>> {
    match (a, b) {
        (Some(a), Some(b)) => add(a, b).map(Some),
        (a, b) => Ok(a.or(b)),
    }
}

/// The sum of two tensors, in the wider of their dtypes.
pub(crate) fn add(a: Tensor, b: Tensor) -> Result<Tensor> {
    if a.dtype() == b.dtype() {
        return a + b;
    }
    a.to_dtype(DType::F64)? + b.to_dtype(DType::F64)?
}
