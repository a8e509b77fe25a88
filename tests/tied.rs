//! Tied weights: one variable under several names of a VarMap is one parameter.

mod common;

use candle_core::{DType, Device, Result, Var};
use candle_nn::{Init, Optimizer, VarMap};
use candle_srkl::{ParamsSrkl, Srkl};
use common::*;

/// The weights of `head`, of `embedding` and of `tail` are one variable; `middle` has its own.
fn tied(dtype: DType) -> Result<(VarMap, Var)> {
    let varmap = VarMap::new();
    for (i, name) in ["head", "middle"].into_iter().enumerate() {
        let w = varmap.get((3, 4), name, Init::Const(0.), dtype, &Device::Cpu)?;
        w.slice_set(&noisy_matrix((3, 4), 1., i as u64, dtype)?, 0, 0)?;
    }
    let mut data = varmap.data().lock().unwrap();
    let shared = data["head"].clone();
    data.insert("embedding".to_string(), shared.clone());
    // Also where it was made from a tensor that is a variable already.
    data.insert("tail".to_string(), Var::from_tensor(shared.as_tensor())?);
    drop(data);
    Ok((varmap, shared))
}

fn momentum() -> ParamsSrkl {
    let direction = candle_srkl::Direction::Momentum { mu: 0.9 };
    ParamsSrkl { lr: 0.1, direction, ..ParamsSrkl::reference() }
}

fn step(varmap: &VarMap, opt: &mut Srkl, salt: u64) -> Result<()> {
    let data = varmap.data().lock().unwrap();
    let mut store = grads([]);
    for (i, name) in ["head", "middle"].into_iter().enumerate() {
        let grad = noisy_matrix((3, 4), 1., 10 * salt + i as u64, data[name].dtype())?;
        store.insert(&data[name], grad);
    }
    opt.step(&store)
}

/// Stepped once, as the variable alone would be, and known by all of its names.
#[test]
fn a_variable_of_several_names_is_one_parameter() -> Result<()> {
    for dtype in FLOATS {
        let (varmap, shared) = tied(dtype)?;
        let mut opt = Srkl::from_varmap(&varmap, momentum())?;
        let told: Vec<_> = opt.telemetry()?.into_iter().map(|t| (t.name, t.tied)).collect();
        let others = vec!["head".to_string(), "tail".to_string()];
        assert_eq!(told, [("embedding".to_string(), others), ("middle".to_string(), vec![])]);

        let alone = Var::from_tensor(&shared.copy()?)?;
        let mut alone_opt = Srkl::new(vec![alone.clone()], momentum())?;
        for salt in 0..3 {
            step(&varmap, &mut opt, salt)?;
            let grad = noisy_matrix((3, 4), 1., 10 * salt, dtype)?;
            alone_opt.step(&grads([(&alone, grad)]))?;
        }
        assert_eq!(bits(&shared)?, bits(&alone)?);
        for name in ["embedding", "head", "tail"] {
            assert_eq!(opt.master(name)?, alone_opt.master("0")?);
        }
        assert_eq!(opt.master("nobody")?, None);
    }
    Ok(())
}

/// Groups by name must agree on it.
#[test]
fn names_in_different_groups() -> Result<()> {
    let (varmap, _) = tied(DType::F32)?;
    let build = |name: &'static str| {
        let other = ParamsSrkl { weight_decay: 0.1, ..momentum() };
        Srkl::builder()
            .default_group(momentum())
            .group("others", other, move |n, _| n == "middle" || n.contains(name))
            .build_varmap(&varmap)
    };
    assert_error(build("head"), &["`embedding`", "`head`", "`default`", "`others`"]);
    assert_error(build("tail"), &["`embedding`", "`tail`", "`default`", "`others`"]);
    assert_error(build("embedding"), &["`embedding`", "`head`", "`others`", "`default`"]);
    // All of them, or none.
    for (name, group) in [("", "others"), ("nobody", "default")] {
        assert_eq!(build(name)?.telemetry()?[0].group, group);
    }
    Ok(())
}

/// In a list given by hand it is more likely a mistake.
#[test]
fn the_same_variable_twice_in_a_list() -> Result<()> {
    let (_, shared) = tied(DType::F32)?;
    let named = ["a", "b"].map(|name| (name.to_string(), shared.clone()));
    assert_error(Srkl::builder().build(named), &["`a`", "`b`", "same variable"]);
    let twice = vec![shared.clone(), shared];
    assert_error(Srkl::new(twice, momentum()), &["`0`", "`1`", "same variable"]);
    Ok(())
}

/// Integers that are tied are left out, as others are.
#[test]
fn tied_integers() -> Result<()> {
    let varmap = VarMap::new();
    let index = Var::new(&[1u32, 2], &Device::Cpu)?;
    for name in ["a", "b"] {
        varmap.data().lock().unwrap().insert(name.to_string(), index.clone());
    }
    assert!(Srkl::from_varmap(&varmap, momentum())?.telemetry()?.is_empty());
    Ok(())
}

#[test]
fn checkpoints_of_tied_weights() -> Result<()> {
    for dtype in FLOATS {
        let folder = tempfile::tempdir()?;
        let (model, file) = (folder.path().join("model"), folder.path().join("state"));
        let (varmap, shared) = tied(dtype)?;
        let mut opt = Srkl::from_varmap(&varmap, momentum())?;
        (0..3).try_for_each(|salt| step(&varmap, &mut opt, salt))?;
        varmap.save(&model)?;
        opt.save(&file)?;
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
        assert!(tensors.contains_key("embedding.m") && !tensors.contains_key("head.m"));

        let (mut resumed, resumed_shared) = tied(dtype)?;
        resumed.load(&model)?;
        let mut resumed_opt = Srkl::from_varmap(&resumed, momentum())?;
        resumed_opt.load(&file)?;
        (3..6).try_for_each(|salt| step(&varmap, &mut opt, salt))?;
        (3..6).try_for_each(|salt| step(&resumed, &mut resumed_opt, salt))?;
        assert_eq!(bits(&resumed_shared)?, bits(&shared)?);
        assert_eq!(resumed_opt.master("head")?, opt.master("embedding")?);

        // Without the tie, of which the state can't be in two places.
        let mut apart = VarMap::new();
        for name in ["embedding", "head", "middle", "tail"] {
            apart.get((3, 4), name, Init::Const(0.), dtype, &Device::Cpu)?;
        }
        apart.load(&model)?;
        let mut apart = Srkl::from_varmap(&apart, momentum())?;
        assert_error(apart.load(&file), &["`head`", "none of this name"]);
        assert_eq!(apart.steps()?, 0);
    }
    Ok(())
}
