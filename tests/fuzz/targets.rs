//! What must hold for any input, as functions of bytes: a fuzzer looks for bytes that make one panic.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, AverageFormat, Beta, Curvature, DEFAULT_GROUP, Direction, GradScaler,
    HutchinsonCurvature, LrSchedule, MasterWeights, Measure, NonFinite, ParamsSrkl, Repeatable,
    Rounding, Scope, Srkl, SrklState, StateFormat, StepCurvature,
};
use peak_alloc::PeakAlloc;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::common::*;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Choices, made by the bytes of an input: zeros where these end.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Below `n`, which is at most 65536.
    fn below(&mut self, n: usize) -> usize {
        let low = self.byte() as usize;
        if n <= 256 { low % n } else { (low + 256 * self.byte() as usize) % n }
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        first
    }

    /// From `10^low` to `10^high`.
    fn decades(&mut self, low: f64, high: f64) -> f64 {
        10f64.powf(low + (high - low) * self.below(65536) as f64 / 65536.)
    }
}

// The loader.

/// An optimizer after some steps, its parameters, and what it saves.
fn trained(choice: usize) -> Result<(Vec<Var>, Srkl)> {
    let step = |params| ParamsSrkl { lr: 0.1, ..params };
    let (dtype, sizes, params) = match choice {
        0 => (DType::BF16, [33, 1, 0], step(ParamsSrkl::braked_adam())),
        1 => (
            DType::F32,
            [5, 70, 2],
            ParamsSrkl { average: Some(Average::Polynomial(8.)), ..step(ParamsSrkl::hessian()) },
        ),
        2 => (
            DType::BF16,
            [4100, 3, 1],
            ParamsSrkl {
                state: StateFormat::Compact,
                master_weights: MasterWeights::Split,
                average: Some(Average::Exponential(0.9)),
                average_format: AverageFormat::BF16,
                ..step(ParamsSrkl::adamw(0.1))
            },
        ),
        3 => (DType::F16, [4, 4, 9], ParamsSrkl { trust: Some(0.1), ..ParamsSrkl::kinetic() }),
        4 => (DType::F64, [3, 3, 3], ParamsSrkl::muon(0.1)),
        _ => (
            DType::F32,
            [3, 40, 2],
            ParamsSrkl {
                direction: Direction::AmsGrad { beta1: 0.9, beta2: 0.99, eps: 1e-8 },
                ..ParamsSrkl::adamw(0.1)
            },
        ),
    };
    let vars = noisy_vars(&sizes, 0.5, dtype)?;
    let mut opt = match choice {
        // By position, with values of which two are the same.
        3 => {
            vars[1].set(&vars[0].as_tensor().copy()?)?;
            Srkl::new(vars.clone(), params)?
        }
        _ => {
            let named = vars.iter().zip(["w", "layer.b", "layer.weight"]);
            let named = named.map(|(var, name)| (name.to_string(), var.clone()));
            Srkl::builder().default_group(params).build(named)?
        }
    };
    if choice == 5 {
        opt.set_schedule(Some(LrSchedule::warmup(3).then(3, LrSchedule::cosine(9, 0.1))))?;
        opt.set_grad_scaler(Some(GradScaler { growth_interval: 3, ..GradScaler::default() }))?;
        opt.freeze(|name| name == "layer.b")?;
    }
    for salt in 0..2 {
        step_on(&mut opt, &vars, salt)?;
    }
    Ok((vars, opt))
}

/// A step by gradients of noise, and its measurement.
fn step_on(opt: &mut Srkl, vars: &[Var], salt: u64) -> Result<()> {
    let store = |salt: u64| -> Result<_> {
        let mut store = grads([]);
        for (i, var) in vars.iter().enumerate() {
            let g = noise(var.elem_count(), 0.1, 100 * salt + i as u64);
            store.insert(var, tensor(&g, var.dtype())?.reshape(var.shape())?);
        }
        Ok(store)
    };
    let perturbs = opt
        .params(DEFAULT_GROUP)
        .is_some_and(|params| matches!(params.curvature, Curvature::Hutchinson(_)));
    let measures = opt.measuring();
    let (first, again) = (store(salt)?, store(salt + 7)?);
    if measures && perturbs {
        opt.perturb(&first)?.observe(&again)?;
    }
    opt.step(&first)?;
    if measures && !perturbs {
        // A schedule of 0 measures nothing.
        if opt.learning_rate() > 0. { opt.observe(&again)? } else { opt.skip_measurement() }
    }
    Ok(())
}

