//! Metrics as files: what other programs read from them is what the optimizer has told.

mod common;

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Result};
use candle_srkl::monitor::{COLUMNS, Csv, JsonLines, Metrics, TensorBoard};
use candle_srkl::{LrSchedule, ParamsSrkl, Srkl};
use common::*;
use serde_json::Value;

/// A name that needs quotes everywhere.
const AWKWARD: &str = "a \"b\", \\c\nd\te\u{1}é";

/// Metrics after each of `steps` steps of two parameters.
fn training(steps: usize) -> Result<Vec<Metrics>> {
    let (a, b) = (var(&[3., -4.], DType::F32)?, var(&[1., 0.5, 2.], DType::F32)?);
    let named = [(AWKWARD.to_string(), a.clone()), ("b".to_string(), b.clone())];
    let params = ParamsSrkl::braked_adam();
    let mut opt = Srkl::builder()
        .group("late", ParamsSrkl { weight_decay: 0.1, ..params.clone() }, |name, _| name == "b")
        .default_group(params)
        .build(named)?;
    opt.record_norms(true);
    let step = |_| {
        opt.backward_step_with(|| a.sqr()?.sum_all()? + b.sqr()?.sum_all()?)?;
        opt.metrics()
    };
    (0..steps).map(step).collect()
}

/// What a text row has in a column: nothing, a word or a number.
fn column(metrics: &Metrics, parameter: usize, column: &str) -> Value {
    let p = &metrics.parameters[parameter];
    match column {
        "step" => metrics.step.into(),
        "name" => p.name.clone().into(),
        "group" => p.group.clone().into(),
        "phi" => p.phi.into(),
        "curvature" => p.curvature.into(),
        "estimate_age" => p.estimate_age.into(),
        "grad_norm" => p.grad_norm.into(),
        "step_norm" => p.step_norm.into(),
        "param_norm" => p.param_norm.into(),
        "skipped" => p.skipped.into(),
        "learning_rate" => metrics.learning_rate.into(),
        "skipped_steps" => metrics.skipped_steps.into(),
        _ => panic!("a column {column} that nobody expects"),
    }
}

fn rows_of(metrics: &[Metrics]) -> impl Iterator<Item = (&Metrics, usize)> {
    metrics.iter().flat_map(|m| (0..m.parameters.len()).map(move |parameter| (m, parameter)))
}

#[test]
fn metrics_are_the_telemetry_with_the_step() -> Result<()> {
    let w = var(&[3., -4.], DType::F32)?;
    let mut opt = Srkl::builder()
        .default_group(ParamsSrkl::reference())
        .build([("w".to_string(), w.clone())])?;
    for gradient in [1., f64::NAN, 2.] {
        let gradient = tensor(&[gradient, 1.], DType::F32)?;
        candle_nn::Optimizer::step(&mut opt, &grads([(&w, gradient)]))?;
    }
    candle_nn::Optimizer::set_learning_rate(&mut opt, 5e-4);
    let metrics = opt.metrics()?;
    assert_eq!((metrics.step, metrics.skipped_steps), (3, 1));
    assert_eq!(metrics.learning_rate, 5e-4);
    assert_eq!(metrics.parameters, opt.telemetry()?);
    Ok(())
}

/// A row has the learning rate of its step, which is `phi` where nothing brakes.
#[test]
fn learning_rates_are_those_of_their_steps() -> Result<()> {
    let w = var(&[3., -4.], DType::F32)?;
    let mut opt = Srkl::builder()
        .default_group(ParamsSrkl::adamw(0.1))
        .build([("w".to_string(), w.clone())])?;
    opt.set_schedule(Some(LrSchedule::linear_decay(2, 0.)))?;
    assert_eq!(opt.metrics()?.learning_rate, 0.1);
    for expected in [0.1, 0.05, 0.] {
        candle_nn::Optimizer::backward_step(&mut opt, &w.sqr()?.sum_all()?)?;
        let metrics = opt.metrics()?;
        assert_eq!(metrics.learning_rate, expected);
        assert_eq!(metrics.parameters[0].phi, Some(expected));
    }
    // What is set by hand counts from then on: replays of a captured step go by it.
    opt.set_schedule_step(1)?;
    assert_eq!(opt.metrics()?.learning_rate, 0.05);
    candle_nn::Optimizer::set_learning_rate(&mut opt, 7.);
    assert_eq!(opt.metrics()?.learning_rate, 7.);
    Ok(())
}

