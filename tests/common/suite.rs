//! The settings of the trainings that guard the bits.

use candle_srkl::{
    Average, AverageFormat, Beta, Curvature, Direction, HutchinsonCurvature, MasterWeights,
    Measure, NonFinite, ParamsSrkl, Repeatable, Rounding, Scope, StateFormat, StepCurvature,
};

/// Around lanes and chunks, and more than one chunk.
const SIZES: [usize; 14] = [3, 1025, 9, 8193, 17, 1, 8200, 31, 64, 16_385, 5, 4095, 127, 1024];

/// The same for packed state, whose units are of 256 elements, of parameters from 4096 elements on.
const PACKED_SIZES: [usize; 14] =
    [4096, 1025, 4097, 8193, 17, 4095, 12_345, 5000, 64, 16_385, 5, 8192, 4351, 9000];

/// Those of a case's parameters.
pub fn sizes(params: &ParamsSrkl) -> &'static [usize] {
    if params.state == StateFormat::Compact { &PACKED_SIZES } else { &SIZES }
}

/// A name for each, which is its line in `bits.txt`.
pub fn suite() -> Vec<(String, ParamsSrkl)> {
    let step = Curvature::Step(StepCurvature { decay: 0.9, noise: 1.5 });
    let rows = Curvature::Hutchinson(HutchinsonCurvature { decay: 0.9 });
    let measure = Measure { every: 3, first: 2, delta: 1e-2, seed: 5 };
    let (gradient, momentum) = (Direction::Gradient, Direction::Momentum { mu: 0.9 });
    let adam = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    let nesterov_adam = Direction::NesterovAdam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    let amsgrad = Direction::AmsGrad { beta1: 0.9, beta2: 0.9, eps: 1e-8 };
    let lion = Direction::Lion { beta1: 0.9, beta2: 0.95 };
    let rules = [
        ("gradient, grad-square, tensor", gradient, Curvature::GradSquare, Scope::Tensor),
        ("gradient, grad-square, global", gradient, Curvature::GradSquare, Scope::Global),
        ("gradient, grad-square, element", gradient, Curvature::GradSquare, Scope::Element),
        ("momentum, grad-square, tensor", momentum, Curvature::GradSquare, Scope::Tensor),
        ("adam, grad-square, element", adam, Curvature::GradSquare, Scope::Element),
        ("gradient, step, global", gradient, step, Scope::Global),
        ("momentum, step, tensor", momentum, step, Scope::Tensor),
        ("adam, step, global", adam, step, Scope::Global),
        ("adam, step, tensor", adam, step, Scope::Tensor),
        ("gradient, hutchinson, element", gradient, rows, Scope::Element),
        ("momentum, hutchinson, mixed", momentum, rows, Scope::Mixed(0.625)),
        ("adam, hutchinson, tensor", adam, rows, Scope::Tensor),
        ("momentum, hutchinson, global", momentum, rows, Scope::Global),
        ("nesterov adam, step, global", nesterov_adam, step, Scope::Global),
        ("amsgrad, step, tensor", amsgrad, step, Scope::Tensor),
        ("lion, step, global", lion, step, Scope::Global),
        ("cautious adam, step, global", adam, step, Scope::Global),
        ("cautious lion, grad-square, element", lion, Curvature::GradSquare, Scope::Element),
        ("cautious momentum, none, tensor", momentum, Curvature::None, Scope::Tensor),
        ("cautious nesterov adam, hutchinson, mixed", nesterov_adam, rows, Scope::Mixed(0.5)),
    ];
    let policies = [
        ("skip-step", NonFinite::SkipStep, MasterWeights::Auto),
        ("skip-block", NonFinite::SkipBlock, MasterWeights::None),
        ("propagate", NonFinite::Propagate, MasterWeights::None),
        ("propagate with masters", NonFinite::Propagate, MasterWeights::Auto),
    ];
    let of_rule = |(case, (rule, direction, curvature, scope)): (usize, (&str, _, _, _))| {
        let mut suite = vec![];
        for (variant, (policy, nonfinite, master_weights)) in policies.into_iter().enumerate() {
            let params = ParamsSrkl {
                lr: 0.5,
                direction,
                cautious: rule.starts_with("cautious"),
                curvature,
                measure,
                scope,
                beta: if case % 3 == 0 { Beta::Fixed(0.3) } else { Beta::Tied(0.5) },
                trust: (case % 2 == variant % 2).then_some(0.05),
                weight_decay: 0.1,
                max_grad_norm: (variant == 1).then_some(5.),
                average: (variant % 2 == 0).then_some(Average::Exponential(0.9)),
                master_weights,
                nonfinite,
                repeatable: Repeatable::Assume,
                ..ParamsSrkl::reference()
            };
            suite.push((format!("{rule}, {policy}"), params));
        }
        suite
    };
    // What is new comes last: a case is drawn by its number.
    let (old, new) = rules.split_at(13);
    let mut suite: Vec<_> = old.iter().copied().enumerate().flat_map(of_rule).collect();
    let presets = [
        ("reference()", ParamsSrkl::reference()),
        ("braked_adam()", ParamsSrkl::braked_adam()),
        ("braked_adam_averaged()", ParamsSrkl::braked_adam_averaged()),
        ("kinetic()", ParamsSrkl::kinetic()),
        ("hessian()", ParamsSrkl::hessian()),
    ];
    suite.extend(presets.map(|(name, params)| (name.to_string(), params)));
    for (every, decay, noise) in
        [(u64::MAX, 0.99, 0.), (5, 1. - f64::EPSILON / 2., 3.), (7, 0., 2.)]
    {
        let curvature = Curvature::Step(StepCurvature { decay, noise });
        let measure = Measure { every, first: 4, ..Measure::default() };
        let params = ParamsSrkl { curvature, measure, ..ParamsSrkl::braked_adam() };
        suite.push((format!("step, every {every}, decay {decay:?}, noise {noise}"), params));
    }
    let nesterov = Direction::Sgd { momentum: 0.9, nesterov: true };
    let more = ("nesterov, none, tensor", nesterov, Curvature::None, Scope::Tensor);
    suite.extend(packed([old, &[more]].concat().into_iter().enumerate()));
    let new = || new.iter().copied().enumerate();
    suite.extend(new().flat_map(of_rule));
    suite.extend(packed(new().filter(|(_, (_, direction, ..))| *direction != amsgrad)));
    suite
}