/// A valid file, by its parts.
#[derive(Clone)]
struct Parts {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Self {
        let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
        let tensors = SafeTensors::deserialize(bytes).unwrap().tensors();
        let part = |(name, view): (String, TensorView)| {
            (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        let mut tensors: Vec<_> = tensors.into_iter().map(part).collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        Self { metadata: header.metadata().clone().unwrap().into_iter().collect(), tensors }
    }

    /// The file, or none for parts that do not go together.
    fn file(self) -> Option<Vec<u8>> {
        let names: BTreeSet<&String> = self.tensors.iter().map(|part| &part.0).collect();
        // What writes files panics on one name twice.
        if names.len() < self.tensors.len() {
            return None;
        }
        let views = self.tensors.iter().map(|(name, dtype, shape, data)| {
            Some((name, TensorView::new(*dtype, shape.clone(), data).ok()?))
        });
        let views = views.collect::<Option<Vec<_>>>()?;
        safetensors::serialize(views, Some(self.metadata.into_iter().collect())).ok()
    }

    /// Changes a field of the metadata, or a tensor.
    fn change(&mut self, choices: &mut Choices) {
        const WORDS: [&str; 18] = [
            "0",
            "1",
            "-1",
            "2",
            "0.5",
            "1.0",
            "NaN",
            "inf",
            "-inf",
            "1e308",
            "1e-320",
            "",
            " ",
            "18446744073709551615",
            "18446744073709551614",
            "9223372036854775807",
            "256",
            "1e19",
        ];
        let keys: Vec<String> = self.metadata.keys().cloned().collect();
        let key = choices.of(&keys);
        match choices.below(9) {
            // One number of several.
            0..4 => {
                let old = &self.metadata[&key];
                let mut numbers: Vec<&str> = old.split(' ').collect();
                let at = choices.below(numbers.len());
                numbers[at] = choices.of(&WORDS);
                let new = numbers.join(" ");
                self.metadata.insert(key, new);
            }
            4 => {
                let other = self.metadata[&choices.of(&keys)].clone();
                self.metadata.insert(key, other);
            }
            5 => _ = self.metadata.remove(&key),
            6 => {
                let n = choices.below(20);
                let text = String::from_utf8_lossy(choices.bytes(n)).into_owned();
                self.metadata.insert(key, text);
            }
            // As many keys as `save` never writes.
            7 => {
                let n = choices.below(65536);
                self.metadata.extend((0..n).map(|i| (format!("x{i}"), String::new())));
            }
            _ if self.tensors.is_empty() => {}
            _ => {
                let at = choices.below(self.tensors.len());
                let (name, dtype, shape, data) = &mut self.tensors[at];
                match choices.below(6) {
                    0..3 if !data.is_empty() => {
                        let i = choices.below(65536) % data.len();
                        data[i] = choices.byte();
                    }
                    0 => *name = choices.of(&["w.m", "w.v", "w.master", "w.m.codes", "x"]).into(),
                    1 => {
                        *dtype = choices.of(&[Dtype::F32, Dtype::F64, Dtype::I32, Dtype::F4]);
                        *shape = vec![data.len() * 8 / dtype.bitsize()];
                    }
                    2 | 3 => shape.push(1),
                    4 => {
                        let n = choices.below(4);
                        *shape = vec![0; n];
                        data.clear();
                    }
                    _ => _ = self.tensors.remove(at),
                }
            }
        }
    }
}

thread_local! {
    static FILES: [OnceCell<Vec<u8>>; 6] = Default::default();
}

/// What the optimizer of this number has saved.
fn valid_file(choice: usize) -> Vec<u8> {
    let make = || {
        let file = tempfile::NamedTempFile::new().unwrap();
        trained(choice).unwrap().1.save(file.path()).unwrap();
        // The same bytes every time.
        Parts::of(&fs::read(file.path()).unwrap()).file().unwrap()
    };
    FILES.with(|files| files[choice].get_or_init(make).clone())
}

/// Whether two values of a field say the same.
fn same_numbers(a: &str, b: &str) -> bool {
    let numbers = |text: &str| -> Option<Vec<u64>> {
        text.split(' ').map(|word| Some(word.parse::<f64>().ok()?.to_bits())).collect()
    };
    a == b || numbers(a).is_some_and(|a| numbers(b) == Some(a))
}

/// Loads the bytes as they are, or a valid file with changes. Nothing panics, memory is bounded by the file and the state, an
/// error changes nothing; what is loaded is what the file has, saves, loads again the same and can be stepped.
pub fn loader(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let choice = choices.byte();
    let (mode, choice) = (choice / 6 % 4, choice as usize % 6);
    let mut changed = None;
    let file = match mode {
        0 => choices.0.to_vec(),
        // The bytes themselves are changed, the header's length among them.
        1 => {
            let mut file = valid_file(choice);
            for _ in 0..1 + choices.below(4) {
                let at = choices.below(65536) % file.len();
                match choices.below(4) {
                    0 => file[at] = choices.byte(),
                    1 => file[at % 8] = choices.byte(),
                    2 => file.truncate(at.max(1)),
                    _ => file.extend(choices.bytes(9)),
                }
            }
            file
        }
        _ => {
            let mut parts = Parts::of(&valid_file(choice));
            for _ in 0..1 + choices.below(3) {
                parts.change(&mut choices);
            }
            let Some(file) = parts.clone().file() else { return };
            changed = Some(parts);
            file
        }
    };
    let place = tempfile::NamedTempFile::new().unwrap();
    fs::write(place.path(), &file).unwrap();
    in_part(&file, place.path(), choice);
    let (vars, mut opt) = trained(choice).unwrap();
    let before = saved(&mut opt).unwrap();
    let state: usize = before.1.values().map(Vec::len).sum();

    let used = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let loaded = opt.load(place.path());
    let most = 100_000 + 100 * file.len() + 50 * state;
    let more = ALLOCATOR.peak_usage().saturating_sub(used);
    assert!(more <= most, "{more} bytes to load a file of {}", file.len());

    let after = saved(&mut opt).unwrap();
    if let Err(e) = loaded {
        let message = e.to_string();
        assert!(message.contains(place.path().to_str().unwrap()), "{message}");
        assert!(before == after, "changed by a load that failed: {message}");
        // It still steps.
        return step_on(&mut opt, &vars, 3).unwrap();
    }
    if let Some(parts) = changed.filter(|parts| parts.metadata["version"] == "3") {
        // These follow from the optimizer that has loaded.
        let mut own = vec!["fingerprint.", "place.", "blind", "by_position"];
        // A scaler goes on by itself if the file has none.
        if !parts.metadata.contains_key("grad_scaler") {
            own.push("grad_scale");
        }
        for (key, was) in parts.metadata {
            let Some(is) = after.0.get(&key) else { continue };
            let same = same_numbers(&was, is) || own.iter().any(|own| key.starts_with(own));
            assert!(same, "`{key}` was {was:?}, and loaded it is {is:?}");
        }
        // (Of optimizers without names these are others'.)
        for (name, _, _, was) in parts.tensors.iter().filter(|_| choice != 3) {
            assert!(after.1.get(name).is_none_or(|is| is == was), "`{name}` is another");
        }
    }
    let (_, mut again) = trained(choice).unwrap();
    opt.save(place.path()).unwrap();
    again.load(place.path()).unwrap();
    assert!(saved(&mut again).unwrap() == after, "saved and loaded again it is another");
    step_on(&mut opt, &vars, 3).unwrap();
    opt.telemetry().unwrap();
    opt.measurements().unwrap();
    opt.save(place.path()).unwrap();
    opt.load(place.path()).unwrap();
}

/// Reads what it can of the bytes as a state in memory, and loads a part of the file.
fn in_part(file: &[u8], path: &Path, choice: usize) {
    let (vars, mut opt) = trained(choice).unwrap();
    if let Ok(state) = SrklState::from_safetensors(file) {
        let _ = state.tensors();
        for parameter in state.parameters() {
            for kind in ["m", "v", "v_max", "master", "average", "q"] {
                let _ = state.get(parameter, kind);
            }
        }
    }
    let before = saved(&mut opt).unwrap();
    match opt.load_matching(path) {
        Err(e) => {
            let after = saved(&mut opt).unwrap();
            assert!(before == after, "changed by a load in part that failed: {e}");
        }
        Ok(report) => {
            let names = report.taken.len() + report.missing.len() + report.mismatched.len();
            assert_eq!(names, vars.len());
            let after = saved(&mut opt).unwrap();
            for (name, _) in &report.mismatched {
                let own = after.1.iter().filter(|(key, _)| key.starts_with(&format!("{name}.")));
                own.for_each(|(key, is)| assert!(before.1[key] == *is, "{key} is not as it was"));
            }
        }
    }
    step_on(&mut opt, &vars, 3).unwrap();
}

// The builder.

const NUMBERS: [f64; 16] = [
    0.,
    1.,
    0.5,
    0.9,
    0.999,
    1e-8,
    0.125,
    8.,
    1e-3,
    -1.,
    f64::NAN,
    f64::INFINITY,
    1e-320,
    1e300,
    -0.,
    1e-50,
];

/// Settings in and out of range.
fn any_settings(choices: &mut Choices) -> ParamsSrkl {
    let preset = match choices.below(9) {
        0 => ParamsSrkl::reference(),
        1 => ParamsSrkl::braked_adam(),
        2 => ParamsSrkl::braked_adam_averaged(),
        3 => ParamsSrkl::braked_muon(),
        4 => ParamsSrkl::braked_muon_averaged(),
        5 => ParamsSrkl::kinetic(),
        6 => ParamsSrkl::hessian(),
        7 => ParamsSrkl::adamw(1e-3),
        _ => ParamsSrkl::muon(1e-3),
    };
    let mut params = preset;
    for _ in 0..choices.below(5) {
        let number = choices.of(&NUMBERS);
        let other = choices.of(&NUMBERS);
        match choices.below(21) {
            0 => params.lr = number,
            1 => params.beta = Beta::Fixed(number),
            2 => params.beta = Beta::Tied(number),
            3 => params.direction = Direction::Sgd { momentum: number, nesterov: other > 0. },
            4 => params.direction = Direction::Momentum { mu: number },
            5 => params.direction = Direction::Adam { beta1: number, beta2: other, eps: 1e-8 },
            6 => params.direction = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: number },
            7 => {
                let steps = choices.below(4) as u32;
                let nesterov = choices.one_in(2);
                params.direction = Direction::Muon { mu: number, nesterov, steps, bf16: true };
            }
            8 => params.curvature = Curvature::Step(StepCurvature { decay: number, noise: other }),
            9 => params.curvature = Curvature::Hutchinson(HutchinsonCurvature { decay: number }),
            10 => params.curvature = choices.of(&[Curvature::None, Curvature::GradSquare]),
            11 => {
                let count = |choices: &mut Choices| choices.of(&[0, 1, 2, 20, u64::MAX]);
                let (every, first) = (count(choices), count(choices));
                params.measure = Measure { every, first, delta: number, seed: choices.word() };
            }
            12 => {
                let mixed = Scope::Mixed(number);
                params.scope = choices.of(&[Scope::Tensor, Scope::Global, Scope::Element, mixed]);
            }
            13 => params.trust = Some(number),
            14 => params.weight_decay = number,
            15 => params.max_grad_norm = Some(number),
            16 => {
                let both = [Average::Exponential(number), Average::Polynomial(number)];
                params.average = Some(choices.of(&both));
            }
            17 => {
                let (beta1, beta2, eps) = (number, other, 1e-8);
                params.direction = choices.of(&[
                    Direction::NesterovAdam { beta1, beta2, eps },
                    Direction::AmsGrad { beta1, beta2, eps },
                    Direction::Lion { beta1, beta2 },
                ]);
            }
            18 => params.cautious = !params.cautious,
            19 => {
                params.state = choices.of(&[StateFormat::F32, StateFormat::Compact]);
                params.average_format = choices.of(&[AverageFormat::F32, AverageFormat::BF16]);
            }
            _ => {
                use MasterWeights::*;
                params.master_weights = choices.of(&[Auto, F32, Split, None]);
                params.rounding = choices.of(&[Rounding::Nearest, Rounding::Stochastic]);
                params.nonfinite = policy(choices);
            }
        }
    }
    params
}

fn policy(choices: &mut Choices) -> NonFinite {
    choices.of(&[NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate])
}

/// Of up to five dimensions and some thousand elements, of 0 at times.
fn any_shape(choices: &mut Choices) -> Shape {
    let mut left = 10_000;
    let mut dim = |_| {
        let dim = choices.of(&[0, 1, 2, 3, 7, 8, 12, 33, 70, 256, 4099, 9000]);
        let dim = if dim > left { 1 } else { dim };
        left /= dim.max(1);
        dim
    };
    // The number first.
    let rank = dim(0) % 6;
    Shape::from((0..rank).map(dim).collect::<Vec<usize>>())
}

/// Names, shapes, dtypes, groups and settings of any kind: the builder accepts or refuses them, settings out of range
/// always, and what it has accepted steps, saves and loads.
pub fn builder(bytes: &[u8]) {
    let choices = &mut Choices(bytes);
    const NAMES: [&str; 13] = [
        "",
        "w",
        "w.m",
        "attn.qkv.weight",
        "wte",
        "lm_head.weight",
        ".",
        "..weight",
        "weight",
        "\u{1f980}\0\"\\",
        "format",
        "__metadata__",
        "layer.0.up.weight",
    ];
    const DTYPES: [DType; 12] = [
        DType::F32,
        DType::BF16,
        DType::F16,
        DType::F64,
        DType::U8,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::F8E4M3,
        DType::F4,
        DType::F8E8M0,
    ];
    let mut named: Vec<(String, Var)> = vec![];
    for i in 0..choices.below(6) {
        let name = match choices.below(8) {
            0 => "x".repeat(choices.below(65536)),
            1 => choices.of(&NAMES).to_string(),
            _ => format!("{}{i}", choices.of(&NAMES)),
        };
        let shape = any_shape(choices);
        let n = if choices.one_in(4) { 12 } else { 4 };
        let dtype = DTYPES[choices.below(n)];
        match named.last() {
            Some((_, var)) if choices.one_in(20) => named.push((name, var.clone())),
            // (candle has no zeros of some dtypes.)
            _ => named.extend(Var::zeros(shape, dtype, &Device::Cpu).ok().map(|var| (name, var))),
        }
    }
    let mut all = vec![any_settings(choices)];
    let mut builder = Srkl::builder().default_group(all[0].clone());
    for i in 0..choices.below(4) {
        let params = if choices.one_in(3) { any_settings(choices) } else { all[0].clone() };
        let name = choices.of(&["a", "b", "", DEFAULT_GROUP, "c", "d", "e"]);
        let by = choices.below(4);
        all.push(params.clone());
        builder = builder.group(name, params, move |name, var| match by {
            0 => name.len() % 3 == i,
            1 => var.rank() == i,
            2 => var.dtype() == DType::F32,
            _ => true,
        });
    }
    if choices.one_in(4) {
        let counts = [choices.below(5), choices.of(&[0, 1, 3, 4096, usize::MAX])];
        builder = builder.matrices(move |name, _| counts[name.len() % 2]);
    }
    if choices.one_in(4) {
        builder = builder.bucket_bytes(choices.below(9)).sharded(choices.one_in(2));
    }
    let sound = all.iter().all(|params| params.validate().is_ok());
    let floats = named.iter().filter(|(_, var)| var.dtype().is_float()).count();
    let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
    let mut opt = match builder.build(named) {
        Ok(opt) => opt,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    assert!(sound, "settings out of range were accepted");
    assert_eq!(opt.telemetry().unwrap().len(), floats);
    let vars: Vec<Var> = vars.into_iter().filter(|var| var.dtype().is_float()).collect();
    let learns = opt.learning_rate() > 0.;
    if learns {
        opt.set_learning_rate(opt.learning_rate() / 2.);
    }
    let _ = format!("{opt:?}");
    for _ in 0..2 {
        let measures = opt.measuring();
        let store = grads(vars.iter().map(|var| (var, var.ones_like().unwrap())));
        if opt.step(&store).is_err() {
            // Hutchinson's measurement comes first.
            assert!(measures);
            opt.perturb(&store).unwrap().observe(&store).unwrap();
            opt.step(&store).unwrap();
        } else if measures {
            opt.observe(&store).unwrap();
        }
    }
    let place = tempfile::NamedTempFile::new().unwrap();
    opt.save(place.path()).unwrap();
    let before = contents(place.path()).unwrap();
    opt.load(place.path()).unwrap();
    assert!(saved(&mut opt).unwrap() == before);
}

// The step.

/// Settings in range.
fn settings(choices: &mut Choices) -> ParamsSrkl {
    let decay = |choices: &mut Choices| choices.of(&[0., 0.5, 0.9, 0.95, 0.999]);
    let mut params = match choices.below(10) {
        0 => ParamsSrkl::braked_adam(),
        1 => ParamsSrkl::braked_adam_averaged(),
        2 => ParamsSrkl::braked_muon_averaged(),
        3 => ParamsSrkl::kinetic(),
        4 => ParamsSrkl::hessian(),
        5 => ParamsSrkl::muon(0.1),
        6 => ParamsSrkl::adamw(0.1),
        _ => {
            let (beta1, beta2, eps) = (decay(choices), decay(choices), 1e-8);
            let direction = match choices.below(7) {
                0 => Direction::Gradient,
                1 => {
                    let nesterov = choices.one_in(2);
                    Direction::Sgd { momentum: decay(choices), nesterov }
                }
                2 => Direction::Momentum { mu: decay(choices) },
                3 => Direction::Adam { beta1, beta2, eps },
                4 => Direction::NesterovAdam { beta1, beta2, eps },
                5 => Direction::AmsGrad { beta1, beta2, eps },
                _ => Direction::Lion { beta1, beta2 },
            };
            let curvature = choices.of(&[Curvature::None, Curvature::GradSquare]);
            let scope = match curvature {
                Curvature::None => Scope::Tensor,
                _ => choices.of(&[Scope::Tensor, Scope::Global, Scope::Element]),
            };
            let beta = if choices.one_in(2) { Beta::Fixed(0.3) } else { Beta::Tied(0.7) };
            ParamsSrkl { direction, curvature, scope, beta, ..ParamsSrkl::reference() }
        }
    };
    params.lr = choices.decades(-4., 1.);
    params.measure = Measure { every: 2, first: 1, ..params.measure };
    params.repeatable = Repeatable::Assume;
    if choices.one_in(2) {
        params.weight_decay = choices.decades(-3., 0.);
    }
    if choices.one_in(3) {
        params.max_grad_norm = Some(choices.decades(-2., 2.));
    }
    if choices.one_in(3) {
        params.trust = Some(choices.decades(-3., 0.));
    }
    if choices.one_in(3) {
        params.average = Some(choices.of(&[Average::Exponential(0.9), Average::Polynomial(8.)]));
        params.average_format = choices.of(&[AverageFormat::F32, AverageFormat::BF16]);
    }
    if choices.one_in(3) {
        params.state = StateFormat::Compact;
    }
    use MasterWeights::*;
    params.master_weights = choices.of(&[Auto, Split, None]);
    params.rounding = choices.of(&[Rounding::Nearest, Rounding::Stochastic]);
    params.nonfinite = policy(choices);
    params.cautious = choices.one_in(4);
    if matches!(params.direction, Direction::AmsGrad { .. }) {
        // It packs nothing.
        params.state = StateFormat::F32;
        params.average_format = AverageFormat::F32;
        params.rounding = Rounding::Nearest;
        params.master_weights =
            if params.master_weights == Split { Auto } else { params.master_weights };
    }
    params
}

/// `values` in another layout.
fn laid_out(values: &Tensor, choices: &mut Choices) -> Result<Tensor> {
    let (n, shape) = (values.elem_count(), values.shape().clone());
    match choices.below(6) {
        // Contiguous from an offset on.
        0 => {
            let offset = 1 + choices.below(9);
            let front = Tensor::ones(offset, values.dtype(), &Device::Cpu)?;
            Tensor::cat(&[&front, &values.flatten_all()?], 0)?.narrow(0, offset, n)?.reshape(shape)
        }
        1 if values.rank() >= 2 => values.transpose(0, 1)?.contiguous()?.transpose(0, 1),
        // Every second element.
        2 if n > 0 => {
            let last = values.rank();
            let pairs = Tensor::stack(&[&values.ones_like()?, values], last)?;
            pairs.narrow(last, 1, 1)?.squeeze(last)
        }
        // All rows are the first.
        3 if values.rank() >= 2 && n > 0 => values.narrow(0, 0, 1)?.broadcast_as(shape),
        _ => Ok(values.clone()),
    }
}

/// A number that is known up to roundings.
#[derive(Clone, Copy)]
struct About {
    low: f64,
    high: f64,
}

impl About {
    fn new(value: f64, error: f64) -> Self {
        Self { low: value - error, high: value + error }
    }
}

/// State of a parameter before a step, in f64.
struct Before {
    w: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    v_max: Vec<f64>,
}

/// State of this name of what an optimizer without packed formats has saved.
fn state(contents: &Contents, name: &str) -> Vec<f64> {
    let Some(bytes) = contents.1.get(name) else { return vec![] };
    let parameter = name.split('.').next().unwrap();
    if contents.0[&format!("parameter.{parameter}")].contains("dtype=f64") {
        return bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    }
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b) as f64).collect()
}

