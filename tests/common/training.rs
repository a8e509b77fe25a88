//! A training that meets whatever a step can meet, on any devices, and all that it leaves behind.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{Collective, Curvature, OnDevice, ParamsSrkl, Srkl};

use super::{FLOATS, bits, contents, grads, tensor};

/// Steps of a training.
pub const STEPS: u64 = 6;

/// The parameters that something is done with.
const FROZEN: usize = 4;
const NOT_FINITE: usize = 5;
const ZERO_GRADIENT: usize = 6;
const NOT_FINITE_AGAIN: usize = 7;
const OVERWRITTEN: usize = 8;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Parameters, perturbed and averaged ones too.
    Parameters,
    /// The tensors of a checkpoint: moments, masters, averages.
    State,
    /// Counters, telemetry, measurements.
    Telemetry,
    /// What else is in a checkpoint, as text: of one version of its format.
    Metadata,
}

/// Numbers that a training left, and where.
#[derive(Debug, PartialEq)]
pub struct Left {
    pub kind: Kind,
    pub place: String,
    pub bits: Vec<u64>,
}

/// A random number of this name and place, from 0 to 2^64 - 1: the same on every machine, whatever the version of any
/// package (splitmix64).
fn random(salt: u64, i: u64) -> u64 {
    let mut x = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i.wrapping_mul(0xd1b5_4a32_d192_ed03);
    for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ (x >> 30)).wrapping_mul(multiplier);
    }
    x ^ (x >> 31)
}

/// Numbers between -1 and 1, times `scale`, of as many digits as f64 has: else no order of a sum of their squares would
/// show.
fn uniform(n: usize, scale: f64, salt: u64) -> Vec<f64> {
    let number = |i| (random(salt, i) >> 11) as f64 / (1u64 << 52) as f64 - 1.;
    (0..n as u64).map(|i| number(i) * scale).collect()
}

/// `values` as a user may insert them: here and there misaligned or strided.
fn laid_out(values: &[f64], dtype: DType, layout: u64, device: &Device) -> Result<Tensor> {
    let n = values.len();
    match layout % 4 {
        0 => {
            let offset = 1 + (layout / 4 % 8) as usize;
            let padded = [&vec![0.5; offset][..], values].concat();
            tensor(&padded, dtype)?.to_device(device)?.narrow(0, offset, n)
        }
        1 => {
            let pairs: Vec<f64> = values.iter().flat_map(|x| [0.5, *x]).collect();
            let pairs = tensor(&pairs, dtype)?.to_device(device)?.reshape((n, 2))?;
            pairs.narrow(1, 1, 1)?.squeeze(1)
        }
        _ => tensor(values, dtype)?.to_device(device),
    }
}

/// The two gradients of a step for a parameter of `n` elements; either may be missing.
fn gradients(
    n: usize,
    dtype: DType,
    (step, i, micro_batch): (u64, usize, u64),
    salt: u64,
    device: &Device,
) -> Result<[Option<Tensor>; 2]> {
    let salt = salt + 1000 * step + 10 * i as u64 + 1_000_003 * micro_batch;
    let choice = random(salt, 1 << 40);
    let dtype = if choice % 10 < 3 { FLOATS[(choice / 16 % 4) as usize] } else { dtype };
    if (choice / 64).is_multiple_of(8) {
        return Ok([None, None]);
    }
    let mut first = uniform(n, 1., salt);
    let change = uniform(n, 0.2, salt + 1);
    let mut second: Vec<f64> = first.iter().zip(change).map(|(g, change)| g + change).collect();
    // Not finite at the first, a middle or the last element; 0 altogether.
    let places = [0, n / 2, n - 1];
    // Of several micro-batches only in one.
    match (step, i) {
        _ if ![0, 5].contains(&micro_batch) => {}
        (1, NOT_FINITE) => first[places[(choice % 3) as usize]] = f64::NAN,
        (2, NOT_FINITE) => first[places[(choice % 3) as usize]] = f64::INFINITY,
        (3, NOT_FINITE_AGAIN) => second[places[(choice % 3) as usize]] = f64::NEG_INFINITY,
        (_, ZERO_GRADIENT) => first.fill(0.),
        _ => {}
    }
    let first = laid_out(&first, dtype, choice / 512, device)?;
    let again = (step + i as u64) % 5 != 2;
    let second = again.then(|| laid_out(&second, dtype, choice / 8192, device)).transpose()?;
    Ok([Some(first), second])
}

