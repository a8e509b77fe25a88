//! The state that is kept for a parameter: where, and in which format.

use std::borrow::Cow;
use std::fmt::Debug;
use std::mem::discriminant;
use std::ops::Range;

use candle_core::backend::{BackendDevice, BackendStorage};
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CpuStorage, DType, Device, Result, Storage, Var, bail};
use half::bf16;
use safetensors::Dtype;

use crate::compact::{self, UNIT};
use crate::params::{AverageFormat, Curvature, Direction, MasterWeights, ParamsSrkl, StateFormat};

/// The state of a block: for each kind that its settings need, one number per element.
#[derive(Default)]
pub(crate) struct State {
    /// Masters of a parameter of 16 bits.
    pub master: Option<Slot>,
    /// The first moment, of all directions but [`Direction::Gradient`].
    pub m: Option<Slot>,
    /// The second moment of [`Direction::Adam`] and its kind.
    pub v: Option<Slot>,
    /// The largest so far, of [`Direction::AmsGrad`].
    pub v_max: Option<Slot>,
    /// The average of the parameter.
    pub average: Option<Slot>,
    /// The squared row norms of [`Curvature::Hutchinson`].
    pub q: Option<Slot>,
}

/// The names of a block's state, as [`State::named`] and checkpoints have them.
pub(crate) const STATE: [&str; 6] = ["master", "m", "v", "v_max", "average", "q"];

/// Parameters of fewer elements keep their moments as they are computed with.
const LEAST_COMPACT: usize = 4096;

/// So many numbers of 16 bits take 16 bytes.
const ALIGNED: usize = 8;

/// How many elements of a parameter are compared with their masters before a step.
pub(crate) const MASTER_SAMPLES: usize = 32;

/// How the numbers of a kind of state are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    F64,
    /// Moments of 8 bits, in units of 256: see [`compact`]. The codes, filled up to whole units, and behind them a byte
    /// for the exponent of each unit.
    Compact,
    /// The 16 bits that a bf16 parameter lacks to its master. Behind them are the parameter's bits at
    /// [`Samples`](crate::backend::cpu::access::Samples), by which one that was overwritten is noticed.
    Split,
    BF16,
}

/// The format of the moments and averages of this name, and of `q`, for a parameter of `n` elements.
fn format_of(params: &ParamsSrkl, name: &str, dtype: DType, n: usize) -> Format {
    match (name, dtype) {
        (_, DType::F64) => Format::F64,
        ("m" | "v", _) if params.state == StateFormat::Compact && n >= LEAST_COMPACT => {
            Format::Compact
        }
        ("average", _) if params.average_format == AverageFormat::BF16 => Format::BF16,
        _ => Format::F32,
    }
}

/// The format of the masters of a parameter, if it should have some.
pub(crate) fn master_format(masters: MasterWeights, dtype: DType) -> Option<Format> {
    match (masters, dtype) {
        (MasterWeights::None, _) => None,
        (MasterWeights::Split, DType::BF16) => Some(Format::Split),
        (_, DType::BF16 | DType::F16) => Some(Format::F32),
        _ => None,
    }
}

/// Whether these settings ask for state of this name; masters depend on the parameter's dtype too.
fn has_state(params: &ParamsSrkl, name: &str) -> bool {
    match name {
        "m" => params.direction != Direction::Gradient,
        "v" => params.direction.has_second_moment(),
        "v_max" => matches!(params.direction, Direction::AmsGrad { .. }),
        "average" => params.average.is_some(),
        "q" => matches!(params.curvature, Curvature::Hutchinson(_)),
        _ => false,
    }
}

