//! Rows of text, one for each parameter: CSV and JSON lines.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use candle_core::{Result, bail};

use super::{Metrics, Out};
use crate::telemetry::BlockTelemetry;

/// The columns of a row, in order. `step`, `learning_rate` and `skipped_steps` are those of [`Metrics`], the others fields of
/// [`BlockTelemetry`].
pub const COLUMNS: [&str; 12] = [
    "step",
    "name",
    "group",
    "phi",
    "curvature",
    "estimate_age",
    "grad_norm",
    "step_norm",
    "param_norm",
    "skipped",
    "learning_rate",
    "skipped_steps",
];

enum Value<'a> {
    Text(&'a str),
    Count(Option<u64>),
    Number(Option<f64>),
}

/// What stands under [`COLUMNS`].
fn row<'a>(metrics: &Metrics, parameter: &'a BlockTelemetry) -> [Value<'a>; COLUMNS.len()] {
    use Value::{Count, Number, Text};
    [
        Count(Some(metrics.step)),
        Text(&parameter.name),
        Text(&parameter.group),
        Number(parameter.phi),
        Number(parameter.curvature),
        Count(parameter.estimate_age),
        Number(parameter.grad_norm),
        Number(parameter.step_norm),
        Number(parameter.param_norm),
        Count(Some(parameter.skipped)),
        Number(Some(metrics.learning_rate)),
        Count(Some(metrics.skipped_steps)),
    ]
}

/// Writes CSV as RFC 4180 has it, but for lines that end in `\n`: a line of [`COLUMNS`], then a row for each parameter.
///
/// What is `None` is left empty. Numbers have the fewest digits that give the same f64 again; those that are not finite
/// are `NaN`, `inf` and `-inf`.
#[derive(Debug)]
pub struct Csv<W> {
    out: Out<W>,
    /// Whether the line of columns is there.
    begun: bool,
}

impl Csv<File> {
    /// A new file, in place of one that is there.
    ///
    /// # Errors
    ///
    /// A file that can't be made. The error names it.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { out: create(path.as_ref())?, begun: false })
    }

    /// Goes on at the end of a file, or begins one that is not there. A last row that does not end is cut off.
    ///
    /// A training that goes on from a checkpoint writes the steps after it once more: of two rows of one step and one name the
    /// later counts.
    ///
    /// # Errors
    ///
    /// A file that can't be opened, or whose first line is not that of [`COLUMNS`]. The error names it.
    pub fn append(path: impl AsRef<Path>) -> Result<Self> {
        let (out, begun) = append(path.as_ref(), &header(), false)?;
        Ok(Self { out, begun })
    }
}

impl<W: Write> Csv<W> {
    /// Rows for any writer, which begin with the columns.
    #[must_use]
    pub fn new(writer: W) -> Self {
        Self { out: Out::new(writer), begun: false }
    }

    /// Writes a row for each parameter.
    ///
    /// # Errors
    ///
    /// Those of writing. The error names the file, if this was made with its path.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let mut text = if self.begun { String::new() } else { header() };
        for parameter in &metrics.parameters {
            for (i, value) in row(metrics, parameter).into_iter().enumerate() {
                if i > 0 {
                    text.push(',');
                }
                match value {
                    Value::Text(field) => quote(&mut text, field),
                    Value::Count(count) => push(&mut text, count),
                    Value::Number(number) => push(&mut text, number),
                }
            }
            text.push('\n');
        }
        self.out.put(text.as_bytes())?;
        self.begun = true;
        Ok(())
    }

    /// The writer that this was made with.
    #[must_use]
    pub fn into_inner(self) -> W {
        self.out.writer
    }
}

/// Writes [JSON lines](https://jsonlines.org): an object for each parameter, with [`COLUMNS`] as its keys.
///
/// What is `None` is `null`. Numbers are as in [`Csv`]; JSON has none that are not finite, so these are the strings `"NaN"`,
/// `"Infinity"` and `"-Infinity"`, as in the JSON of protocol buffers.
#[derive(Debug)]
pub struct JsonLines<W>(Out<W>);

impl JsonLines<File> {
    /// A new file, in place of one that is there.
    ///
    /// # Errors
    ///
    /// A file that can't be made. The error names it.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self(create(path.as_ref())?))
    }

    /// Goes on at the end of a file, as [`Csv::append`] does.
    ///
    /// # Errors
    ///
    /// A file that can't be opened, or that does not begin with a line of this kind. The error names it.
    pub fn append(path: impl AsRef<Path>) -> Result<Self> {
        let begin = format!("{{\"{}\":", COLUMNS[0]);
        Ok(Self(append(path.as_ref(), &begin, true)?.0))
    }
}

