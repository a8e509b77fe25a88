//! Events by feature `tracing`, as a subscriber gets them.

mod common;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{Measure, ParamsSrkl, Srkl};
use common::*;
use serde_json::{Value, json};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The level and the fields of the events of `f`, up to a level.
fn events(level: LevelFilter, f: impl FnOnce() -> Result<()>) -> Result<Vec<(String, Value)>> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_max_level(level)
        .with_writer(move || writer.clone())
        .finish();
    {
        let _subscribed = subscriber.set_default();
        f()?;
    }
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let events = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let ours = events.filter(|event: &Value| event["target"] == "candle_srkl");
    Ok(ours
        .map(|event| (event["level"].as_str().unwrap().to_string(), event["fields"].clone()))
        .collect())
}

fn optimizer(params: ParamsSrkl) -> Result<(Var, Srkl)> {
    let w = var(&[3., -4.], DType::F32)?;
    let measure = Measure { every: 2, first: 1, ..params.measure };
    let params = ParamsSrkl { measure, ..params };
    let opt = Srkl::builder().default_group(params).build([("w".to_string(), w.clone())])?;
    Ok((w, opt))
}

#[test]
fn steps_and_measurements_are_told() -> Result<()> {
    let debug = |fields: Value| ("DEBUG".to_string(), fields);
    let step = |step: u64, multiplier: f64, measures: bool| {
        debug(
            json!({ "message": "step", "step": step, "multiplier": multiplier, "measures": measures }),
        )
    };
    let measured = |step: u64| {
        debug(
            json!({ "message": "curvature measured", "step": step, "parameters": 1, "estimates": 1 }),
        )
    };
    let three = |params: ParamsSrkl| {
        let (w, mut opt) = optimizer(params)?;
        events(LevelFilter::DEBUG, || {
            for i in 0..3 {
                if i == 1 {
                    opt.set_learning_rate(opt.learning_rate() / 4.);
                }
                opt.backward_step_with(|| w.sqr()?.sum_all())?;
            }
            Ok(())
        })
    };
    assert_eq!(
        three(ParamsSrkl::braked_adam())?,
        [step(1, 1., true), measured(1), step(2, 0.25, false), step(3, 0.25, true), measured(3)]
    );
    assert_eq!(
        three(ParamsSrkl::hessian())?,
        [measured(1), step(1, 1., false), step(2, 0.25, false), measured(3), step(3, 0.25, false)]
    );
    Ok(())
}

/// The multiplier that a step was taken by, not that of the next one.
#[test]
fn multipliers_are_those_of_their_steps() -> Result<()> {
    let (w, mut opt) = optimizer(ParamsSrkl::adamw(0.1))?;
    opt.set_schedule(Some(candle_srkl::LrSchedule::linear_decay(4, 0.)))?;
    let told = events(LevelFilter::DEBUG, || {
        (0..3).try_for_each(|_| opt.backward_step(&w.sqr()?.sum_all()?))
    })?;
    let multipliers: Vec<f64> =
        told.iter().map(|(_, fields)| fields["multiplier"].as_f64().unwrap()).collect();
    assert_eq!(multipliers, [1., 0.75, 0.5]);
    Ok(())
}

#[test]
fn a_skipped_step_is_a_warning() -> Result<()> {
    let (w, mut opt) = optimizer(ParamsSrkl::adamw(0.1))?;
    let told = events(LevelFilter::WARN, || {
        for gradient in [1., f64::NAN, f64::INFINITY, 1.] {
            opt.step(&grads([(&w, tensor(&[gradient, 1.], DType::F32)?)]))?;
        }
        Ok(())
    })?;
    let warning = |step: u64, skipped: u64| {
        let message = "step skipped: a gradient is not finite";
        ("WARN".to_string(), json!({ "message": message, "step": step, "skipped_steps": skipped }))
    };
    assert_eq!(told, [warning(2, 1), warning(3, 2)]);
    Ok(())
}

#[test]
fn metrics_are_told_when_asked() -> Result<()> {
    let (w, mut opt) = optimizer(ParamsSrkl::braked_adam())?;
    let told = events(LevelFilter::INFO, || {
        opt.backward_step_with(|| w.sqr()?.sum_all())?;
        opt.metrics()?.emit();
        Ok(())
    })?;
    let parameter = opt.telemetry()?.remove(0);
    let fields = json!({
        "message": "parameter", "step": 1, "name": "w", "group": "default", "phi": parameter.phi,
        "curvature": parameter.curvature, "estimate_age": 0, "skipped": 0,
        "learning_rate": 10., "skipped_steps": 0,
    });
    let fields: serde_json::Map<_, _> = fields
        .as_object()
        .unwrap()
        .clone()
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .collect();
    assert_eq!(told, [("INFO".to_string(), Value::Object(fields))]);
    Ok(())
}
