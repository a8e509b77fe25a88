//! The finished runs, in files that a later start reads.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use csv::StringRecord;

use crate::run::{Job, Point, Run};
use crate::tasks::Task;

const HEADER: [&str; 12] = [
    "plan",
    "task",
    "optimizer",
    "lr",
    "seed",
    "score",
    "initial_loss",
    "final_loss",
    "diverged",
    "evaluations",
    "steps",
    "seconds",
];

/// `runs.csv` in the folder of the study, a line for each finished run, and `curves/`, a file for
/// each run that is drawn.
pub struct Results {
    folder: PathBuf,
    csv: File,
    runs: Vec<Run>,
}

impl Results {
    /// Reads what is there already.
    pub fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder.join("curves"))?;
        let path = folder.join("runs.csv");
        let mut csv = OpenOptions::new().append(true).create(true).open(&path)?;
        let mut text = fs::read_to_string(&path)?;
        // A last line without an end was being written when the study was stopped: it will be run
        // again.
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        csv.set_len(text.len() as u64)?;
        if text.is_empty() {
            csv.write_all(line(&HEADER).as_bytes())?;
        }
        let runs = read(&text).with_context(|| path.display().to_string())?;
        Ok(Self { folder: folder.to_path_buf(), csv, runs })
    }

    pub fn find(&self, job: Job) -> Option<&Run> {
        self.runs.iter().find(|run| run.job == job)
    }

    pub fn add(&mut self, run: Run, curve: Option<&[Point]>) -> Result<()> {
        // The curve first: a run that is listed is complete.
        if let Some(curve) = curve {
            write_curve(&self.curve_path(run.job), curve)?;
        }
        // By one call, so that there are whole lines only.
        self.csv.write_all(format(&run).as_bytes())?;
        self.runs.push(run);
        Ok(())
    }

    /// `None` if the run has not been recorded.
    pub fn curve(&self, job: Job) -> Result<Option<Vec<Point>>> {
        let path = self.curve_path(job);
        if !path.exists() {
            return Ok(None);
        }
        let context = || path.display().to_string();
        let mut csv = csv::Reader::from_path(&path).with_context(context)?;
        let points = csv.records().map(|record| {
            let record = record?;
            let brake: String = value(&record, 2)?;
            Ok(Point {
                evaluations: value(&record, 0)?,
                loss: value(&record, 1)?,
                brake: if brake.is_empty() { None } else { Some(brake.parse()?) },
            })
        });
        Ok(Some(points.collect::<Result<_>>().with_context(context)?))
    }

    fn curve_path(&self, job: Job) -> PathBuf {
        let Job { task, full, rule, seed, .. } = job;
        let name = format!("{}-{}-{}-seed{seed}.csv", plan(full), name(task), name(rule));
        self.folder.join("curves").join(name)
    }
}

fn write_curve(path: &Path, curve: &[Point]) -> Result<()> {
    let mut text = line(&["evaluations", "loss", "brake"]);
    for Point { evaluations, loss, brake } in curve {
        let brake = brake.map_or(String::new(), |brake| format!("{brake:?}"));
        text += &line(&[&evaluations.to_string(), &format!("{loss:?}"), &brake]);
    }
    fs::write(path, text).with_context(|| path.display().to_string())
}

fn format(run: &Run) -> String {
    let Job { task, full, rule, lr, seed } = run.job;
    line(&[
        plan(full),
        &name(task),
        &name(rule),
        &format!("{lr:?}"),
        &seed.to_string(),
        &format!("{:?}", run.score),
        &format!("{:?}", run.initial_loss),
        &format!("{:?}", run.final_loss),
        &run.diverged.to_string(),
        &run.evaluations.to_string(),
        &run.steps.to_string(),
        &format!("{:.4}", run.seconds),
    ])
}

fn read(text: &str) -> Result<Vec<Run>> {
    let mut csv = csv::Reader::from_reader(text.as_bytes());
    if !text.is_empty() {
        ensure!(csv.headers()? == HEADER[..], "expected the columns {}", HEADER.join(","));
    }
    csv.records().map(|record| parse(&record?)).collect()
}

/// Of a line that has as many fields as the header.
fn parse(record: &StringRecord) -> Result<Run> {
    let full = match &record[0] {
        "short" => false,
        "full" => true,
        other => bail!("expected the plan short or full, got {other:?}"),
    };
    // The full study's transformer had 2 layers of 64 before that was a task of its own.
    let task = if full && &record[1] == "char-lm" { Task::CharLm64 } else { choice(&record[1])? };
    let job = Job::new(task, full, choice(&record[2])?, value(record, 3)?, value(record, 4)?);
    Ok(Run {
        job,
        score: value(record, 5)?,
        initial_loss: value(record, 6)?,
        final_loss: value(record, 7)?,
        diverged: value(record, 8)?,
        evaluations: value(record, 9)?,
        steps: value(record, 10)?,
        seconds: value(record, 11)?,
    })
}

fn value<T: FromStr>(record: &StringRecord, column: usize) -> Result<T>
where
    T::Err: Error + Send + Sync + 'static,
{
    let field = record.get(column).with_context(|| format!("column {} is missing", column + 1))?;
    field.parse().with_context(|| format!("column {} is not valid: {field:?}", column + 1))
}

/// As on the command line.
fn name(choice: impl ValueEnum) -> String {
    choice.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
}

fn choice<T: ValueEnum>(name: &str) -> Result<T> {
    T::from_str(name, false).map_err(anyhow::Error::msg)
}

fn plan(full: bool) -> &'static str {
    if full { "full" } else { "short" }
}

/// No field has a comma in it.
fn line(fields: &[&str]) -> String {
    fields.join(",") + "\n"
}