/// An error if the settings `new` of a group need other state than `built`, those that it was built with.
pub(crate) fn refuse_other_state(group: &str, built: &ParamsSrkl, new: &ParamsSrkl) -> Result<()> {
    for name in STATE {
        let (had, has) = (has_state(built, name), has_state(new, name));
        if had != has {
            let expected = if had { "settings that keep" } else { "settings without" };
            bail!(
                "group `{group}`: expected {expected} the state `{name}`, as it was built, got {new:?}"
            )
        }
    }
    // The same name, with numbers that mean something else.
    let other_kind = |field: &str, built: &dyn Debug, new: &dyn Debug| -> Result<()> {
        bail!(
            "`{field}` of group `{group}`: expected one of the kind of {built:?}, as it was built, got {new:?}"
        )
    };
    if discriminant(&built.direction) != discriminant(&new.direction) {
        other_kind("direction", &built.direction, &new.direction)?;
    }
    if let (Direction::Muon { bf16: had, .. }, Direction::Muon { bf16: has, .. }) =
        (built.direction, new.direction)
        && had != has
    {
        bail!(
            "`bf16` (Direction::Muon) of group `{group}`: expected {had}, as it was built, got {has}"
        )
    }
    if built.average.as_ref().map(discriminant) != new.average.as_ref().map(discriminant) {
        other_kind("average", &built.average, &new.average)?;
    }
    let other = |field: &str, built: &dyn Debug, new: &dyn Debug| -> Result<()> {
        bail!("`{field}` of group `{group}`: expected {built:?} as it was built, got {new:?}")
    };
    if built.master_weights != new.master_weights {
        other("master_weights", &built.master_weights, &new.master_weights)?;
    }
    if built.state != new.state {
        other("state", &built.state, &new.state)?;
    }
    // Which kernel steps are launched by, in captures too.
    if built.rounding != new.rounding {
        other("rounding", &built.rounding, &new.rounding)?;
    }
    if built.average_format != new.average_format {
        other("average_format", &built.average_format, &new.average_format)?;
    }
    Ok(())
}

/// The bytes of a parameter and of its state.
pub(crate) fn bytes(params: &ParamsSrkl, var: &Var) -> usize {
    let (n, dtype) = (var.elem_count(), var.dtype());
    let size = |format: Format| format.len(n) * format.dtype().size_in_bytes();
    let state = STATE.iter().filter(|name| has_state(params, name));
    let state: usize = state.map(|name| size(format_of(params, name, dtype, n))).sum();
    let master = master_format(params.master_weights, dtype).map_or(0, size);
    n * dtype.size_in_bytes() + state + master
}

impl State {
    /// All zeros, for `n` elements of `var`, and without masters: see `backend/masters.rs`.
    pub fn new(params: &ParamsSrkl, var: &Var, n: usize) -> Result<Self> {
        let format = |name| format_of(params, name, var.dtype(), var.elem_count());
        let zeros =
            |name| has_state(params, name).then(|| Slot::zeros(var, n, format(name))).transpose();
        Ok(Self {
            master: None,
            m: zeros("m")?,
            v: zeros("v")?,
            v_max: zeros("v_max")?,
            average: zeros("average")?,
            q: zeros("q")?,
        })
    }

    /// Whether some of it is packed.
    pub fn is_packed(&self) -> bool {
        self.named().any(|(_, slot)| !matches!(slot.format, Format::F32 | Format::F64))
    }

    /// The kinds of state that exist, by name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Slot)> {
        let Self { master, m, v, v_max, average, q } = self;
        let all = STATE.into_iter().zip([master, m, v, v_max, average, q]);
        all.filter_map(|(name, slot)| Some((name, slot.as_ref()?)))
    }

    pub fn named_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Slot)> {
        let Self { master, m, v, v_max, average, q } = self;
        let all = STATE.into_iter().zip([master, m, v, v_max, average, q]);
        all.filter_map(|(name, slot)| Some((name, slot.as_mut()?)))
    }
}

/// One kind of state of one block, on the parameter's device: for each element a number, in some format.
///
/// The rest of the crate uses a format through the memory that it takes ([`Slot::storage`]) and the tensors that a
/// checkpoint saves it as ([`Format::tensors`]). Its numbers are loaded and stored in `backend/cpu/rows.rs` and
/// `kernels/state.cuh`.
pub(crate) struct Slot {
    format: Format,
    /// On a device at least one element long: 0 bytes can't be allocated there.
    storage: Storage,
    n: usize,
}

