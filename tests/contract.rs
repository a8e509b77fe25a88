//! The numerics contract: the same bits for any number of threads, any layout and any run, and the
//! bits that the contract's text describes.

mod common;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::numerics::{CHUNK, LANES};
use candle_srkl::{Beta, MasterWeights, NonFinite, ParamsSrkl, Scope, Srkl};
use common::*;
use half::{bf16, f16};

/// A training of all dtypes and sizes; what it leaves in parameters and masters.
fn train(params: &ParamsSrkl) -> Result<Vec<Vec<u64>>> {
    let mut vars = vec![];
    for (i, &n) in SIZES.iter().chain(&[500_000]).enumerate() {
        vars.push(var(&noise(n, 0.5, i as u64), FLOATS[i % 4])?);
    }
    let mut opt = Srkl::new(vars.clone(), params.clone())?;
    for step in 0..3 {
        let mut store = grads([]);
        for (i, var) in vars.iter().enumerate() {
            if (i + step) % 5 > 0 {
                let g = noise(var.elem_count(), 0.3, (100 * step + i) as u64);
                store.insert(var, tensor(&g, FLOATS[(i / 2) % 4])?);
            }
        }
        opt.step(&store)?;
    }
    let mut state: Vec<Vec<u64>> = vars.iter().map(|var| bits(var)).collect::<Result<_>>()?;
    for i in 0..vars.len() {
        let master = opt.master(&i.to_string())?.unwrap_or_default();
        state.push(master.into_iter().map(|x| x.to_bits() as u64).collect());
    }
    Ok(state)
}

fn all_settings() -> Vec<ParamsSrkl> {
    let mut settings = vec![];
    for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
        for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock] {
            for max_grad_norm in [None, Some(3.)] {
                settings.push(ParamsSrkl {
                    lr: 0.1,
                    beta: Beta::Fixed(0.2),
                    scope,
                    weight_decay: 0.1,
                    max_grad_norm,
                    nonfinite,
                    ..ParamsSrkl::reference()
                });
            }
        }
    }
    settings
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for params in all_settings() {
        let expected = train(&params)?;
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| train(&params))? == expected, "{threads} threads, {params:?}");
        }
    }
    Ok(())
}

/// The packing of tensors: one by one, each with its own optimizer, or all in one.
#[test]
fn a_block_does_not_depend_on_its_neighbours() -> Result<()> {
    for dtype in FLOATS {
        let make = || -> Result<Vec<Var>> {
            SIZES.iter().map(|&n| var(&noise(n, 0.5, n as u64), dtype)).collect()
        };
        let params = ParamsSrkl { lr: 0.1, ..ParamsSrkl::reference() };
        let grad = |var: &Var| tensor(&noise(var.elem_count(), 1., 9), dtype);
        let (together, alone) = (make()?, make()?);
        let mut opt = Srkl::new(together.clone(), params.clone())?;
        let mut store = grads([]);
        for var in &together {
            store.insert(var, grad(var)?);
        }
        opt.step(&store)?;
        for (together, alone) in together.iter().zip(&alone) {
            let mut opt = Srkl::new(vec![alone.clone()], params.clone())?;
            opt.step(&grads([(alone, grad(alone)?)]))?;
            assert_eq!(bits(together)?, bits(alone)?);
        }
    }
    Ok(())
}

/// Rules 2 to 4 of the contract, word for word, for a compute type of f32.
fn sum_of_fourth_powers(g: &[f32]) -> f64 {
    let fold = |items: &[f64], add: &dyn Fn(f64, f64) -> f64| {
        let mut lanes = vec![0f64; LANES];
        for (i, &item) in items.iter().enumerate() {
            lanes[i % LANES] = add(item, lanes[i % LANES]);
        }
        let mut width = LANES / 2;
        while width > 0 {
            for l in 0..width {
                lanes[l] += lanes[l + width];
            }
            width /= 2;
        }
        lanes[0]
    };
    let chunk = |chunk: &[f32]| {
        let squares: Vec<f64> = chunk.iter().map(|&g| g as f64 * g as f64).collect();
        fold(&squares, &|q, lane| q.mul_add(q, lane))
    };
    let chunks: Vec<f64> = g.chunks(CHUNK).map(chunk).collect();
    fold(&chunks, &|chunk, lane| lane + chunk)
}

