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

/// The same of compact state; loops over units are apart.
#[test]
fn compact_state_is_the_same_on_both_sides() {
    let ours = include_str!("../src/compact.rs").split("/// How second moments are rounded.");
    let ours = functions(ours.into_iter().next().unwrap(), "fn ", |line| {
        line.split_once("fn ")?.1.split(['(', '<']).next()
    });
    let devices = functions(include_str!("../kernels/compact.cuh"), "__device__", |line| {
        line.split_once('(')?.0.rsplit([' ', '*', '&']).next()
    });
    assert!(ours.len() > 15, "{ours:?}");
    assert_eq!(ours, devices);
}

/// The modules from top to bottom: each imports those below it alone, so that there is no circle. A folder's `mod.rs` has
/// the folder's name.
const MODULES: [&str; 66] = [
    "matching",
    "snapshot",
    "checkpoint",
    "growing",
    "freezing",
    "monitor/events",
    "monitor/tensorboard",
    "monitor/rows",
    "monitor",
    "scaling",
    "averages",
    "accumulate",
    "measuring",
    "telemetry",
    "builder",
    "dropout",
    "optimizer",
    "loss_scale",
    "engine/device",
    "engine/host",
    "engine",
    "reduce",
    "exchange",
    "backend/masters",
    "backend/cuda",
    "backend/cuda/dropout",
    "backend/cuda/orthogonal",
    "backend/cuda/launch",
    "backend/cuda/capture",
    "backend/cuda/table",
    "backend/cuda/abi",
    "backend/cpu",
    "backend/cpu/replace",
    "backend/cpu/curvature",
    "backend/cpu/orthogonal",
    "backend/cpu/update",
    "backend/cpu/statistics",
    "backend/cpu/rows",
    "backend/cpu/row_step",
    "backend/cpu/moments",
    "backend/cpu/mask",
    "backend/cpu/access",
    "backend/cpu/gradient",
    "backend/cpu/simd",
    "backend/cpu/pool",
    "backend/newton_schulz",
    "backend",
    "ranks",
    "micro_batches",
    "shards",
    "collective/mpi",
    "collective/nccl",
    "collective/tcp",
    "collective/threads",
    "collective",
    "schedule",
    "lr_schedule",
    "block",
    "state",
    "rule",
    "estimate",
    "file",
    "random",
    "matrices",
    "params",
    "compact",
];

#[test]
fn imports_go_down() -> Result<()> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let place = |module: &str| MODULES.iter().position(|m| *m == module);
    let (mut files, mut seen) = (0, 0);
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for file in std::fs::read_dir(&folder)? {
            let path = file?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let module = path.strip_prefix(&src).unwrap().with_extension("");
            let module = module.to_string_lossy();
            let module = module.strip_suffix("/mod").unwrap_or(&module);
            // Everything may import the numbers, and their module nothing.
            if ["lib", "numerics"].contains(&module) {
                continue;
            }
            let own = place(module).unwrap_or_else(|| panic!("{module} is not in the list"));
            files += 1;
            let source = std::fs::read_to_string(&path)?;
            let source = source.split("#[cfg(test)]\nmod").next().unwrap();
            let source = source.split("#[cfg(all(test").next().unwrap();
            let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
            let code = code.collect::<Vec<_>>().join(" ");
            let parent = |of: &str| of.rsplit_once('/').map_or(String::new(), |(up, _)| up.into());
            // Where `self`, `super` and `super::super` lead.
            let is_folder = path.ends_with("mod.rs");
            let up = parent(module);
            let roots = [
                ("crate::", String::new()),
                ("self::", if is_folder { module.to_string() } else { "no".to_string() }),
                ("super::super::", parent(&up)),
                ("super::", up),
            ];
            let mut rest = code;
            for (word, root) in roots {
                for imported in imports(&rest, word, &root) {
                    let below = place(&imported).unwrap_or_else(|| {
                        panic!("{module} imports {imported}, which is no module")
                    });
                    assert!(own <= below, "{module} imports {imported}");
                    seen += 1;
                }
                rest = rest.replace(word, "");
            }
        }
    }
    assert_eq!(files, MODULES.len());
    assert!(seen > 80, "{seen}");
    Ok(())
}

/// The modules that code names by `word`, which leads to the folder `root`; those in braces too.
fn imports(code: &str, word: &str, root: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let is_module = |name: &str| MODULES.contains(&name) || name == "numerics";
    let join = |folder: &str, name: &str| match folder {
        "" => name.to_string(),
        folder => format!("{folder}/{name}"),
    };
    let mut all = vec![];
    for mut text in code.split(word).skip(1) {
        // As long as a name is that of a module, it is the folder of what follows.
        let mut folder = root.to_string();
        while let next = join(&folder, &name(text))
            && is_module(&next)
        {
            folder = next;
            text = text.trim_start().trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
            text = text.strip_prefix("::").unwrap_or("");
        }
        match text.strip_prefix('{') {
            // One level: names within further braces are of the module before them.
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default().split(',');
                let names = list.map(name).filter(|name| !name.is_empty());
                all.extend(names.map(|name| {
                    let item = join(&folder, &name);
                    if is_module(&item) { item } else { folder.clone() }
                }));
            }
            None => all.push(folder),
        }
    }
    // Of the crate's root there are modules alone.
    all.retain(|module| module != "numerics");
    all
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