#[test]
fn csv_reads_back() -> Result<()> {
    let metrics = training(3)?;
    let mut csv = Csv::new(vec![]);
    metrics.iter().try_for_each(|metrics| csv.write(metrics))?;
    let bytes = csv.into_inner();
    let mut reader = csv::Reader::from_reader(&*bytes);
    assert_eq!(reader.headers().unwrap(), COLUMNS.as_slice());
    let records: Vec<_> = reader.records().collect::<csv::Result<_>>().unwrap();
    assert_eq!(records.len(), 6);
    for (record, (metrics, parameter)) in records.iter().zip(rows_of(&metrics)) {
        for (field, name) in record.iter().zip(COLUMNS) {
            match column(metrics, parameter, name) {
                Value::String(text) => assert_eq!(field, text),
                Value::Null => assert_eq!(field, "", "{name}"),
                number => assert_eq!(field.parse::<f64>().ok(), number.as_f64(), "{name}"),
            }
        }
    }
    Ok(())
}

#[test]
fn json_lines_read_back() -> Result<()> {
    let metrics = training(3)?;
    let mut json = JsonLines::new(vec![]);
    metrics.iter().try_for_each(|metrics| json.write(metrics))?;
    let text = String::from_utf8(json.into_inner()).unwrap();
    assert_eq!(text.lines().count(), 6);
    for (line, (metrics, parameter)) in text.lines().zip(rows_of(&metrics)) {
        let object: Value = serde_json::from_str(line).unwrap();
        assert_eq!(object.as_object().unwrap().len(), COLUMNS.len());
        for name in COLUMNS {
            let expected = column(metrics, parameter, name);
            match (object[name].as_f64(), expected.as_f64()) {
                // As serde_json reads numbers by default, up to a unit in the last place.
                (Some(read), Some(told)) => assert_close(read, told, 4. * f64::EPSILON),
                _ => assert_eq!(object[name], expected, "{name}"),
            }
        }
    }
    Ok(())
}

/// What JSON has no numbers for, and numbers of many digits.
#[test]
fn extreme_numbers_read_back() -> Result<()> {
    let mut metrics = training(1)?.remove(0);
    let extremes = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 5e-324, f64::MAX, -0., 0.1 + 0.2];
    for x in extremes {
        metrics.parameters[0].curvature = Some(x);
        let (mut csv, mut json) = (Csv::new(vec![]), JsonLines::new(vec![]));
        csv.write(&metrics)?;
        json.write(&metrics)?;
        let record = csv::Reader::from_reader(&*csv.into_inner()).records().next().unwrap();
        let field = record.unwrap()[4].to_string();
        assert!(field.len() < 30);
        let line = String::from_utf8(json.into_inner()).unwrap();
        let object: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
        let value = &object["curvature"];
        // Rust's `parse` takes "Infinity" and "NaN", as those of Python and JavaScript do.
        let number = value.as_f64().or_else(|| value.as_str()?.parse().ok());
        for read in [field.parse().ok(), number] {
            assert_eq!(read.map(f64::to_bits), Some(x.to_bits()), "{x}: {field}, {value}");
        }
    }
    Ok(())
}

