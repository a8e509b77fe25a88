//! The mathematics of the step, on the CPU.
//!
//! Top to bottom: the stages `statistics`, `decide` and `update`, each with the loop over elements
//! that it runs. The order of operations in this file is part of the contract in
//! [`numerics`](crate::numerics).

use std::cell::Cell;
use std::marker::PhantomData;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, Var, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::gradient::{FromGradient, Gradient, RowBuffer};
use super::simd::{Kernel, Simd};
use crate::block::{Block, Master};
use crate::numerics::{
    CHUNK, LANES, MIN_LANES, Real, Sums, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, pow2,
    scale_exponent, tree,
};
use crate::params::{NonFinite, ParamsSrkl, Scope};

/// Blocks up to this many elements are work for one thread, and a larger one is split into pieces
/// of this size: enough to outweigh the handing over, a whole number of chunks.
///
/// Pieces go to the threads of the pool that the step runs in, while the block's lock is held: see
/// [`Stages::spread`](super::stages::Stages) for why that must be the optimizer's own.
pub(crate) const PIECE: usize = 8 * CHUNK;

// ---------------------------------------------------------------------------------------------
// Stage 1: statistics

/// Working memory of one thread.
pub(crate) struct Scratch {
    row: RowBuffer,
    sum2: [f64; LANES],
    sum4: [f64; LANES],
}

impl Scratch {
    pub fn new() -> Box<Self> {
        Box::new(Self { row: RowBuffer::new(), sum2: [0.; LANES], sum4: [0.; LANES] })
    }
}

/// The sums over a block's gradient, computed in f64 or (not `wide`) f32; `sum2` only where `norm`
/// asks for it.
pub(crate) fn statistics(
    g: &Gradient,
    wide: bool,
    norm: bool,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    match (wide, norm) {
        (false, false) => block_sums::<f32, false>(g, simd, scratch),
        (false, true) => block_sums::<f32, true>(g, simd, scratch),
        (true, false) => block_sums::<f64, false>(g, simd, scratch),
        (true, true) => block_sums::<f64, true>(g, simd, scratch),
    }
}

fn block_sums<C: FromGradient, const NORM: bool>(
    g: &Gradient,
    simd: Simd,
    scratch: &mut Scratch,
) -> Sums {
    let chunk_sums = |scratch: &mut Scratch, chunk: usize| {
        let start = chunk * CHUNK;
        let len = CHUNK.min(g.len() - start);
        simd.run(ChunkSums::<C, NORM> { g, start, len, scratch, compute: PhantomData })
    };
    let chunks = g.len().div_ceil(CHUNK);
    let sums: Vec<Sums> = if g.len() <= PIECE {
        if chunks == 1 {
            return chunk_sums(scratch, 0);
        }
        (0..chunks).map(|chunk| chunk_sums(scratch, chunk)).collect()
    } else {
        (0..chunks)
            .into_par_iter()
            .with_min_len(PIECE / CHUNK)
            .map_init(Scratch::new, |scratch, chunk| chunk_sums(scratch, chunk))
            .collect()
    };
    Sums::fold(&sums)
}

/// The sums over elements `start..start + len` of a gradient, one chunk.
struct ChunkSums<'a, C, const NORM: bool> {
    g: &'a Gradient<'a>,
    start: usize,
    len: usize,
    scratch: &'a mut Scratch,
    compute: PhantomData<C>,
}

impl<C: FromGradient, const NORM: bool> Kernel for ChunkSums<'_, C, NORM> {
    type Output = Sums;

    #[inline(always)]
    fn run(self) -> Sums {
        let Self { g, start, len, scratch, .. } = self;
        let Scratch { row, sum2, sum4 } = scratch;
        let rows = || (0..len).step_by(LANES).map(|at| (start + at, LANES.min(len - at)));

        let mut exponent = 0;
        if C::SCALED {
            let mut max = 0f64;
            for (at, len) in rows() {
                for g in g.row::<C>(at, len, row) {
                    let magnitude = g.to_f64().abs();
                    if magnitude > max && magnitude < f64::INFINITY {
                        max = magnitude;
                    }
                }
            }
            exponent = scale_exponent(max);
        }
        let scale = pow2(-exponent);

        let width = len.clamp(MIN_LANES, LANES).next_power_of_two();
        let (sum2, sum4) = (&mut sum2[..width], &mut sum4[..width]);
        sum4.fill(0.);
        if NORM {
            sum2.fill(0.);
        }
        for (at, len) in rows() {
            let row = g.row::<C>(at, len, row);
            for ((g, sum2), sum4) in row.iter().zip(sum2.iter_mut()).zip(sum4.iter_mut()) {
                let g = if C::SCALED { g.to_f64() * scale } else { g.to_f64() };
                let q = g * g;
                if NORM {
                    *sum2 += q;
                }
                *sum4 = q.mul_add(q, *sum4);
            }
        }
        let sum2 = if NORM { tree(sum2) } else { 0. };
        Sums { sum2, sum4: tree(sum4), exponent }
    }
}