/// The part that a rank has of a training.
pub struct Share {
    /// Of all ranks. If it is 1, gradients are not accumulated.
    pub micro_batches: u64,
    /// This rank, if there are several.
    pub rank: Option<Rank>,
    pub bucket_bytes: usize,
    pub sharded: bool,
    /// Where checkpoints go, if there are several ranks: rank 0 writes them.
    pub folder: Option<PathBuf>,
}

/// A rank that may be put into several optimizers, one after the other.
pub type Rank = Arc<Mutex<Box<dyn Collective>>>;

impl Share {
    pub const ALL: Self =
        Self { micro_batches: 1, rank: None, bucket_bytes: 1 << 20, sharded: false, folder: None };

    /// Its micro-batches.
    fn own(&self) -> Range<u64> {
        let (rank, size) = self.rank.as_ref().map_or((0, 1), |rank| {
            let rank = rank.lock().unwrap();
            (rank.rank() as u64, rank.world_size() as u64)
        });
        let each = self.micro_batches / size;
        rank * each..(rank + 1) * each
    }
}

/// What an optimizer is given.
struct Shared(Rank);

impl Collective for Shared {
    fn rank(&self) -> usize {
        self.0.lock().unwrap().rank()
    }
    fn world_size(&self) -> usize {
        self.0.lock().unwrap().world_size()
    }
    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        self.0.lock().unwrap().all_to_all(from, parts, to)
    }
    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        self.0.lock().unwrap().all_gather(whole, parts)
    }
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.lock().unwrap().exchange(own)
    }
    fn abort(&mut self, why: &str) {
        self.0.lock().unwrap().abort(why);
    }
    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        let goes = self.0.lock().unwrap().on_device().is_some();
        goes.then_some(self)
    }
}

impl Shared {
    fn with_devices<T>(&self, f: impl FnOnce(&mut dyn OnDevice) -> T) -> T {
        f(self.0.lock().unwrap().on_device().expect("it goes from device to device"))
    }
}

impl OnDevice for Shared {
    fn device(&self) -> Device {
        self.with_devices(|devices| devices.device())
    }
    fn send_and_receive(
        &mut self,
        send: &[(usize, Tensor)],
        receive: &[(usize, Tensor)],
    ) -> Result<()> {
        self.with_devices(|devices| devices.send_and_receive(send, receive))
    }
    fn broadcast(&mut self, parts: &[(usize, Tensor)]) -> Result<()> {
        self.with_devices(|devices| devices.broadcast(parts))
    }
}

/// Trains vectors of these sizes: [`train_shapes`].
pub fn train(
    params: &ParamsSrkl,
    sizes: &[usize],
    seed: u64,
    devices: &[&Device],
) -> Result<Vec<Left>> {
    let shapes: Vec<Vec<usize>> = sizes.iter().map(|n| vec![*n]).collect();
    train_shapes(params, &shapes, seed, devices)
}

/// The same, without a share: all by itself.
pub fn train_shapes(
    params: &ParamsSrkl,
    shapes: &[Vec<usize>],
    seed: u64,
    devices: &[&Device],
) -> Result<Vec<Left>> {
    train_share(params, shapes, seed, devices, &Share::ALL)
}

/// The dtype of parameter `i` in the training of this seed.
pub fn dtype_of(i: usize, seed: u64) -> DType {
    FLOATS[(i + seed as usize) % 4]
}