#[test]
fn files_are_gone_on_with_behind_their_last_whole_line() -> Result<()> {
    let metrics = training(2)?;
    let folder = tempfile::tempdir()?;
    let [csv, json] = ["t.csv", "t.jsonl"].map(|name| folder.path().join(name));
    let whole = |path: &Path| -> Result<Vec<u8>> {
        if path == csv {
            let mut file = Csv::create(path)?;
            metrics.iter().try_for_each(|metrics| file.write(metrics))?;
        } else {
            let mut file = JsonLines::create(path)?;
            metrics.iter().try_for_each(|metrics| file.write(metrics))?;
        }
        Ok(fs::read(path)?)
    };
    let append = |path: &Path| -> Result<()> {
        if path == csv {
            Csv::append(path)?.write(&metrics[1])
        } else {
            JsonLines::append(path)?.write(&metrics[1])
        }
    };
    // A torn line longer than what is read at once, too.
    for torn in [&b""[..], b"2,\"a", b"2,\"a\nb\n", &[b'x'; 10_000]] {
        for path in [&csv, &json] {
            if path == &json && torn.ends_with(b"\n") {
                continue; // Names have no line ends there.
            }
            let expected = whole(path)?;
            // The first of two.
            if path == &csv {
                Csv::create(path)?.write(&metrics[0])?;
            } else {
                JsonLines::create(path)?.write(&metrics[0])?;
            }
            fs::File::options().append(true).open(path)?.write_all(torn)?;
            append(path)?;
            assert_eq!(fs::read(path)?, expected, "{torn:?}");
        }
    }
    // A file that is not there, and one that was torn in its first line.
    for torn in [None, Some("step,na")] {
        fs::remove_file(&csv)?;
        torn.map_or(Ok(()), |torn| fs::write(&csv, torn))?;
        append(&csv)?;
        assert_eq!(fs::read_to_string(&csv)?.matches("step,name").count(), 1);
    }
    Ok(())
}

/// Whatever quotes names have, and whatever was torn in the middle: what is behind it stays.
#[test]
fn rows_behind_a_torn_one_stay() -> Result<()> {
    let mut metrics = training(1)?.remove(0);
    metrics.parameters[1].name = "w\"".to_string();
    let folder = tempfile::tempdir()?;
    let [csv, json] = ["t.csv", "t.jsonl"].map(|name| folder.path().join(name));
    Csv::create(&csv)?.write(&metrics)?;
    JsonLines::create(&json)?.write(&metrics)?;
    for (path, torn) in [(&csv, "2,\"a"), (&json, "{\"step\":2,\"na")] {
        fs::File::options().append(true).open(path)?.write_all(torn.as_bytes())?;
        // By somebody who goes on behind it.
        let file = fs::File::options().append(true).open(path)?;
        if path == &csv {
            let mut rest = Csv::new(vec![]);
            rest.write(&metrics)?;
            let rest = String::from_utf8(rest.into_inner()).unwrap();
            let rest: String = rest.split_inclusive('\n').skip(1).collect();
            { file }.write_all(rest.as_bytes())?;
        } else {
            JsonLines::new(file).write(&metrics)?;
        }
        let before = fs::read(path)?;
        if path == &csv {
            Csv::append(path)?.write(&metrics)?;
        } else {
            JsonLines::append(path)?.write(&metrics)?;
        }
        let after = fs::read(path)?;
        assert!(after.starts_with(&before) && after.len() > before.len(), "{torn}");
    }
    Ok(())
}

#[test]
fn errors_name_the_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let missing = folder.path().join("missing").join("t.csv");
    let missing_name = missing.to_str().unwrap();
    assert_error(Csv::create(&missing), &[missing_name]);
    assert_error(Csv::append(&missing), &[missing_name]);
    assert_error(JsonLines::create(&missing), &[missing_name]);
    assert_error(JsonLines::append(&missing), &[missing_name]);

    let other = folder.path().join("other.csv");
    fs::write(&other, "step,loss\n1,2\nhalf")?;
    assert_error(Csv::append(&other), &[other.to_str().unwrap(), "step,name,group", "`step,loss`"]);
    assert_eq!(fs::read_to_string(&other)?, "step,loss\n1,2\nhalf");
    // Files of others, without a line end too, and each other's.
    let config = folder.path().join("config.json");
    for content in ["{\"a\":1}", "step", "{\"a\":1}\n", "step,name\n1"] {
        fs::write(&config, content)?;
        assert_error(JsonLines::append(&config), &["config.json", "`{\"step\":`"]);
        assert_eq!(fs::read_to_string(&config)?, content);
        // A torn line of columns is none of another file.
        assert_eq!(Csv::append(&config).is_ok(), content == "step", "{content}");
        let left = if content == "step" { "" } else { content };
        assert_eq!(fs::read_to_string(&config)?, left);
    }
    // A file where a folder has to be.
    assert_error(TensorBoard::create(&other), &[other.to_str().unwrap()]);

    /// A disk that is full.
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::other("no space"))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let metrics = training(1)?.remove(0);
    assert_error(Csv::new(Full).write(&metrics), &["no space"]);
    assert_error(JsonLines::new(Full).write(&metrics), &["no space"]);
    assert_error(TensorBoard::new(Full).write(&metrics), &["no space"]);
    #[cfg(target_os = "linux")]
    assert_error(Csv::create("/dev/full")?.write(&metrics), &["/dev/full"]);
    Ok(())
}

