//! TensorBoard's event files.
//!
//! Such a file is a sequence of records: the length of the data in 8 bytes, little endian, its checksum in 4, the data, and its
//! checksum. The data is a protocol buffer `Event`, of which this writes
//!
//! ```text
//! Event       wall_time: double = 1   step: int64 = 2   file_version: string = 3   summary: Summary = 5
//!             session_log: SessionLog = 7
//! Summary     value: repeated Value = 1
//! Value       tag: string = 1   simple_value: float = 2
//! SessionLog  status: enum = 1, of which 1 is START
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use candle_core::{Error, Result};

use super::{Metrics, Out};

/// What the first record says.
const VERSION: &str = "brain.Event:2";

/// Writes scalars as TensorBoard reads them, which keeps f32.
///
/// Each number of a parameter has the tag `column/name`, as `phi/layer.weight`, so that TensorBoard shows a section for each
/// column of [`COLUMNS`](super::COLUMNS); the others are `optimizer/learning_rate` and `optimizer/skipped_steps`. What is `None`
/// is left out.
#[derive(Debug)]
pub struct TensorBoard<W> {
    out: Out<W>,
    /// Whether the first record is there.
    begun: bool,
}

impl TensorBoard<File> {
    /// A new file in `folder`, which is made if it is not there. `tensorboard --logdir` shows all files of a folder as one run:
    /// where a training goes on from a checkpoint, [`purge_from`](Self::purge_from) drops what the earlier ones have of later
    /// steps.
    ///
    /// # Errors
    ///
    /// A folder or a file that can't be made. The error names it.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|e| Error::from(e).with_path(folder))?;
        loop {
            // TensorBoard reads files in the order of their names.
            let now = now();
            let (seconds, rest) = (now.as_secs(), now.subsec_nanos());
            let path = folder.join(format!("events.out.tfevents.{seconds:010}.{rest:09}.srkl"));
            match File::create_new(&path) {
                Ok(file) => return Ok(Self { out: Out::of_file(file, &path), begun: false }),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::from(e).with_path(path)),
            }
        }
    }
}

impl<W: Write> TensorBoard<W> {
    /// Records for any writer, from the beginning of a file on.
    #[must_use]
    pub fn new(writer: W) -> Self {
        Self { out: Out::new(writer), begun: false }
    }

    /// Writes the numbers of all parameters, in one record.
    ///
    /// # Errors
    ///
    /// Those of writing. The error names the file, if this was made with its folder.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let mut summary = vec![];
        scalar(&mut summary, "optimizer/learning_rate", metrics.learning_rate);
        scalar(&mut summary, "optimizer/skipped_steps", metrics.skipped_steps as f64);
        for parameter in &metrics.parameters {
            let values = [
                ("phi", parameter.phi),
                ("curvature", parameter.curvature),
                ("estimate_age", parameter.estimate_age.map(|age| age as f64)),
                ("grad_norm", parameter.grad_norm),
                ("step_norm", parameter.step_norm),
                ("param_norm", parameter.param_norm),
                ("skipped", Some(parameter.skipped as f64)),
            ];
            for (column, value) in values {
                if let Some(value) = value {
                    scalar(&mut summary, &format!("{column}/{}", parameter.name), value);
                }
            }
        }
        self.put(metrics.step, SUMMARY, &summary)
    }

    /// Writes a number of yours, as a loss.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write).
    pub fn add_scalar(&mut self, tag: &str, value: f64, step: u64) -> Result<()> {
        let mut summary = vec![];
        scalar(&mut summary, tag, value);
        self.put(step, SUMMARY, &summary)
    }

    /// Makes TensorBoard drop what it has read so far of `step` and later ones: to be called first where a training goes on from
    /// a checkpoint, with the number of its next step, [`Metrics::step`] plus 1.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write).
    pub fn purge_from(&mut self, step: u64) -> Result<()> {
        self.put(step, SESSION_LOG, &START)
    }

    /// The writer that this was made with.
    #[must_use]
    pub fn into_inner(self) -> W {
        self.out.writer
    }

    /// A record of an event that has a message in one field.
    fn put(&mut self, step: u64, field: u8, message: &[u8]) -> Result<()> {
        let wall_time = now().as_secs_f64();
        let mut records = vec![];
        if !self.begun {
            let mut event = event(wall_time, 0);
            bytes(&mut event, FILE_VERSION, VERSION.as_bytes());
            record(&mut records, &event);
        }
        let mut event = event(wall_time, step);
        bytes(&mut event, field, message);
        record(&mut records, &event);
        self.out.put(&records)?;
        self.begun = true;
        Ok(())
    }
}