// ---------------------------------------------------------------------------------------------
// Stage 2: decide

/// What a step uses that is neither a setting of a group nor a gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepScalars {
    /// The schedule's multiplier `s`.
    pub schedule: f64,
    /// Gradients are divided by it first.
    pub grad_scale: f64,
}

/// The numbers of one block's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decision {
    /// The gradient enters as `c * g`: unscaled and clipped.
    pub c: f64,
    /// The curvature `H` of `c * g`; for [`Scope::Element`] that of the block, for its finiteness.
    pub curvature: f64,
    /// The brake `s * lr / (1 + beta * H)`; for [`Scope::Element`] unused.
    pub phi: f64,
    /// Whether everything that this block uses is finite.
    pub finite: bool,
}

/// `own` are the block's sums, `total` those over all blocks, where `params` use them.
pub(crate) fn decide(
    params: &ParamsSrkl,
    scalars: StepScalars,
    own: &Sums,
    total: &Sums,
) -> Decision {
    let mut c = 1. / scalars.grad_scale;
    if let Some(max_grad_norm) = params.max_grad_norm {
        let norm = total.norm(c);
        // A NaN norm makes `c` a NaN.
        let clip = if norm <= max_grad_norm { 1. } else { max_grad_norm / norm };
        c *= clip;
    }
    let sums = if params.scope == Scope::Global { total } else { own };
    let curvature = sums.curvature(c);
    let phi = brake(scalars.schedule * params.lr, params.beta_value(), curvature);
    let finite = own.sum4.is_finite() && curvature.is_finite() && c > 0.;
    Decision { c, curvature, phi, finite }
}

/// `phi = lr / (1 + beta * H)`, with the schedule in `lr`.
#[inline(always)]
pub(crate) fn brake(lr: f64, beta: f64, curvature: f64) -> f64 {
    lr / (1. + beta * curvature)
}

/// Whether `policy` lets a block with this decision be stepped.
pub(crate) fn may_step(decision: &Decision, policy: NonFinite) -> bool {
    decision.finite || policy == NonFinite::Propagate
}

// ---------------------------------------------------------------------------------------------
// Stage 3: update

/// The numbers of one block's update.
#[derive(Clone, Copy)]
struct Coefficients {
    c: f64,
    phi: f64,
    weight_decay: f64,
    /// For [`Scope::Element`]: `s * lr` and `beta`, from which each element makes its own brake.
    element: Option<(f64, f64)>,
}

