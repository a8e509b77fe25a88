//! Checkpoints: the optimizer's state in one safetensors file.
//!
//! | where | key | value |
//! |---|---|---|
//! | metadata | `format` | `candle-srkl` |
//! | metadata | `version` | `1`, the version of this layout |
//! | metadata | `steps`, `skipped_steps` | the counters, decimal |
//! | metadata | `schedule`, `grad_scale` | f64, the shortest decimal that reads back exactly |
//! | metadata | `parameter.NAME` | dtype, shape and kind of master, for every parameter |
//! | metadata | `skipped.NAME` | how often this parameter alone was skipped, decimal |
//! | tensor | `NAME.master` | f32, the parameter's shape; where it has a master |

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::{Device, Error, Result, bail};
use safetensors::{Dtype, SafeTensors, View};

use crate::backend::cpu;
use crate::block::Block;
use crate::optimizer::Srkl;
use crate::params::{Above, check, check_grad_scale};

const FORMAT: &str = "candle-srkl";
const VERSION: u64 = 1;

impl Srkl {
    /// Writes the state to a safetensors file: master weights, counters, the schedule's multiplier
    /// and the gradient scale. Save the parameters beside it, for instance by
    /// [`VarMap::save`](candle_nn::VarMap::save); settings ([`ParamsSrkl`](crate::ParamsSrkl)) are
    /// not part of it.
    ///
    /// The file is written under a temporary name in the same folder, flushed to the disk and
    /// renamed, so a crash leaves the old file, or the new one, whole.
    ///
    /// A parameter that somebody else has written since the last step is saved with a master of its
    /// value, as by [`Srkl::sync_master`].
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{Optimizer, VarBuilder, VarMap, linear};
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let folder = folder.path();
    /// let mut varmap = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&varmap, DType::BF16, &Device::Cpu);
    /// linear(4, 2, vb.pp("head"))?;
    /// let mut opt = Srkl::from_varmap(&varmap, ParamsSrkl::reference())?;
    ///
    /// varmap.save(folder.join("model.safetensors"))?;
    /// opt.save(folder.join("optimizer.safetensors"))?;
    ///
    /// // Later, in this order:
    /// varmap.load(folder.join("model.safetensors"))?;
    /// let mut opt = Srkl::from_varmap(&varmap, ParamsSrkl::reference())?;
    /// opt.load(folder.join("optimizer.safetensors"))?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Whatever the file system refuses, a path without a file name, or a learning rate that `step`
    /// would refuse; an older file of that name is then untouched.
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        // What `load` would refuse.
        self.scalars()?;
        self.sync_master()?;
        let mut metadata = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("version".to_string(), VERSION.to_string()),
            ("steps".to_string(), self.steps()?.to_string()),
            ("skipped_steps".to_string(), self.skipped_steps()?.to_string()),
            ("schedule".to_string(), format!("{:?}", self.schedule)),
            ("grad_scale".to_string(), format!("{:?}", self.grad_scale)),
        ]);
        let mut masters = vec![];
        for (block, telemetry) in self.blocks.iter().zip(self.telemetry()?) {
            metadata.insert(format!("parameter.{}", block.name), description(block));
            metadata.insert(format!("skipped.{}", block.name), telemetry.skipped.to_string());
            if let Some(values) = block.master_values()? {
                masters.push((master_key(block), Master { shape: block.var.dims(), values }));
            }
        }

        let temporary = temporary_name(path)?;
        let write = || -> Result<()> {
            safetensors::serialize_to_file(masters, Some(metadata), &temporary)?;
            // Opened for writing, which Windows wants for this.
            File::options().write(true).open(&temporary)?.sync_all()?;
            fs::rename(&temporary, path)?;
            Ok(())
        };
        write().map_err(|e| {
            // The temporary file may not exist; the error to report is the first one.
            let _ = fs::remove_file(&temporary);
            e.with_path(path)
        })
    }

    /// Reads what [`Srkl::save`] wrote, into an optimizer of the same parameters. Training goes on
    /// with the same bits as if it had not been interrupted, given the same settings.
    ///
    /// Load the model's parameters **first**: masters are only taken for the parameters they belong
    /// to.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is truncated or not of this format, or of a newer version; one
    /// whose parameters differ in name, dtype, shape or kind of master, or whose masters do not
    /// round to the parameters. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let loaded = fs::read(path)
            .map_err(Error::from)
            .and_then(|bytes| Loaded::new(&bytes, &self.blocks))
            .map_err(|e| e.with_path(path))?;
        // Nothing below can fail, but for a device that has failed already.
        let (masters, skipped): (Vec<_>, Vec<_>) = loaded.blocks.into_iter().unzip();
        for (block, master) in self.blocks.iter_mut().zip(masters) {
            if let Some(master) = master {
                block.set_master(master)?;
            }
        }
        self.schedule = loaded.schedule;
        self.grad_scale = loaded.grad_scale;
        self.send_settings()?;
        self.set_counters(loaded.steps, loaded.skipped_steps, &skipped)
    }
}