/// Each file is another, and the names of all say to TensorBoard what they are.
#[test]
fn event_files_have_names_in_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let runs = folder.path().join("runs").join("1");
    let before = |_| -> Result<_> {
        TensorBoard::create(&runs)?.add_scalar("x", 1., 1)?;
        let names = fs::read_dir(&runs)?.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        Ok(names)
    };
    let names: Vec<Vec<String>> = (0..3).map(before).collect::<Result<_>>()?;
    assert!(names[2].iter().all(|name| name.contains("tfevents")));
    assert_eq!(names.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(names[2].starts_with(&names[1]) && names[1].starts_with(&names[0]));
    Ok(())
}

/// What TensorBoard's own reader has of a training that was taken up again from a checkpoint of step 2.
///
/// `TENSORBOARD_PYTHON`: a Python that has the package, if `python3` does not.
#[test]
#[ignore = "needs Python's package tensorboard: TENSORBOARD_PYTHON=venv/bin/python"]
fn tensorboard_reads_the_scalars() -> Result<()> {
    let mut metrics = training(4)?;
    metrics[2].parameters[1].curvature = Some(f64::INFINITY);
    metrics[2].parameters[1].phi = Some(f64::NAN);
    let folder = tempfile::tempdir()?;
    let mut lost = metrics.clone();
    lost[2].learning_rate = -1.;
    let mut board = TensorBoard::create(folder.path())?;
    for (step, metrics) in (1..).zip(&lost) {
        board.write(metrics)?;
        board.add_scalar("loss", 1. / step as f64, step)?;
    }
    let mut board = TensorBoard::create(folder.path())?;
    board.purge_from(3)?;
    metrics[2..].iter().try_for_each(|metrics| board.write(metrics))?;
    board.add_scalar("loss", 7., 300)?;

    let python = env::var("TENSORBOARD_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/read_tensorboard.py");
    let output = Command::new(python).arg(script).arg(folder.path()).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    let scalars = |tag: &str| -> Vec<(u64, f32)> {
        let events = read[tag].as_array().unwrap_or_else(|| panic!("no {tag} in {read}"));
        let value = |event: &Value| event[1].as_str().unwrap().parse::<f64>().unwrap() as f32;
        events.iter().map(|event| (event[0].as_u64().unwrap(), value(event))).collect()
    };
    assert_eq!(scalars("loss"), [(1, 1.), (2, 0.5), (300, 7.)]);
    let mut tags = 1;
    for name in &COLUMNS[3..] {
        for (parameter, told) in metrics[0].parameters.iter().enumerate() {
            let global = ["learning_rate", "skipped_steps"].contains(name);
            let tag = match global {
                true => format!("optimizer/{name}"),
                false => format!("{name}/{}", told.name),
            };
            let expected: Vec<(u64, u32)> = metrics
                .iter()
                .filter_map(|m| {
                    let value = match *name {
                        // What `Value` has no number for.
                        "phi" => m.parameters[parameter].phi,
                        "curvature" => m.parameters[parameter].curvature,
                        name => column(m, parameter, name).as_f64(),
                    };
                    Some((m.step, (value? as f32).to_bits()))
                })
                .collect();
            assert!(!expected.is_empty(), "{tag}");
            let read = scalars(&tag).into_iter().map(|(step, value)| (step, value.to_bits()));
            assert_eq!(read.collect::<Vec<_>>(), expected, "{tag}");
            tags += (!global || parameter == 0) as usize;
        }
    }
    assert_eq!(read.as_object().unwrap().len(), tags);
    Ok(())
}