/// One step of the reference rule, as the contract describes it, element by element.
#[test]
fn the_contract_as_text_gives_the_bits_of_the_crate() -> Result<()> {
    let (lr, beta, weight_decay) = (0.3, 0.7, 0.25);
    for (size, &n) in SIZES.iter().chain(&[9_000_001]).enumerate() {
        let w: Vec<f32> = noise(n, 1., size as u64).into_iter().map(|x| x as f32).collect();
        let g: Vec<f32> = noise(n, 0.2, 99 + size as u64).into_iter().map(|x| x as f32).collect();
        let h = sum_of_fourth_powers(&g).sqrt();
        let phi = lr / (1. + beta * h);
        let (phi_c, keep) = (phi as f32, (1. - phi * weight_decay) as f32);
        let step = |w: f32, g: f32| g.mul_add(-phi_c, keep * w);

        let params =
            ParamsSrkl { lr, beta: Beta::Fixed(beta), weight_decay, ..ParamsSrkl::reference() };
        let grad = Tensor::from_slice(&g, n, &Device::Cpu)?;
        let var = Var::from_slice(&w, n, &Device::Cpu)?;
        let mut opt = Srkl::new(vec![var.clone()], params.clone())?;
        opt.step(&grads([(&var, grad.clone())]))?;
        // The last bits of H and phi, which seldom reach an f32.
        let telemetry = &opt.telemetry()?[0];
        assert_eq!((telemetry.curvature, telemetry.phi), (Some(h), Some(phi)), "{n} elements");
        let expected: Vec<f32> = w.iter().zip(&g).map(|(&w, &g)| step(w, g)).collect();
        assert!(var.to_vec1::<f32>()? == expected, "f32, {n} elements");

        // The same with an f32 gradient of a 16-bit parameter, with master and without.
        for masters in [MasterWeights::Auto, MasterWeights::None] {
            let params = ParamsSrkl { master_weights: masters, ..params.clone() };
            for dtype in [DType::BF16, DType::F16] {
                let narrow = |x: f32| match dtype {
                    DType::BF16 => bf16::from_f32(x).to_f32(),
                    _ => f16::from_f32(x).to_f32(),
                };
                let var =
                    Var::from_tensor(&Tensor::from_slice(&w, n, &Device::Cpu)?.to_dtype(dtype)?)?;
                let mut opt = Srkl::new(vec![var.clone()], params.clone())?;
                opt.step(&grads([(&var, grad.clone())]))?;
                let expected: Vec<f32> =
                    w.iter().zip(&g).map(|(&w, &g)| narrow(step(narrow(w), g))).collect();
                let got = var.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                assert!(got == expected, "{dtype:?}, {n} elements, {masters:?}");
            }
        }
    }
    Ok(())
}

/// The values pin the bits of a training. A change of one is a change of bits for users: it belongs
/// into the changelog.
#[test]
fn value_stability_step() -> Result<()> {
    let w: Vec<f64> = (0..10_000).map(|i| ((i * 37 % 1000) as f64 - 500.) / 512.).collect();
    let g: Vec<f64> = (0..10_000).map(|i| ((i * 91 % 1000) as f64 - 500.) / 1024.).collect();
    let mut sums = vec![];
    for dtype in FLOATS {
        let var = var(&w, dtype)?;
        let params = ParamsSrkl { lr: 0.7, weight_decay: 0.1, ..ParamsSrkl::reference() };
        let mut opt = Srkl::new(vec![var.clone()], params)?;
        for _ in 0..3 {
            opt.step(&grads([(&var, tensor(&g, dtype)?)]))?;
        }
        // FNV-1a over the words.
        let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        sums.push(bits(&var)?.into_iter().fold(0xcbf2_9ce4_8422_2325, mix));
    }
    let expected: [u64; 4] =
        [0x15df3d684572e225, 0x90140612ef2e21c5, 0x112bc9f49cd69725, 0xe6d8a4f6fe2adfe5];
    assert_eq!(sums, expected, "{sums:#x?}");
    Ok(())
}

/// The names of the functions in a source file, in its order, but for constructors.
fn functions(source: &str, marker: &str, name: impl Fn(&str) -> Option<&str>) -> Vec<String> {
    let lines = source.lines().filter(|line| line.contains(marker));
    let names = lines.filter_map(|line| name(line).map(str::to_string));
    names.filter(|name| name != "new" && name.chars().all(|c| !c.is_uppercase())).collect()
}