/// A checkpoint that has passed all checks.
struct Loaded {
    steps: u64,
    skipped_steps: u64,
    schedule: f64,
    grad_scale: f64,
    /// Master and `skipped` of each block.
    blocks: Vec<(Option<Vec<f32>>, u64)>,
}

impl Loaded {
    fn new(bytes: &[u8], blocks: &[Block]) -> Result<Self> {
        let broken = |e| Error::msg(format!("truncated, or not a safetensors file: {e}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let Some(metadata) = header.metadata() else {
            bail!("not a checkpoint of {FORMAT}: the file has no metadata")
        };
        match metadata.get("format") {
            Some(format) if format == FORMAT => {}
            format => bail!("not a checkpoint of {FORMAT}: its `format` is {format:?}"),
        }
        match number::<u64>(metadata, "version")? {
            VERSION => {}
            version if version > VERSION => {
                bail!("written by a newer {FORMAT}: version {version}, this one reads {VERSION}")
            }
            version => bail!("unknown version {version}"),
        }
        let schedule = number(metadata, "schedule")?;
        check("schedule", schedule, Above::OrZero)?;
        let grad_scale = number(metadata, "grad_scale")?;
        check_grad_scale(grad_scale)?;

        let saved = metadata.keys().filter_map(|key| key.strip_prefix("parameter."));
        let known: HashMap<&str, &Block> = blocks.iter().map(|b| (b.name.as_str(), b)).collect();
        if let Some(stranger) = saved.filter(|name| !known.contains_key(name)).min() {
            bail!("the checkpoint has a parameter `{stranger}`, this optimizer has not")
        }
        let loaded = blocks.iter().map(|block| load_block(block, metadata, &tensors));
        Ok(Self {
            steps: number(metadata, "steps")?,
            skipped_steps: number(metadata, "skipped_steps")?,
            schedule,
            grad_scale,
            blocks: loaded.collect::<Result<_>>()?,
        })
    }
}

fn load_block(
    block: &Block,
    metadata: &HashMap<String, String>,
    tensors: &SafeTensors,
) -> Result<(Option<Vec<f32>>, u64)> {
    let name = &block.name;
    let expected = description(block);
    match metadata.get(&format!("parameter.{name}")) {
        Some(saved) if *saved == expected => {}
        Some(saved) => bail!("parameter `{name}`: expected {expected}, the checkpoint has {saved}"),
        None => bail!("parameter `{name}`: the checkpoint has none of this name"),
    }
    let skipped = number(metadata, &format!("skipped.{name}"))?;
    if block.master.is_none() {
        return Ok((None, skipped));
    }
    let tensor = tensors.tensor(&master_key(block))?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != block.var.dims() {
        bail!(
            "master of `{name}`: expected F32 {:?}, got {:?} {:?}",
            block.var.dims(),
            tensor.dtype(),
            tensor.shape()
        )
    }
    let words = tensor.data().chunks_exact(4);
    let master: Vec<f32> = words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let parameter = block.var.to_device(&Device::Cpu)?;
    if let Some(i) = cpu::first_disagreement(&parameter, &master)? {
        bail!(
            "master of `{name}`: element {i} ({}) does not round to the parameter's; load the \
             model's parameters of the same checkpoint first",
            master[i]
        )
    }
    Ok((Some(master), skipped))
}

/// What must be equal for a checkpoint to fit a parameter.
fn description(block: &Block) -> String {
    let master = if block.master.is_some() { "f32" } else { "none" };
    format!("dtype={} shape={:?} master={master}", block.var.dtype().as_str(), block.var.dims())
}

fn master_key(block: &Block) -> String {
    format!("{}.master", block.name)
}

fn number<T: FromStr>(metadata: &HashMap<String, String>, key: &str) -> Result<T> {
    let Some(text) = metadata.get(key) else { bail!("`{key}` is missing in the metadata") };
    let Ok(number) = text.parse() else { bail!("`{key}` is not a number: {text:?}") };
    Ok(number)
}

/// A name beside `path` that no other process uses.
fn temporary_name(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        bail!("expected the path of a file, got {}", path.display())
    };
    let mut temporary = name.to_os_string();
    temporary.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(temporary))
}

/// Master weights as a safetensors tensor.
struct Master<'a> {
    shape: &'a [usize],
    values: Cow<'a, [f32]>,
}

impl View for Master<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }
    fn data_len(&self) -> usize {
        size_of_val(&*self.values)
    }
}