/// Trains parameters of these shapes and of all dtypes, spread over `devices`, for [`STEPS`] steps: with three groups, of
/// which one is frozen; gradients missing, not finite, misaligned, strided, of other dtypes; a schedule that changes and
/// is 0 for a step; a gradient scale; a parameter that somebody overwrites; and a checkpoint from which it goes on.
pub fn train_share(
    params: &ParamsSrkl,
    shapes: &[Vec<usize>],
    seed: u64,
    devices: &[&Device],
    share: &Share,
) -> Result<Vec<Left>> {
    let on = |i: usize| devices[(i / 2) % devices.len()];
    let mut vars = vec![];
    for (i, shape) in shapes.iter().enumerate() {
        let value = uniform(shape.iter().product(), 1., seed + i as u64);
        let value = tensor(&value, dtype_of(i, seed))?.reshape(&shape[..])?;
        vars.push(Var::from_tensor(&value.to_device(on(i))?)?);
    }
    let build = || {
        let builder = Srkl::builder().default_group(params.clone());
        let builder = match &share.rank {
            Some(rank) => builder
                .collective(Shared(rank.clone()))
                .bucket_bytes(share.bucket_bytes)
                .sharded(share.sharded),
            None => builder,
        };
        builder
            .group("other", ParamsSrkl { weight_decay: 0.3, ..params.clone() }, |name, _| {
                name.len() > 1
            })
            .group("frozen", ParamsSrkl { lr: 0., ..params.clone() }, |name, _| {
                name == FROZEN.to_string()
            })
            .build(vars.iter().enumerate().map(|(i, v)| (i.to_string(), v.clone())))
    };
    let mut opt = build()?;
    let perturbs = matches!(params.curvature, Curvature::Hutchinson(_));
    let mut left = vec![];
    for step in 0..STEPS {
        // For each micro-batch.
        let (mut first, mut again) = (vec![], vec![]);
        for micro_batch in share.own() {
            let [mut of_first, mut of_again] = [grads([]), grads([])];
            for (i, var) in vars.iter().enumerate() {
                let place = (step, i, micro_batch);
                let [g, g2] = gradients(var.elem_count(), var.dtype(), place, seed, on(i))?;
                for (store, g) in [(&mut of_first, g), (&mut of_again, g2)] {
                    // A reshaped view is a copy, unless it is contiguous.
                    let g = g.map(|g| g.reshape(var.shape())).transpose()?;
                    g.map(|g| store.insert(var, g));
                }
            }
            first.push(of_first);
            again.push(of_again);
        }
        opt.record_norms(step % 2 == seed % 2);
        match step {
            1 => {
                opt.set_grad_scale(3.)?;
                opt.set_learning_rate(params.lr / 7.);
            }
            2 => {
                let own = tempfile::tempdir()?;
                let path = share.folder.as_deref().unwrap_or(own.path()).join("resumed");
                opt.save(&path)?;
                opt = build()?;
                opt.load(&path)?;
            }
            3 => {
                let var = &vars[OVERWRITTEN];
                let other = uniform(var.elem_count(), 2., seed);
                let other = tensor(&other, var.dtype())?.reshape(var.shape())?;
                var.set(&other.to_device(var.device())?)?;
            }
            // Neither moves nor measures along the step.
            4 => opt.set_learning_rate(0.),
            5 => opt.set_learning_rate(params.lr),
            _ => {}
        }
        let mut parameters = |when: &str| -> Result<()> {
            for (i, var) in vars.iter().enumerate() {
                let bits = bits(&var.to_device(&Device::Cpu)?)?;
                let place = format!("step {step}, {when}, parameter {i}");
                left.push(Left { kind: Kind::Parameters, place, bits });
            }
            Ok(())
        };
        let accumulates = share.micro_batches > 1;
        if accumulates {
            first.iter().try_for_each(|grads| opt.accumulate(grads))?;
        }
        let measures = opt.measuring();
        if measures && perturbs {
            if accumulates {
                let mut perturbed = opt.perturb_accumulated()?;
                parameters("perturbed")?;
                again.iter().try_for_each(|grads| perturbed.accumulate(grads))?;
                perturbed.observe_accumulated()?;
            } else {
                let perturbed = opt.perturb(&first[0])?;
                parameters("perturbed")?;
                perturbed.observe(&again[0])?;
            }
        }
        if accumulates {
            opt.step_accumulated()?
        } else {
            opt.step(&first[0])?
        }
        if measures && !perturbs {
            if accumulates {
                again.iter().try_for_each(|grads| opt.accumulate(grads))?;
                opt.observe_accumulated()?;
            } else {
                opt.observe(&again[0])?;
            }
        }
        if step == 3 {
            // What is told of the last step does not depend on it.
            opt.set_grad_scale(5.)?;
        }
        parameters("after it")?;
        if params.average.is_some() {
            {
                let _averaged = opt.swap_averaged()?;
                parameters("averaged")?;
            }
            parameters("swapped back")?;
        }
        telemetry(&opt, step, &mut left)?;
        state(&mut opt, step, share, &mut left)?;
    }
    Ok(left)
}

