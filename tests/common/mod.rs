//! What the tests share: tensors of any dtype, and what goes by formulas in f64.
#![allow(dead_code)] // Each test file uses its part.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod suite;
pub mod training;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use approx::abs_diff_eq;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{Init, Optimizer, VarMap};
pub use candle_srkl::numerics::{CHUNK, LANES, STRIP};
use candle_srkl::{Curvature, DEFAULT_GROUP, Srkl};
use half::{bf16, f16};
use rayon::{ThreadPool, ThreadPoolBuilder};
use safetensors::SafeTensors;

pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

/// Elements that a thread takes at once: the CPU path's.
pub const PIECE: usize = 8 * CHUNK;

/// Several pieces, with a rest that is no whole number of chunks.
pub const LARGE: usize = 4 * PIECE + CHUNK + 1;

/// Sizes around strips, lanes, halves of chunks, chunks and pieces.
#[rustfmt::skip]
pub const SIZES: [usize; 20] = [
    0, 1, 3, 7,
    STRIP - 1, STRIP, STRIP + 1, 2 * STRIP,
    LANES - 1, LANES, LANES + 1,
    CHUNK / 2 - 1, CHUNK / 2, CHUNK / 2 + 1,
    CHUNK - 1, CHUNK, CHUNK + 1,
    PIECE - 1, PIECE, PIECE + 1,
];

/// A variable that holds `values` rounded to `dtype`.
pub fn var(values: &[f64], dtype: DType) -> Result<Var> {
    Var::from_tensor(&tensor(values, dtype)?)
}

pub fn tensor(values: &[f64], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(dtype)
}

/// The values of a tensor of any float dtype, exactly.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// The values of all of `vars`, as one vector.
pub fn all_values(vars: &[Var]) -> Result<Vec<f64>> {
    let each: Vec<Vec<f64>> = vars.iter().map(|var| values(var)).collect::<Result<_>>()?;
    Ok(each.concat())
}

/// What a step goes by and writes: the masters of the parameters that have some, the others themselves. `vars` is the
/// list that `opt` was made of.
pub fn stored(vars: &[Var], opt: &Srkl) -> Result<Vec<Vec<f64>>> {
    let of = |(i, var): (usize, &Var)| match opt.master(&i.to_string())? {
        Some(master) => Ok(master.into_iter().map(f64::from).collect()),
        None => values(var),
    };
    vars.iter().enumerate().map(of).collect()
}

/// The bits of a tensor, so that -0 is not +0 and a NaN is itself.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let tensor = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => tensor.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        DType::F32 => tensor.to_vec1::<f32>()?.into_iter().map(|x| x.to_bits() as u64).collect(),
        DType::BF16 => tensor.to_vec1::<bf16>()?.into_iter().map(|x| x.to_bits() as u64).collect(),
        DType::F16 => tensor.to_vec1::<f16>()?.into_iter().map(|x| x.to_bits() as u64).collect(),
        dtype => panic!("no bits of {dtype:?}"),
    })
}

pub fn master_bits(opt: &Srkl, name: &str) -> Result<Option<Vec<u32>>> {
    Ok(opt.master(name)?.map(|master| master.into_iter().map(f32::to_bits).collect()))
}

/// The bits of a parameter and of its masters.
pub type Bits = (Vec<u64>, Option<Vec<u32>>);

/// Those of each parameter. `vars` is the list that `opt` was made of.
pub fn all_bits(vars: &[Var], opt: &Srkl) -> Result<Vec<Bits>> {
    let of = |(i, var): (usize, &Var)| Ok((bits(var)?, master_bits(opt, &i.to_string())?));
    vars.iter().enumerate().map(of).collect()
}

/// Half the distance between neighbours of `x` in `dtype`, at least that of the smallest normal.
pub fn half_ulp(x: f64, dtype: DType) -> f64 {
    let (digits, min) = match dtype {
        DType::F64 => (52, f64::MIN_POSITIVE),
        DType::F32 => (23, f32::MIN_POSITIVE as f64),
        DType::BF16 => (7, bf16::MIN_POSITIVE.to_f64()),
        DType::F16 => (10, f16::MIN_POSITIVE.to_f64()),
        dtype => panic!("no ulp of {dtype:?}"),
    };
    2f64.powi(x.abs().max(min).log2().floor() as i32 - digits - 1)
}