/// Rules with packed state.
fn packed<'a>(
    rules: impl Iterator<Item = (usize, (&'a str, Direction, Curvature, Scope))>,
) -> Vec<(String, ParamsSrkl)> {
    let policies = [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate];
    let packed = |(case, (rule, direction, curvature, scope)): (usize, (&str, _, _, _))| {
        // Each with each, over the rules.
        let masters = [MasterWeights::Split, MasterWeights::None][case % 2];
        let averages = [AverageFormat::BF16, AverageFormat::F32][case / 2 % 2];
        let nonfinite = policies[case % 3];
        let params = ParamsSrkl {
            lr: 0.5,
            direction,
            cautious: rule.starts_with("cautious"),
            curvature,
            measure: Measure { every: 3, first: 2, delta: 1e-2, seed: 5 },
            scope,
            beta: Beta::Tied(0.5),
            trust: (case % 4 == 1).then_some(0.05),
            weight_decay: 0.1,
            average: (case % 5 != 4).then_some(Average::Polynomial(2.)),
            average_format: averages,
            state: StateFormat::Compact,
            master_weights: masters,
            rounding: Rounding::Stochastic,
            nonfinite,
            repeatable: Repeatable::Assume,
            ..ParamsSrkl::reference()
        };
        (format!("{rule}, packed, {masters:?}, {averages:?}, {nonfinite:?}"), params)
    };
    rules.map(packed).collect()
}