/// Moves a block by its gradient, in place.
pub(crate) fn update(
    block: &mut Block,
    gradient: &Tensor,
    params: &ParamsSrkl,
    scalars: StepScalars,
    decision: &Decision,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<()> {
    if block.n == 0 {
        return Ok(()); // candle refuses to write to an empty tensor.
    }
    let (storage, layout) = gradient.storage_and_layout();
    let g = Gradient::new(&storage, layout)?;
    let coefficients = Coefficients {
        c: decision.c,
        phi: decision.phi,
        weight_decay: params.weight_decay,
        element: match params.scope {
            Scope::Element => Some((scalars.schedule * params.lr, params.beta_value())),
            Scope::Tensor | Scope::Global => None,
        },
    };
    let master = match &mut block.master {
        Some(Master::Cpu(master)) => Some(master.as_mut_slice()),
        _ => None,
    };
    with_storage_mut(&block.var, |storage| match storage {
        CpuStorage::F32(w) => block_update(w, None, &g, coefficients, simd, scratch),
        CpuStorage::F64(w) => block_update(w, None, &g, coefficients, simd, scratch),
        CpuStorage::BF16(w) => block_update(w, master, &g, coefficients, simd, scratch),
        CpuStorage::F16(w) => block_update(w, master, &g, coefficients, simd, scratch),
        _ => bail!("expected a parameter of f32, f64, bf16 or f16"),
    })
}

fn block_update<P: Parameter>(
    w: &mut [P],
    mut master: Option<&mut [P::Compute]>,
    g: &Gradient,
    coefficients: Coefficients,
    simd: Simd,
    scratch: &mut Scratch,
) -> Result<()> {
    if let Some(master) = &mut master
        && probes(w.len()).any(|i| !agree(w[i], master[i]))
    {
        // Overwritten as a whole, it seems, and old fractions of the masters are worth nothing.
        master.iter_mut().zip(w.iter()).for_each(|(master, w)| *master = w.widen());
    }
    let piece = |scratch: &mut Scratch, start, w, master| {
        simd.run(Update { start, w, master, g, coefficients, scratch });
    };
    if w.len() <= PIECE {
        piece(scratch, 0, w, master);
        return Ok(());
    }
    let pieces = w.par_chunks_mut(PIECE).enumerate();
    match master {
        Some(master) => pieces
            .zip(master.par_chunks_mut(PIECE))
            .for_each_init(Scratch::new, |scratch, ((index, w), master)| {
                piece(scratch, index * PIECE, w, Some(master))
            }),
        None => pieces.for_each_init(Scratch::new, |scratch, (index, w)| {
            piece(scratch, index * PIECE, w, None)
        }),
    }
    Ok(())
}

/// The update of elements `start..start + w.len()`.
struct Update<'a, P: Parameter> {
    start: usize,
    w: &'a mut [P],
    master: Option<&'a mut [P::Compute]>,
    g: &'a Gradient<'a>,
    coefficients: Coefficients,
    scratch: &'a mut Scratch,
}

impl<P: Parameter> Kernel for Update<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { start, w, mut master, g, coefficients, scratch } = self;
        let Coefficients { c, phi, weight_decay, element } = coefficients;
        let phi_c = P::Compute::from_f64(phi * c);
        let keep = P::Compute::from_f64(1. - phi * weight_decay);
        for (row, w) in w.chunks_mut(LANES).enumerate() {
            let at = row * LANES;
            let g = g.row(start + at, w.len(), &mut scratch.row);
            let master = master.as_deref_mut().map(|master| &mut master[at..at + w.len()]);
            match element {
                None => for_each(w, master, g, |w, g| descend(w, g, phi_c, keep)),
                Some((lr, beta)) => for_each(w, master, g, |w, g| {
                    let d = c * g.to_f64();
                    let phi = brake(lr, beta, d * d);
                    let phi_c = P::Compute::from_f64(phi * c);
                    let keep = P::Compute::from_f64(1. - phi * weight_decay);
                    descend(w, g, phi_c, keep)
                }),
            }
        }
    }
}

/// `w <- keep * w - phi_c * g`
#[inline(always)]
fn descend<C: Real>(w: C, g: C, phi_c: C, keep: C) -> C {
    g.mul_add(phi_c.neg(), keep.mul(w)).canonical()
}

/// Steps every element of a row in the compute type, and stores it as the parameter's.
#[inline(always)]
fn for_each<P: Parameter>(
    w: &mut [P],
    master: Option<&mut [P::Compute]>,
    g: &[P::Compute],
    step: impl Fn(P::Compute, P::Compute) -> P::Compute,
) {
    match master {
        Some(master) => {
            for ((w, master), g) in w.iter_mut().zip(master).zip(g) {
                *master = step(*master, *g);
                *w = P::narrow(*master);
            }
        }
        None => {
            for (w, g) in w.iter_mut().zip(g) {
                *w = P::narrow(step(w.widen(), *g));
            }
        }
    }
}

/// A parameter's dtype: how it meets its compute type.
pub(crate) trait Parameter: Copy + Send + Sync {
    type Compute: FromGradient;
    fn widen(self) -> Self::Compute;
    /// Rounded to nearest even.
    fn narrow(x: Self::Compute) -> Self;
    fn same_bits(self, other: Self) -> bool;
}