pub fn grads<'a>(pairs: impl IntoIterator<Item = (&'a Var, Tensor)>) -> GradStore {
    let mut grads = GradStore::default();
    for (var, grad) in pairs {
        grads.insert(var, grad);
    }
    grads
}

/// Normal numbers times `scale`; `salt` makes lists differ.
pub fn noise(n: usize, scale: f64, salt: u64) -> Vec<f64> {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    let mut rng = StdRng::seed_from_u64(salt);
    // Twelve uniform numbers make a normal one, nearly.
    (0..n).map(|_| ((0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.) * scale).collect()
}

/// A matrix of [`noise`].
pub fn noisy_matrix(
    (rows, columns): (usize, usize),
    scale: f64,
    salt: u64,
    dtype: DType,
) -> Result<Tensor> {
    tensor(&noise(rows * columns, scale, salt), dtype)?.reshape((rows, columns))
}

/// Variables of these sizes, of [`noise`] that differs from one to the next.
pub fn noisy_vars(sizes: &[usize], scale: f64, dtype: DType) -> Result<Vec<Var>> {
    let of = |(i, &n): (usize, &usize)| var(&noise(n, scale, i as u64), dtype);
    sizes.iter().enumerate().map(of).collect()
}

/// `||g * g||_2`, as it is defined.
pub fn curvature(g: &[f64]) -> f64 {
    // By the largest element, so that nothing overflows.
    let max = g.iter().fold(0f64, |max, g| max.max(g.abs()));
    if max == 0. {
        return 0.;
    }
    max * max * sum(g.iter().map(|g| (g / max).powi(4))).sqrt()
}

pub fn norm(g: &[f64]) -> f64 {
    sum(g.iter().map(|g| g * g)).sqrt()
}

pub fn rms(x: &[f64]) -> f64 {
    norm(x) / (x.len() as f64).sqrt()
}

/// Kahan's sum: right to the last digits for any number of positive terms.
fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0., 0.);
    for term in terms {
        let term = term - lost;
        let next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    }
    sum
}

/// One step of a loop of one's own: `gradient`, of the same batch each time it is called, is asked for
/// a second time where the step measures.
pub fn measured_step(opt: &mut Srkl, gradient: impl Fn() -> Result<GradStore>) -> Result<()> {
    let perturbs = opt
        .params(DEFAULT_GROUP)
        .is_some_and(|params| matches!(params.curvature, Curvature::Hutchinson(_)));
    let measures = opt.measuring();
    let grads = gradient()?;
    if measures && perturbs {
        let perturbed = opt.perturb(&grads)?;
        let again = gradient()?;
        perturbed.observe(&again)?;
    }
    opt.step(&grads)?;
    if measures && !perturbs {
        opt.observe(&gradient()?)?;
    }
    Ok(())
}

pub fn minus(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x - y).collect()
}

pub fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// A square matrix by its rows.
pub type Matrix = Vec<Vec<f64>>;

pub fn times(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| dot(row, x)).collect()
}

/// The norms of the rows.
pub fn row_norms(matrix: &Matrix) -> Vec<f64> {
    matrix.iter().map(|row| norm(row)).collect()
}

/// A symmetric matrix of these eigenvalues, its axes turned at random.
pub fn symmetric(eigenvalues: &[f64], salt: u64) -> Matrix {
    let n = eigenvalues.len();
    let mut axes: Matrix = vec![];
    for mut axis in noise(n * n, 1., salt).chunks(n).map(<[f64]>::to_vec) {
        // Gram and Schmidt, twice: the second time takes out what rounding left.
        for other in axes.iter().chain(&axes) {
            let along = dot(&axis, other);
            axis.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
        }
        let length = norm(&axis);
        axes.push(axis.iter().map(|x| x / length).collect());
    }
    let mut matrix = vec![vec![0.; n]; n];
    for (axis, eigenvalue) in axes.iter().zip(eigenvalues) {
        for i in 0..n {
            for j in 0..n {
                matrix[i][j] += eigenvalue * axis[i] * axis[j];
            }
        }
    }
    matrix
}

/// `w' A w / 2` of a symmetric matrix `A`, with `w` cut into tensors.
pub struct Quadratic {
    pub matrix: Matrix,
    pub vars: Vec<Var>,
}