/// The settings without formats of fewer bits, for an optimizer that loads what those have saved.
fn unpacked(params: &ParamsSrkl) -> ParamsSrkl {
    let masters = match params.master_weights {
        MasterWeights::None => MasterWeights::None,
        _ => MasterWeights::Auto,
    };
    ParamsSrkl {
        state: StateFormat::F32,
        average_format: AverageFormat::F32,
        master_weights: masters,
        ..params.clone()
    }
}

/// Steps of one list of parameters.
struct Training {
    vars: Vec<Var>,
    opt: Srkl,
}

impl Training {
    fn new(values: &[Tensor], params: &ParamsSrkl) -> Result<Self> {
        let vars: Vec<Var> = values.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let opt = Self::optimizer(&vars, params.clone())?;
        Ok(Self { vars, opt })
    }

    fn optimizer(vars: &[Var], params: ParamsSrkl) -> Result<Srkl> {
        let named = vars.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone()));
        // The last one is frozen if there are several.
        let frozen = (vars.len() - 1).to_string();
        let several = vars.len() > 1;
        Srkl::builder()
            .default_group(params.clone())
            .group("frozen", ParamsSrkl { lr: 0., ..params }, |name, _| several && name == frozen)
            .build(named)
    }

    /// Everything that a step may change.
    fn all(&mut self) -> Result<(Vec<Vec<u64>>, Contents)> {
        let parameters = self.vars.iter().map(|var| bits(var)).collect::<Result<_>>()?;
        Ok((parameters, saved(&mut self.opt)?))
    }

    fn before(&mut self, params: &ParamsSrkl) -> Result<Vec<Before>> {
        let file = tempfile::NamedTempFile::new()?;
        self.opt.save(file.path())?;
        let mut twin = Self::optimizer(&self.vars, unpacked(params))?;
        twin.load(file.path())?;
        let contents = saved(&mut twin)?;
        let of = |(i, var): (usize, &Var)| {
            let get = |kind: &str| state(&contents, &format!("{i}.{kind}"));
            let master = get("master");
            let w = if master.is_empty() { values(var)? } else { master };
            Ok(Before { w, m: get("m"), v: get("v"), v_max: get("v_max") })
        };
        self.vars.iter().enumerate().map(of).collect()
    }

    fn store(&self, all: &[Option<Tensor>]) -> candle_core::backprop::GradStore {
        grads(self.vars.iter().zip(all).filter_map(|(var, g)| Some((var, g.clone()?))))
    }

    /// A step and its measurement.
    fn step(&mut self, first: &[Option<Tensor>], again: &[Option<Tensor>]) -> Result<()> {
        let [first, again] = [self.store(first), self.store(again)];
        let measures = self.opt.measuring();
        let perturbs = self
            .opt
            .params(DEFAULT_GROUP)
            .is_some_and(|params| matches!(params.curvature, Curvature::Hutchinson(_)));
        if measures && perturbs {
            let before = self.vars.iter().map(|var| bits(var)).collect::<Result<Vec<_>>>()?;
            self.opt.perturb(&first)?.observe(&again)?;
            let after = self.vars.iter().map(|var| bits(var)).collect::<Result<Vec<_>>>()?;
            assert!(before == after, "not restored after a perturbation");
        }
        self.opt.step(&first)?;
        if measures && !perturbs { self.opt.observe(&again) } else { Ok(()) }
    }
}