impl<W: Write> JsonLines<W> {
    /// Lines for any writer.
    #[must_use]
    pub fn new(writer: W) -> Self {
        Self(Out::new(writer))
    }

    /// Writes a line for each parameter.
    ///
    /// # Errors
    ///
    /// Those of writing. The error names the file, if this was made with its path.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let mut text = String::new();
        for parameter in &metrics.parameters {
            for (i, (key, value)) in COLUMNS.iter().zip(row(metrics, parameter)).enumerate() {
                text.push(if i == 0 { '{' } else { ',' });
                string(&mut text, key);
                text.push(':');
                match value {
                    Value::Text(value) => string(&mut text, value),
                    Value::Count(None) | Value::Number(None) => text.push_str("null"),
                    Value::Count(count) => push(&mut text, count),
                    Value::Number(Some(x)) if x.is_nan() => text.push_str("\"NaN\""),
                    Value::Number(Some(f64::INFINITY)) => text.push_str("\"Infinity\""),
                    Value::Number(Some(f64::NEG_INFINITY)) => text.push_str("\"-Infinity\""),
                    Value::Number(number) => push(&mut text, number),
                }
            }
            text.push_str("}\n");
        }
        self.0.put(text.as_bytes())
    }

    /// The writer that this was made with.
    #[must_use]
    pub fn into_inner(self) -> W {
        self.0.writer
    }
}

/// The line of the columns.
fn header() -> String {
    COLUMNS.join(",") + "\n"
}

/// `Debug` writes 1e-300 where `Display` writes three hundred zeros.
fn push(text: &mut String, value: Option<impl std::fmt::Debug>) {
    if let Some(value) = value {
        write!(text, "{value:?}").expect("a string takes all");
    }
}

/// A field of CSV, in quotes if it needs them.
fn quote(text: &mut String, field: &str) {
    if field.contains([',', '"', '\n', '\r']) {
        text.push('"');
        text.push_str(&field.replace('"', "\"\""));
        text.push('"');
    } else {
        text.push_str(field);
    }
}

/// A string of JSON.
fn string(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            '\0'..'\x20' => write!(text, "\\u{:04x}", u32::from(c)).expect("a string takes all"),
            _ => text.push(c),
        }
    }
    text.push('"');
}

fn create(path: &Path) -> Result<Out<File>> {
    let file = File::create(path).map_err(|e| candle_core::Error::from(e).with_path(path))?;
    Ok(Out::of_file(file, path))
}

/// A file to go on with behind its last whole row, and whether there is one. It must begin with `begin`, or be the beginning of
/// that. A row may have line ends between quotes, as in a name, unless it `is_line`.
fn append(path: &Path, begin: &str, is_line: bool) -> Result<(Out<File>, bool)> {
    let open = || {
        let file = File::options().read(true).append(true).create(true).open(path)?;
        let mut lines = BufReader::new(&file);
        let mut line = vec![];
        lines.read_until(b'\n', &mut line)?;
        let first = String::from_utf8_lossy(&line);
        if !first.starts_with(begin) && !begin.starts_with(&*first) {
            bail!("expected a file that begins with `{}`, found `{}`", begin.trim(), first.trim())
        }
        let (mut length, mut end, mut quoted) = (0, 0, false);
        while !line.is_empty() {
            length += line.len() as u64;
            // Quotes that a torn row has opened end where the next one begins.
            quoted &= !begins_row(&line);
            quoted ^= !is_line && line.iter().filter(|&&byte| byte == b'"').count() % 2 == 1;
            if !quoted && line.ends_with(b"\n") {
                end = length;
            }
            line.clear();
            lines.read_until(b'\n', &mut line)?;
        }
        file.set_len(end)?;
        Ok((Out::of_file(file, path), end > 0))
    };
    open().map_err(|e: candle_core::Error| e.with_path(path))
}

/// Whether a line of CSV is the first of a row, which begins with the number of a step.
fn begins_row(line: &[u8]) -> bool {
    let digits = line.iter().take_while(|byte| byte.is_ascii_digit()).count();
    digits > 0 && line.get(digits) == Some(&b',')
}