/// A tensor of a checkpoint that holds a kind of state, or a part of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SavedTensor {
    /// What is appended to the name of the state.
    pub suffix: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl SavedTensor {
    /// Its length.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A kind of state as a checkpoint has it.
#[derive(Clone)]
pub(crate) struct Saved {
    pub format: Format,
    /// The bytes of each of [`Format::tensors`], little-endian.
    pub parts: Vec<Vec<u8>>,
}

impl Format {
    /// Those that the state `name` of a parameter may have.
    pub fn of(name: &str, dtype: DType) -> &'static [Self] {
        match (name, dtype) {
            (_, DType::F64) => &[Self::F64],
            ("master", DType::BF16) => &[Self::F32, Self::Split],
            ("m" | "v", _) => &[Self::F32, Self::Compact],
            ("average", _) => &[Self::F32, Self::BF16],
            _ => &[Self::F32],
        }
    }

    /// How many numbers of [`Format::dtype`] it takes to keep `n`.
    fn len(self, n: usize) -> usize {
        match self {
            Self::F32 | Self::F64 | Self::BF16 => n,
            Self::Compact => n.next_multiple_of(UNIT) + n.div_ceil(UNIT),
            Self::Split => n.next_multiple_of(ALIGNED) + MASTER_SAMPLES,
        }
    }

    /// The remainders of a split master, and the samples of the parameter.
    pub fn split_parts(numbers: &mut [i16], n: usize) -> (&mut [i16], &mut [i16]) {
        let (rests, samples) = numbers.split_at_mut(n.next_multiple_of(ALIGNED));
        (&mut rests[..n], samples)
    }

    /// The samples of the parameter, of a split master.
    pub fn samples(numbers: &[i16], n: usize) -> &[i16] {
        &numbers[n.next_multiple_of(ALIGNED)..]
    }

    /// That of its storage.
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F64 => DType::F64,
            Self::Compact => DType::U8,
            Self::Split => DType::I16,
            Self::BF16 => DType::BF16,
        }
    }

    /// The tensors that a checkpoint saves the state `name` as, for a parameter of shape `dims`, in order.
    pub fn tensors(self, name: &str, dims: &[usize]) -> Vec<SavedTensor> {
        let numbers = |suffix, dtype| SavedTensor { suffix, dtype, shape: dims.to_vec() };
        match self {
            Self::F32 => vec![numbers("", Dtype::F32)],
            Self::F64 => vec![numbers("", Dtype::F64)],
            Self::BF16 => vec![numbers("", Dtype::BF16)],
            Self::Split => vec![numbers(".rest", Dtype::I16)],
            Self::Compact => {
                let units = dims.iter().product::<usize>().div_ceil(UNIT);
                let codes = if name == "m" { Dtype::I8 } else { Dtype::U8 };
                let shape = vec![units];
                vec![
                    numbers(".codes", codes),
                    SavedTensor { suffix: ".exponents", dtype: Dtype::U8, shape },
                ]
            }
        }
    }
}

impl Slot {
    /// `n` zeros, on the device of `var`.
    pub fn zeros(var: &Var, n: usize, format: Format) -> Result<Self> {
        let (len, dtype) = (format.len(n), format.dtype());
        let storage = match var.device() {
            Device::Cpu => Storage::Cpu(match dtype {
                DType::F64 => CpuStorage::F64(vec![0.; len]),
                DType::U8 => CpuStorage::U8(vec![0; len]),
                DType::I16 => CpuStorage::I16(vec![0; len]),
                DType::BF16 => CpuStorage::BF16(vec![bf16::ZERO; len]),
                _ => CpuStorage::F32(vec![0.; len]),
            }),
            Device::Cuda(device) => Storage::Cuda(device.zeros_impl(&len.max(1).into(), dtype)?),
            device => bail!("no state on {:?}", device.location()),
        };
        Ok(Self { format, storage, n })
    }