impl Quadratic {
    /// Starting at `w`, in tensors of these sizes.
    pub fn new(matrix: Matrix, w: &[f64], sizes: &[usize], dtype: DType) -> Result<Self> {
        assert_eq!((sizes.iter().sum(), w.len()), (matrix.len(), matrix.len()));
        let mut rest = w;
        let mut cut = |&size: &usize| {
            let (own, others) = rest.split_at(size);
            rest = others;
            var(own, dtype)
        };
        let vars = sizes.iter().map(&mut cut).collect::<Result<_>>()?;
        Ok(Self { matrix, vars })
    }

    /// The numbers of each tensor's elements in `w`.
    pub fn places(&self) -> Vec<Range<usize>> {
        let mut start = 0;
        let place = |var: &Var| {
            let place = start..start + var.elem_count();
            start = place.end;
            place
        };
        self.vars.iter().map(place).collect()
    }

    pub fn w(&self) -> Result<Vec<f64>> {
        all_values(&self.vars)
    }

    pub fn set(&self, w: &[f64]) -> Result<()> {
        for (var, place) in self.vars.iter().zip(self.places()) {
            if !place.is_empty() {
                var.set(&tensor(&w[place], var.dtype())?)?;
            }
        }
        Ok(())
    }

    pub fn loss(&self) -> Result<f64> {
        let w = self.w()?;
        Ok(dot(&w, &times(&self.matrix, &w)) / 2.)
    }

    pub fn gradient(&self) -> Result<GradStore> {
        let g = times(&self.matrix, &self.w()?);
        let mut store = grads([]);
        for (var, place) in self.vars.iter().zip(self.places()) {
            store.insert(var, tensor(&g[place], var.dtype())?);
        }
        Ok(store)
    }

    pub fn step(&self, opt: &mut Srkl) -> Result<()> {
        measured_step(opt, || self.gradient())
    }
}

/// Within `relative` of `exact`. (`relative_eq` goes by the larger of the two, which allows more.)
pub fn close(got: f64, exact: f64, relative: f64) -> bool {
    abs_diff_eq!(got, exact, epsilon = relative * exact.abs())
}

#[track_caller]
pub fn assert_close(got: f64, exact: f64, relative: f64) {
    assert!(close(got, exact, relative), "{got}, not {exact}");
}

/// The message of an error that must come and must name all of `parts`.
#[track_caller]
pub fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("no error, expected one with {parts:?}"),
        Err(e) => e.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

pub fn pool(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new().num_threads(threads).build().map_err(Error::wrap)
}

/// What is in a checkpoint: its metadata, and the bytes of its tensors.
pub type Contents = (BTreeMap<String, String>, BTreeMap<String, Vec<u8>>);

pub fn contents(path: &Path) -> Result<Contents> {
    let bytes = std::fs::read(path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let metadata = header.metadata().clone().unwrap().into_iter().collect();
    let tensors = SafeTensors::deserialize(&bytes)?;
    let tensors = tensors.iter().map(|(name, tensor)| (name.to_string(), tensor.data().to_vec()));
    Ok((metadata, tensors.collect()))
}

/// What `opt` saves.
pub fn saved(opt: &mut Srkl) -> Result<Contents> {
    let file = tempfile::NamedTempFile::new()?;
    opt.save(file.path())?;
    contents(file.path())
}

/// The parameters of `model`: of every rank, and an empty one.
pub const NAMES: [(&str, &[usize]); 4] =
    [("layer.weight", &[70, 130]), ("layer.bias", &[70]), ("scalar", &[]), ("empty", &[0, 3])];

/// The same model every time.
pub fn model(dtype: DType) -> Result<VarMap> {
    let varmap = VarMap::new();
    for (salt, (name, shape)) in NAMES.iter().enumerate() {
        varmap.get(*shape, name, Init::Const(0.), dtype, &Device::Cpu)?;
        let n = shape.iter().product();
        let values = tensor(&noise(n, 1., salt as u64), dtype)?.reshape(*shape)?;
        if n > 0 {
            varmap.data().lock().unwrap()[*name].set(&values)?;
        }
    }
    Ok(varmap)
}

/// Runs ranks, and ends the process if they wait for each other for ever.
pub fn unless_they_wait<T>(run: impl FnOnce() -> T) -> T {
    let (ended, watched) = mpsc::channel::<()>();
    thread::spawn(move || {
        if watched.recv_timeout(Duration::from_secs(300)) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("the ranks wait for each other");
            std::process::abort();
        }
    });
    let result = run();
    drop(ended);
    result
}