/// Since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

// Keys of fields: the number of the field times 8, and how its value is written: 0 an integer in groups of seven bits, 1 and 5
// eight and four bytes, 2 so many bytes.
const WALL_TIME: u8 = 1 << 3 | 1;
const STEP: u8 = 2 << 3;
const FILE_VERSION: u8 = 3 << 3 | 2;
const SUMMARY: u8 = 5 << 3 | 2;
const SESSION_LOG: u8 = 7 << 3 | 2;
const VALUE: u8 = 1 << 3 | 2;
const TAG: u8 = 1 << 3 | 2;
const SIMPLE_VALUE: u8 = 2 << 3 | 5;
/// A whole `SessionLog`.
const START: [u8; 2] = [1 << 3, 1];

fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = vec![WALL_TIME];
    event.extend(wall_time.to_le_bytes());
    // As usual, a field of the default is left out.
    if step > 0 {
        event.push(STEP);
        varint(&mut event, step);
    }
    event
}

/// Adds a `Value` to a `Summary`.
fn scalar(summary: &mut Vec<u8>, tag: &str, value: f64) {
    let mut message = vec![];
    bytes(&mut message, TAG, tag.as_bytes());
    message.push(SIMPLE_VALUE);
    message.extend((value as f32).to_le_bytes());
    bytes(summary, VALUE, &message);
}

fn bytes(message: &mut Vec<u8>, key: u8, value: &[u8]) {
    message.push(key);
    varint(message, value.len() as u64);
    message.extend(value);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn record(records: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    records.extend(length);
    records.extend(masked(crc32c(&length)).to_le_bytes());
    records.extend(data);
    records.extend(masked(crc32c(data)).to_le_bytes());
}

/// As records keep checksums, so that those of data that has checksums in it are good ones too.
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The checksum of Castagnoli's polynomial, whose bits are mirrored here.
fn crc32c(data: &[u8]) -> u32 {
    let next = |crc: u32, &byte: &u8| (crc >> 8) ^ TABLE[((crc ^ u32::from(byte)) & 0xff) as usize];
    !data.iter().fold(!0, next)
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ ((crc & 1) * 0x82f6_3b78);
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Of "123456789", as catalogues of checksums have it.
    #[test]
    fn crc32c_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    /// The bytes that TensorBoard 2.21 makes of the same three events by its `event_pb2.Event` and `RecordWriter`.
    #[test]
    fn records_are_tensorboards() {
        let theirs = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c\
            1c00000000000000c8c1951d09000000000000044010ac022a0e0a0c0a057068692f77150000803e57c87b8e\
            0f000000000000006d532b0909000000000000044010073a0208019aaf83ce";
        let mut records = vec![];
        let mut version = event(1.5, 0);
        bytes(&mut version, FILE_VERSION, VERSION.as_bytes());
        record(&mut records, &version);
        let mut summary = vec![];
        scalar(&mut summary, "phi/w", 0.25);
        for (step, field, message) in [(300, SUMMARY, summary), (7, SESSION_LOG, START.to_vec())] {
            let mut event = event(2.5, step);
            bytes(&mut event, field, &message);
            record(&mut records, &event);
        }
        let ours: String = records.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(ours, theirs);
    }
}