    /// f32 `values`, on the device of `var`.
    pub fn of_f32(var: &Var, values: Vec<f32>) -> Result<Self> {
        let mut slot = Self::zeros(var, values.len(), Format::F32)?;
        slot.write(CpuStorage::F32(values))?;
        Ok(slot)
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// What it is kept in, if that is on the CPU.
    pub fn cpu_mut(&mut self) -> Option<&mut CpuStorage> {
        match &mut self.storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    /// What it is kept in, on the CPU.
    pub fn to_cpu(&self) -> Result<Cow<'_, CpuStorage>> {
        Ok(match &self.storage {
            Storage::Cpu(storage) => Cow::Borrowed(storage),
            Storage::Cuda(storage) => Cow::Owned(storage.to_cpu_storage()?),
            Storage::Metal(storage) => Cow::Owned(storage.to_cpu_storage()?),
        })
    }

    /// Its numbers, which are f32.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match &*self.to_cpu()? {
            CpuStorage::F32(values) => Ok(values[..self.n].to_vec()),
            other => bail!("expected state of f32, got {:?}", other.dtype()),
        }
    }

    /// As a checkpoint has it.
    pub fn save(&self) -> Result<Saved> {
        fn bytes<T: Copy, const N: usize>(values: &[T], to_bytes: fn(T) -> [u8; N]) -> Vec<u8> {
            values.iter().flat_map(|x| to_bytes(*x)).collect()
        }
        let n = self.n;
        let parts = match &*self.to_cpu()? {
            CpuStorage::F32(values) => vec![bytes(&values[..n], f32::to_le_bytes)],
            CpuStorage::F64(values) => vec![bytes(&values[..n], f64::to_le_bytes)],
            CpuStorage::BF16(values) => vec![bytes(&values[..n], bf16::to_le_bytes)],
            CpuStorage::I16(rests) => vec![bytes(&rests[..n], i16::to_le_bytes)],
            CpuStorage::U8(bytes) => {
                let (codes, exponents) = bytes.split_at(n.next_multiple_of(UNIT));
                vec![codes[..n].to_vec(), exponents[..n.div_ceil(UNIT)].to_vec()]
            }
            other => bail!("no state is of {:?}", other.dtype()),
        };
        Ok(Saved { format: self.format, parts })
    }

    /// Replaces all of its numbers by those that were saved, in the same format. (The samples of a split master stay.)
    pub fn set(&mut self, saved: &Saved) -> Result<()> {
        fn numbers<T, const N: usize>(bytes: &[u8], from_bytes: fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks::<N>().0.iter().map(|b| from_bytes(*b)).collect()
        }
        let expected = self.format.tensors("", &[self.n]);
        if saved.format != self.format
            || !saved.parts.iter().map(Vec::len).eq(expected.iter().map(SavedTensor::bytes))
        {
            bail!(
                "expected state of {:?} for {} elements, got {:?}",
                self.format,
                self.n,
                saved.format
            )
        }
        let values = match (self.format, &saved.parts[..]) {
            (Format::F32, [bytes]) => CpuStorage::F32(numbers(bytes, f32::from_le_bytes)),
            (Format::F64, [bytes]) => CpuStorage::F64(numbers(bytes, f64::from_le_bytes)),
            (Format::BF16, [bytes]) => CpuStorage::BF16(numbers(bytes, bf16::from_le_bytes)),
            (Format::Split, [bytes]) => {
                let CpuStorage::I16(mut rests) = self.to_cpu()?.into_owned() else {
                    bail!("expected a split master")
                };
                let new = numbers(bytes, i16::from_le_bytes);
                rests[..new.len()].copy_from_slice(&new);
                CpuStorage::I16(rests)
            }
            (Format::Compact, [codes, exponents]) => {
                let mut bytes = codes.clone();
                bytes.resize(self.n.next_multiple_of(UNIT), 0);
                bytes.extend(exponents);
                CpuStorage::U8(bytes)
            }
            (_, parts) => bail!("{:?} does not have {} parts", self.format, parts.len()),
        };
        self.write(values)
    }

    /// Replaces what it is kept in; on a device in place, since the kernels' table has its address.
    pub fn write(&mut self, values: CpuStorage) -> Result<()> {
        if self.n == 0 {
            return Ok(());
        }
        match &mut self.storage {
            Storage::Cpu(storage) => *storage = values,
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => {
                let stream = storage.device.cuda_stream();
                match (&mut storage.slice, values) {
                    (CudaStorageSlice::F32(slot), CpuStorage::F32(values)) => {
                        stream.memcpy_htod(&values, slot).w()?
                    }
                    (CudaStorageSlice::F64(slot), CpuStorage::F64(values)) => {
                        stream.memcpy_htod(&values, slot).w()?
                    }
                    (CudaStorageSlice::BF16(slot), CpuStorage::BF16(values)) => {
                        stream.memcpy_htod(&values, slot).w()?
                    }
                    (CudaStorageSlice::I16(slot), CpuStorage::I16(values)) => {
                        stream.memcpy_htod(&values, slot).w()?
                    }
                    (CudaStorageSlice::U8(slot), CpuStorage::U8(values)) => {
                        stream.memcpy_htod(&values, slot).w()?
                    }
                    _ => bail!("expected values of the state's dtype"),
                }
            }
            _ => bail!("no state on this device"),
        }
        Ok(())
    }
}

/// What the numbers of a kind of state mean besides their own bits.
#[derive(Clone, Copy)]
pub(crate) struct Beside<'a> {
    /// The second moment as it is kept, if there is one: the unit of a compact first one.
    pub v: Option<&'a [f32]>,
    /// The parameter, if it is of bf16: the upper half of a split master.
    pub parameter: &'a [bf16],
}