/// Random parameters, gradients and settings: a step is that of the formula within its roundings, or, by the policy of what is
/// not finite, none; the bits do not depend on layouts and threads; an error changes nothing.
pub fn step(bytes: &[u8]) {
    check_step(&mut Choices(bytes)).unwrap();
}

fn check_step(choices: &mut Choices) -> Result<()> {
    let params = settings(choices);
    let count = 1 + choices.below(4);
    let salt = choices.byte() as u64;
    let mut start = vec![];
    for i in 0..count {
        let shape = if choices.one_in(12) {
            Shape::from(70_001 + choices.below(300))
        } else {
            any_shape(choices)
        };
        let dtype = choices.of(&FLOATS);
        let scale = choices.decades(-3., 2.);
        let value = noise(shape.elem_count(), scale, 1000 * salt + i as u64);
        start.push(tensor(&value, dtype)?.reshape(shape)?);
    }
    let mut training = Training::new(&start, &params)?;
    // The same by gradients that are copied, in one thread.
    let mut plain = Training::new(&start, &params)?;
    let one = pool(1)?;
    let moved_before = &mut vec![0u64; count];
    for step in 0..1 + choices.below(4) as u64 {
        let schedule = choices.of(&[1., 1., 0.5, 2.]);
        let grad_scale = choices.of(&[1., 1., 3., 1024.]);
        for t in [&mut training, &mut plain] {
            t.opt.set_learning_rate(params.lr * schedule);
            t.opt.set_grad_scale(grad_scale)?;
        }
        let (mut first, mut again) = (vec![], vec![]);
        for (i, var) in start.iter().enumerate() {
            for (salt_2, all) in [(0, &mut first), (1, &mut again)] {
                if choices.one_in(9) {
                    all.push(None);
                    continue;
                }
                let dtype = if choices.one_in(4) { choices.of(&FLOATS) } else { var.dtype() };
                let scale = choices.decades(-4., 2.) * grad_scale;
                let salt = 1000 * salt + 100 * step + 10 * i as u64 + salt_2;
                let mut g = noise(var.elem_count(), scale, salt);
                if choices.one_in(12) && !g.is_empty() {
                    let at = choices.below(65536) % g.len();
                    g[at] = choices.of(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
                }
                if choices.one_in(16) {
                    g.fill(0.);
                }
                let g = tensor(&g, dtype)?.reshape(var.shape())?;
                all.push(Some(laid_out(&g, choices)?));
            }
        }
        if choices.one_in(4) {
            refused(&mut training, &first, choices)?;
        }
        let before = training.before(&params)?;
        let skipped = training.opt.skipped_steps()?;
        let bits_before = training.all()?;
        training.step(&first, &again)?;
        let skipped = training.opt.skipped_steps()? > skipped;
        check_against_formula(
            &training,
            &params,
            (schedule, grad_scale, skipped),
            &first,
            &before,
            &bits_before,
            moved_before,
        )?;
        let copies = |all: &[Option<Tensor>]| -> Result<Vec<Option<Tensor>>> {
            all.iter().map(|g| g.as_ref().map(|g| g.force_contiguous()).transpose()).collect()
        };
        let (first, again) = (copies(&first)?, copies(&again)?);
        one.install(|| plain.step(&first, &again))?;
        assert!(training.all()? == plain.all()?, "layouts or threads change bits: {params:?}");
    }
    Ok(())
}

/// A step by a gradient that does not fit, if there is something that it does not fit to.
fn refused(t: &mut Training, first: &[Option<Tensor>], choices: &mut Choices) -> Result<()> {
    if t.opt.measuring()
        && matches!(t.opt.params(DEFAULT_GROUP).unwrap().curvature, Curvature::Hutchinson(_))
    {
        return Ok(());
    }
    let mut wrong = first.to_vec();
    let var = &t.vars[0];
    wrong[0] = Some(match choices.below(3) {
        0 => Tensor::ones(var.elem_count() + 1, DType::F32, &Device::Cpu)?,
        1 => Tensor::zeros(var.shape(), DType::U32, &Device::Cpu)?,
        _ if var.elem_count() == 0 => return Ok(()),
        _ => var.as_detached_tensor(),
    });
    let before = t.all()?;
    assert!(t.opt.step(&t.store(&wrong)).is_err());
    assert!(t.all()? == before, "an error changed something");
    Ok(())
}

fn check_against_formula(
    training: &Training,
    params: &ParamsSrkl,
    (schedule, grad_scale, skipped): (f64, f64, bool),
    gradients: &[Option<Tensor>],
    before: &[Before],
    (bits_before, _): &(Vec<Vec<u64>>, Contents),
    moved_before: &mut [u64],
) -> Result<()> {
    let vars = &training.vars;
    let several = vars.len() > 1;
    let frozen = |i: usize| several && i == vars.len() - 1;
    let compute = |var: &Var| if var.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    // As it is computed with.
    let mut all: Vec<Option<Vec<f64>>> = vec![];
    for (i, (var, g)) in vars.iter().zip(gradients).enumerate() {
        let g = g.as_ref().filter(|_| !frozen(i));
        all.push(g.map(|g| values(&g.to_dtype(compute(var))?)).transpose()?);
    }
    let finite = |g: &Vec<f64>| g.iter().all(|g| g.is_finite());
    let any_bad = all.iter().flatten().any(|g| !finite(g));
    let skips_step = params.nonfinite == NonFinite::SkipStep && any_bad;
    assert_eq!(skipped, skips_step, "{params:?}");
    let counted = |g: &&Vec<f64>| params.nonfinite != NonFinite::SkipBlock || finite(g);
    let of_all: Vec<f64> =
        all.iter().flatten().filter(counted).flatten().map(|g| g / grad_scale).collect();
    let total = norm(&of_all);
    let clip = params.max_grad_norm.map_or(1., |max| if total > max { max / total } else { 1. });
    let of_all: Vec<f64> = of_all.iter().map(|g| g * clip).collect();
    let telemetry = training.opt.telemetry()?;
    for (i, var) in vars.iter().enumerate() {
        let moves = all[i]
            .as_ref()
            .filter(|g| !skips_step && (params.nonfinite == NonFinite::Propagate || finite(g)));
        let Some(g) = moves else {
            assert!(bits(var)? == bits_before[i], "parameter {i} moved: {params:?}");
            continue;
        };
        moved_before[i] += 1;
        let t = moved_before[i] as i32;
        let direction = telemetry[i].direction;
        // A NaN takes its course; elements with brakes of their own by q, and orthogonal matrices, have other tests.
        let other = matches!(direction, Direction::Muon { .. })
            || matches!(
                (params.scope, params.curvature),
                (Scope::Element | Scope::Mixed(_), Curvature::Hutchinson(_))
            );
        let spread = params.max_grad_norm.is_some() || params.scope == Scope::Global;
        let Before { w, m, v, v_max } = &before[i];
        let all_finite = [g, w, m, v, v_max].into_iter().all(finite);
        if other || !all_finite || (any_bad && spread && params.nonfinite == NonFinite::Propagate) {
            continue;
        }
        let g: Vec<f64> = g.iter().map(|g| g / grad_scale * clip).collect();
        let eps = if compute(var) == DType::F64 { 2f64.powi(-51) } else { 2f64.powi(-23) };
        // What is below the normal numbers.
        let tiny = if compute(var) == DType::F64 { 1e-307 } else { 1e-37 };
        let has = |state: &Vec<f64>, k: usize| state.get(k).copied().unwrap_or(0.);
        let d: Vec<About> = g
            .iter()
            .enumerate()
            .map(|(k, g)| {
                let momentum = |old: f64, decay: f64, gain: f64| {
                    let new = decay * old + gain * g;
                    (new, 3. * eps * ((decay * old).abs() + (gain * g).abs()) + tiny)
                };
                let (m, v) = (has(m, k), has(v, k));
                // A first moment over the root of a second one, with the error of both.
                let over_root = |(m, error): (f64, f64), v: f64, beta2: f64, least: f64| {
                    let c2 = 1. / (1. - beta2.powi(t));
                    let above = (c2 * v * (1. + 8. * eps) + c2 * tiny).sqrt() + least;
                    let below = (c2 * v * (1. - 8. * eps) - c2 * tiny).max(0.).sqrt() + least;
                    let ends = [m - error, m + error]
                        .map(|m| [m / above, m / below].map(|d| (d, 6. * eps * d.abs())));
                    let ends = ends.as_flattened();
                    About {
                        low: ends.iter().map(|(d, e)| d - e).fold(f64::INFINITY, f64::min),
                        high: ends.iter().map(|(d, e)| d + e).fold(-f64::INFINITY, f64::max),
                    }
                };
                let second = |beta2: f64| beta2 * v + (1. - beta2) * g * g;
                let d = match direction {
                    Direction::Gradient => About::new(*g, 3. * eps * g.abs() + tiny),
                    Direction::Sgd { momentum: mu, nesterov } => {
                        let (new, error) = momentum(m, mu, 1.);
                        let (ahead, more) = momentum(new, mu, 1.);
                        if nesterov {
                            About::new(ahead, mu * error + more)
                        } else {
                            About::new(new, error)
                        }
                    }
                    Direction::Momentum { mu } => {
                        let (new, error) = momentum(m, mu, 1. - mu);
                        let c = 1. / (1. - mu.powi(t));
                        About::new(c * new, c * error + eps * (c * new).abs())
                    }
                    Direction::Adam { beta1, beta2, eps: least } => {
                        let (new, error) = momentum(m, beta1, 1. - beta1);
                        let c1 = 1. / (1. - beta1.powi(t));
                        over_root((c1 * new, c1 * error), second(beta2), beta2, least)
                    }
                    Direction::NesterovAdam { beta1, beta2, eps: least } => {
                        let (new, error) = momentum(m, beta1, 1. - beta1);
                        let later = beta1 / (1. - beta1.powi(t + 1));
                        let now = (1. - beta1) / (1. - beta1.powi(t));
                        let error = later * error
                            + 3. * eps * ((later * new).abs() + (now * g).abs())
                            + tiny;
                        over_root((later * new + now * g, error), second(beta2), beta2, least)
                    }
                    Direction::AmsGrad { beta1, beta2, eps: least } => {
                        let (new, error) = momentum(m, beta1, 1. - beta1);
                        let c1 = 1. / (1. - beta1.powi(t));
                        let largest = second(beta2).max(has(v_max, k));
                        over_root((c1 * new, c1 * error), largest, beta2, least)
                    }
                    Direction::Lion { beta1, .. } => {
                        let (ahead, error) = momentum(m, beta1, 1. - beta1);
                        let sign = |x: f64| {
                            if x > 0. {
                                1.
                            } else if x < 0. {
                                -1.
                            } else {
                                0.
                            }
                        };
                        About { low: sign(ahead - error), high: sign(ahead + error) }
                    }
                    other => panic!("no {other:?} here"),
                };
                match params.cautious && direction != Direction::Gradient {
                    true if *g > 0. => About { low: d.low.max(0.), high: d.high.max(0.) },
                    true if *g < 0. => About { low: d.low.min(0.), high: d.high.min(0.) },
                    true => About::new(0., 0.),
                    false => d,
                }
            })
            .collect();
        let beta = params.beta_value();
        let brake = |h: f64| schedule * params.lr / (1. + beta * h);
        let told = telemetry[i].phi;
        let mut phi = match (params.curvature, params.scope) {
            (Curvature::None, _) => brake(0.),
            (Curvature::GradSquare, Scope::Global) => brake(curvature(&of_all)),
            (Curvature::GradSquare, _) => brake(curvature(&g)),
            _ => {
                let phi = told.expect("a phi");
                assert!((0. ..=schedule * params.lr).contains(&phi), "{phi}: {params:?}");
                phi
            }
        };
        let elements = params.scope == Scope::Element;
        let phi_of = |k: usize, phi: f64| if elements { brake(g[k] * g[k]) * phi } else { phi };
        // Of elements, a factor.
        phi = if elements { 1. } else { phi };
        let mut slack = 1e-9;
        let measured = !matches!(params.curvature, Curvature::None | Curvature::GradSquare);
        if let Some(tau) = params.trust.filter(|_| !measured) {
            let length = norm(
                &d.iter()
                    .enumerate()
                    .map(|(k, d)| phi_of(k, phi) * (d.low + d.high) / 2.)
                    .collect::<Vec<_>>(),
            );
            let most = tau
                * norm(&values_of(&bits_before[i], var.dtype()))
                    .max(0.01 * (g.len() as f64).sqrt());
            if length > 0. {
                let errors: Vec<f64> =
                    d.iter().enumerate().map(|(k, d)| phi_of(k, phi) * (d.high - d.low)).collect();
                slack += norm(&errors) / length + 10. * eps;
            }
            if length > most {
                phi *= most / length;
            }
        }
        if let (false, Some(told)) = (measured || elements, told) {
            assert!((told - phi).abs() <= slack * phi, "phi of {i}: {told}, not {phi}: {params:?}");
        }
        let (masters, after) = stored_after(training, i)?;
        for (k, d) in d.iter().enumerate() {
            let phi = phi_of(k, phi);
            let keep = (1. - phi * params.weight_decay) * w[k];
            let error = 4. * eps * (w[k].abs() + keep.abs())
                + (slack + 4. * eps)
                    * phi
                    * (d.low.abs().max(d.high.abs()) + params.weight_decay * w[k].abs())
                + tiny;
            let (low, high) = (keep - phi * d.high - error, keep - phi * d.low + error);
            let dtype = if masters { DType::F32 } else { var.dtype() };
            let up = match params.rounding {
                Rounding::Stochastic if dtype == DType::BF16 => 2.,
                _ => 1.,
            };
            // A split master that is half-way may be its neighbour.
            let split =
                if masters && params.master_weights == MasterWeights::Split { 3. } else { 1. };
            let rounding = |x: f64| 1.01 * up * split * half_ulp(x, dtype);
            let largest = match dtype {
                DType::F16 => 65504.,
                _ => 3e38,
            };
            let got = after[k];
            if low.abs().max(high.abs()) > largest {
                continue;
            }
            assert!(
                got >= low - rounding(low) && got <= high + rounding(high),
                "parameter {i} of {:?}, element {k}: {got}, not from {low} to {high} (w {}, g {}): {params:?}",
                var.dtype(),
                w[k],
                g[k]
            );
        }
    }
    Ok(())
}

/// What a step has written: the masters, if there are some, or the parameter.
fn stored_after(training: &Training, i: usize) -> Result<(bool, Vec<f64>)> {
    Ok(match training.opt.master(&i.to_string())? {
        Some(master) => (true, master.into_iter().map(f64::from).collect()),
        None => (false, values(&training.vars[i])?),
    })
}

/// The numbers that have these bits.
fn values_of(bits: &[u64], dtype: DType) -> Vec<f64> {
    let value = |bits: &u64| match dtype {
        DType::F64 => f64::from_bits(*bits),
        DType::F32 => f32::from_bits(*bits as u32) as f64,
        DType::BF16 => half::bf16::from_bits(*bits as u16).to_f64(),
        _ => half::f16::from_bits(*bits as u16).to_f64(),
    };
    bits.iter().map(value).collect()
}