/// A NaN is a NaN, whatever its bits.
fn told(x: Option<f64>) -> [u64; 2] {
    x.map_or([0, 0], |x| [1, if x.is_nan() { 1 } else { x.to_bits() }])
}

fn telemetry(opt: &Srkl, step: u64, left: &mut Vec<Left>) -> Result<()> {
    let kind = Kind::Telemetry;
    let counters = vec![opt.steps()?, opt.skipped_steps()?];
    let counters = [counters, told(opt.grad_norm()?).to_vec()].concat();
    left.push(Left { kind, place: format!("step {step}, counters"), bits: counters });
    let m = opt.measurements()?;
    let counts = [m.taken, m.nonfinite, m.unmoved, m.uninformative, m.missing];
    let age = m.age.map(|age| age as f64);
    let numbers = [age, m.curvature, m.last, m.lowest, m.highest].map(told).concat();
    let bits = [&counts[..], &numbers].concat();
    left.push(Left { kind, place: format!("step {step}, measurements"), bits });
    for t in opt.telemetry()? {
        let age = t.estimate_age.map(|age| age as f64);
        let numbers = [t.phi, t.curvature, age, t.grad_norm, t.step_norm, t.param_norm];
        let bits = [numbers.map(told).concat(), vec![t.skipped]].concat();
        let place = format!("step {step}, telemetry of {} {:?} in {}", t.name, t.tied, t.group);
        left.push(Left { kind, place, bits });
    }
    Ok(())
}

fn state(opt: &mut Srkl, step: u64, share: &Share, left: &mut Vec<Left>) -> Result<()> {
    let own = tempfile::tempdir()?;
    let path = share.folder.as_deref().unwrap_or(own.path()).join("state");
    opt.save(&path)?;
    let (metadata, tensors) = contents(&path)?;
    for (key, value) in metadata {
        let bits = value.bytes().map(u64::from).collect();
        left.push(Left { kind: Kind::Metadata, place: format!("step {step}, {key}"), bits });
    }
    for (name, bytes) in tensors {
        let bits = bytes.into_iter().map(u64::from).collect();
        left.push(Left { kind: Kind::State, place: format!("step {step}, {name}"), bits });
    }
    Ok(())
}

/// That two trainings left the same, or the first place where they did not.
#[track_caller]
pub fn assert_same(a: &[Left], b: &[Left], context: &str) {
    for (a, b) in a.iter().zip(b) {
        assert_eq!((a.kind, &a.place), (b.kind, &b.place), "{context}");
        let differs = a.bits.iter().zip(&b.bits).position(|(a, b)| a != b);
        assert!(a == b, "{context}: {}, from element {differs:?}", a.place);
    }
    assert_eq!(a.len(), b.len(), "{context}");
    assert!(!a.is_empty(), "{context}: nothing to compare");
}