macro_rules! impl_parameter {
    ($t:ty, $compute:ty, $widen:expr, $narrow:expr) => {
        impl Parameter for $t {
            type Compute = $compute;
            #[inline(always)]
            fn widen(self) -> $compute {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(x: $compute) -> Self {
                $narrow(x)
            }
            #[inline(always)]
            fn same_bits(self, other: Self) -> bool {
                self.to_bits() == other.to_bits()
            }
        }
    };
}
impl_parameter!(f32, f32, |x| x, |x| x);
impl_parameter!(f64, f64, |x| x, |x| x);
impl_parameter!(bf16, f32, |x: bf16| bf16_to_f32(x.to_bits()), |x| {
    bf16::from_bits(f32_to_bf16(x))
});
impl_parameter!(f16, f32, |x: f16| f16_to_f32(x.to_bits()), |x| { f16::from_bits(f32_to_f16(x)) });

// ---------------------------------------------------------------------------------------------
// Master weights

/// How many elements of a block are compared with their masters before a step.
pub(crate) const PROBES: usize = 32;

/// The elements compared: evenly spaced, the first and the last among them.
fn probes(n: usize) -> impl Iterator<Item = usize> {
    let count = PROBES.min(n);
    (0..count).map(move |k| if count > 1 { k * (n - 1) / (count - 1) } else { 0 })
}

/// Whether a parameter is what its master rounds to.
#[inline(always)]
fn agree<P: Parameter>(w: P, master: P::Compute) -> bool {
    // Of NaN there are many, of which a master rounds to one.
    P::narrow(master).same_bits(w) || master.is_nan() && w.widen().is_nan()
}

/// Gives masters that don't agree with their parameter its value. Returns whether there were any.
fn reconcile<P: Parameter>(w: &[P], master: &mut [P::Compute]) -> bool {
    let mut any = false;
    for (w, master) in w.iter().zip(master) {
        if !agree(*w, *master) {
            (*master, any) = (w.widen(), true);
        }
    }
    any
}

/// Brings `master` to a parameter that somebody else has written. Returns whether anything changed.
pub(crate) fn sync_master(var: &Tensor, master: &mut [f32]) -> Result<bool> {
    let (storage, _) = var.storage_and_layout();
    Ok(match cpu_storage(&storage)? {
        CpuStorage::BF16(w) => reconcile(w, master),
        CpuStorage::F16(w) => reconcile(w, master),
        _ => bail!("expected a parameter of bf16 or f16"),
    })
}

/// The masters of a bf16 or f16 parameter: its values.
pub(crate) fn new_master(var: &Tensor) -> Result<Vec<f32>> {
    // A NaN agrees with nothing but a NaN, so all elements are set.
    let mut master = vec![f32::NAN; var.elem_count()];
    sync_master(var, &mut master)?;
    Ok(master)
}

/// The first element of a parameter that is not what `master` rounds to.
pub(crate) fn first_disagreement(var: &Tensor, master: &[f32]) -> Result<Option<usize>> {
    fn first<P: Parameter<Compute = f32>>(w: &[P], master: &[f32]) -> Option<usize> {
        w.iter().zip(master).position(|(w, master)| !agree(*w, *master))
    }
    let (storage, _) = var.storage_and_layout();
    Ok(match cpu_storage(&storage)? {
        CpuStorage::BF16(w) => first(w, master),
        CpuStorage::F16(w) => first(w, master),
        _ => bail!("expected a parameter of bf16 or f16"),
    })
}

// ---------------------------------------------------------------------------------------------
// Access to tensors

/// # Errors
///
/// A storage that is not in CPU memory.
fn cpu_storage(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("expected a tensor on the CPU"),
    }
}

/// Runs `f` on the memory of a variable. (A variable is contiguous and starts at offset 0: candle
/// makes it from a copy.)
fn with_storage_mut<F: FnOnce(&mut CpuStorage) -> Result<()>>(var: &Var, f: F) -> Result<()> {
    struct Op<F>(Cell<Option<F>>);
    impl<F: FnOnce(&mut CpuStorage) -> Result<()>> InplaceOp1 for Op<F> {
        fn name(&self) -> &'static str {
            "srkl-update"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            self.0.take().map_or(Ok(()), |f| f(storage))
        }
    }
    var.inplace_op1(&Op(Cell::new(Some(f))))
}
