//! Sums of gradients over micro-batches, by a tree whose shape depends on their number alone.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, TensorId};

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

/// Gradients of a micro-batch, or sums of some, by parameter.
pub(crate) type Gradients = HashMap<TensorId, Tensor>;

/// Sums of gradients so far: complete trees over micro-batches, each of fewer than the one before it, as the digits of a binary
/// number.
#[derive(Debug, Default)]
pub(crate) struct Accumulated {
    pub count: u64,
    /// The height of each tree, and its sums.
    trees: Vec<(u32, Gradients)>,
}

impl Accumulated {
    /// Nothing has changed if an addition fails, for want of memory.
    pub fn push(&mut self, gradients: Gradients) -> Result<()> {
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

    pub fn total(&self) -> Result<GradStore> {
        let mut total = Gradients::new();
        for (_, sums) in self.trees.iter().rev() {
            total = add_all(sums, total)?;
        }
        let mut grads = GradStore::default();
        total.into_iter().for_each(|(id, sum)| _ = grads.insert_id(id, sum));
        Ok(grads)
    }
}

/// What is in one alone is taken along: it is no 0, which would turn -0 into +0.
fn add_all(a: &Gradients, mut b: Gradients) -> Result<Gradients> {
    for (id, a) in a {
        let sum = match b.remove(id) {
            Some(b) => add(a.clone(), b)?,
            None => a.clone(),
        };
        b.insert(*id, sum);
    }
    Ok(b)
}

/// The gradients of a micro-batch, as they are added up. They are copied if their memory may be `reused`.
pub(crate) fn leaf(blocks: &[Block], grads: &GradStore, reused: bool) -> Result<Gradients> {
    let given = blocks.iter().filter_map(|block| Some((block, grads.get_id(block.id)?)));
    let gradient = |(block, gradient): (&Block, &Tensor)| {
        block.check_gradient(gradient)?;
        let sum = sum_dtype(block.dtype, gradient.dtype());
        let same = reused && sum == gradient.dtype();
        let gradient = if same { gradient.copy()? } else { gradient.to_dtype(sum)? };
        Ok((block.id, gradient.detach()))
    };
    given.map(gradient).collect()
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