/// The mathematics of a step is written twice, for the CPU and for devices: the same functions in the same order.
#[test]
fn the_rule_is_the_same_on_both_sides() {
    let ours = functions(include_str!("../src/rule.rs"), "fn ", |line| {
        let (_, rest) = line.split_once("fn ")?;
        rest.split(['(', '<']).next()
    });
    let devices = functions(include_str!("../kernels/rule.cuh"), "__device__", |line| {
        let (declaration, _) = line.split_once('(')?;
        declaration.rsplit([' ', '*', '&']).next()
    });
    assert!(ours.len() > 20, "{ours:?}");
    assert_eq!(ours, devices);
}

/// The modules from top to bottom: each imports those below it alone, so that there is no circle.
const MODULES: [&str; 28] = [
    "checkpoint",
    "measuring",
    "telemetry",
    "builder",
    "dropout",
    "optimizer",
    "backend/masters",
    "backend/cuda_dropout",
    "backend/cuda",
    "backend/no_cuda",
    "backend/stages",
    "backend/replace",
    "backend/cpu",
    "backend/mask",
    "backend/access",
    "backend/gradient",
    "backend/simd",
    "backend/pool",
    "backend/mod",
    "cuda/abi",
    "schedule",
    "block",
    "rule",
    "estimate",
    "file",
    "random",
    "params",
    "numerics",
];

#[test]
fn imports_go_down() -> Result<()> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for folder in ["", "backend/", "cuda/"] {
        for file in std::fs::read_dir(src.join(folder))? {
            let path = file?.path();
            let name = path.file_stem().unwrap().to_string_lossy();
            if path.is_dir() || ["lib", "mod"].contains(&&*name) && folder != "backend/" {
                continue;
            }
            let place = |module: &str| MODULES.iter().position(|m| *m == module);
            let module = format!("{folder}{name}");
            let own = place(&module).unwrap_or_else(|| panic!("{module} is not in the list"));
            let source = std::fs::read_to_string(&path)?;
            let source = source.split("#[cfg(test)]").next().unwrap();
            let source = source.split("#[cfg(all(test").next().unwrap();
            let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
            let code = code.collect::<Vec<_>>().join(" ");
            for imported in imports(&code, folder) {
                // Of the crate's root there are modules alone: what it re-exports has one of its own.
                let below = place(&imported)
                    .unwrap_or_else(|| panic!("{module} imports {imported}, which is no module"));
                assert!(own <= below, "{module} imports {imported}");
                seen += 1;
            }
        }
    }
    assert!(seen > 60, "{seen}");
    Ok(())
}

/// The modules that code names by `crate::` or `super::`, those in braces too.
fn imports(code: &str, folder: &str) -> Vec<String> {
    let names = |text: &str| -> Vec<String> {
        let name = |text: &str| {
            text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
        };
        match text.strip_prefix('{') {
            // One level: names within further braces are of the module before them.
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                list.split(',').map(name).filter(|name: &String| !name.is_empty()).collect()
            }
            None => vec![name(text)],
        }
    };
    let mut all = vec![];
    for text in code.split("crate::").skip(1) {
        match (text.strip_prefix("backend::"), text.strip_prefix("cuda::")) {
            (Some(text), _) => all.extend(names(text).iter().map(|n| format!("backend/{n}"))),
            (None, Some(_)) => all.push("cuda/abi".to_string()),
            (None, None) => all.extend(names(text)),
        }
    }
    for text in code.split("super::").skip(1) {
        all.extend(names(text).iter().map(|name| format!("{folder}{name}")));
    }
    // Types and constants of backend/mod.rs itself.
    let of_mod = |name: String| match name.strip_prefix("backend/") {
        Some(item) if item.starts_with(char::is_uppercase) => "backend/mod".to_string(),
        _ => name,
    };
    all.into_iter().map(of_mod).collect()
}

/// What may go to another thread, or be used by several: it compiles.
#[test]
fn send_and_sync() {
    fn check<T: Send + Sync>() {}
    check::<Srkl>();
    check::<ParamsSrkl>();
    check::<candle_srkl::BlockTelemetry>();
    check::<candle_srkl::Dropout>();
    check::<candle_srkl::Measurements>();
}