impl Saved {
    /// Leaves some elements, which begin with a unit.
    pub fn cut(&mut self, range: Range<usize>) {
        let first = range.start / UNIT;
        let units = first..first + range.len().div_ceil(UNIT);
        let size = self.format.dtype().size_in_bytes();
        for (part, bytes) in self.parts.iter_mut().enumerate() {
            let cut = match (self.format, part) {
                (Format::Compact, 1) => units.clone(),
                _ => range.start * size..range.end * size,
            };
            *bytes = bytes[cut].to_vec();
        }
    }

    /// An error for what [`Slot::save`] does not write.
    pub fn check(&self, name: &str) -> Result<()> {
        fn first<const N: usize>(
            bytes: &[u8],
            read: impl Fn([u8; N]) -> f64,
            wrong: impl Fn(f64) -> bool,
        ) -> Option<f64> {
            bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).find(|x| wrong(*x))
        }
        let wrong = |x: f64| match name {
            // Averages of squares. Gradients may have left a NaN in `v`.
            "v" | "v_max" => x < 0.,
            "q" => x.is_nan() || x < 0.,
            _ => false,
        };
        let wrong = match (self.format, &self.parts[..]) {
            (Format::F32, [bytes]) => first(bytes, |b| f32::from_le_bytes(b).into(), wrong),
            (Format::F64, [bytes]) => first(bytes, f64::from_le_bytes, wrong),
            _ => None,
        };
        if let Some(wrong) = wrong {
            bail!("expected numbers that are 0 or above, got {wrong}")
        }
        if let (Format::Compact, [codes, exponents]) = (self.format, &self.parts[..]) {
            if name == "m" && codes.contains(&(i8::MIN as u8)) {
                bail!("expected codes from -127 to 127, got -128")
            }
            let most =
                if name == "v" { compact::MOST_V_EXPONENT } else { compact::MOST_M_EXPONENT };
            if let Some(exponent) = exponents.iter().find(|exponent| **exponent > most) {
                bail!("expected exponents up to {most}, got {exponent}")
            }
        }
        Ok(())
    }

    /// The numbers of the state `name`, in f32.
    pub fn to_f32(&self, name: &str, beside: Beside) -> Result<Vec<f32>> {
        fn numbers<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).collect()
        }
        Ok(match (self.format, &self.parts[..]) {
            (Format::F32, [bytes]) => numbers(bytes, f32::from_le_bytes),
            (Format::BF16, [bytes]) => numbers(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            (Format::Split, [bytes]) => {
                let rests = bytes.as_chunks().0.iter().map(|b| i16::from_le_bytes(*b));
                let both = beside.parameter.iter().zip(rests);
                both.map(|(p, rest)| compact::join(p.to_bits(), rest)).collect()
            }
            (Format::Compact, [codes, exponents]) => {
                let mut values = vec![0.; codes.len()];
                let units = values.chunks_mut(UNIT).zip(codes.chunks(UNIT)).zip(exponents);
                for (u, ((values, codes), exponent)) in units.enumerate() {
                    match name {
                        "v" => compact::decode_v_unit(codes, *exponent, values),
                        _ => compact::decode_m_unit(
                            codes,
                            *exponent,
                            compact::unit_of(beside.v, u),
                            values,
                        ),
                    }
                }
                values
            }
            (format, _) => bail!("`{name}` of {format:?} can't be converted to f32"),
        })
    }

    /// The state `name` of these numbers, rounded to nearest.
    pub fn of_f32(format: Format, name: &str, values: &[f32], beside: Beside) -> Result<Self> {
        let parts = match format {
            Format::F32 => vec![values.iter().flat_map(|x| x.to_le_bytes()).collect()],
            Format::BF16 => {
                vec![values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()]
            }
            Format::Split => {
                vec![values.iter().flat_map(|x| compact::split(*x).1.to_le_bytes()).collect()]
            }
            Format::Compact => {
                let mut codes = vec![0; values.len()];
                let units = values.chunks(UNIT).zip(codes.chunks_mut(UNIT)).enumerate();
                let encode = |(u, (values, codes)): (usize, (&[f32], &mut [u8]))| match name {
                    "v" => {
                        // Of no sign: the codes are those of numbers from +0 on.
                        let v: Vec<f32> = values.iter().map(|v| v.abs()).collect();
                        compact::encode_v_unit(&v, compact::Offsets::Nearest, codes)
                    }
                    _ => compact::encode_m_unit(values, compact::unit_of(beside.v, u), codes),
                };
                let exponents = units.map(encode).collect();
                vec![codes, exponents]
            }
            Format::F64 => bail!("`{name}`: state of f64 is not converted"),
        };
        Ok(Self { format, parts })
    }
}
