//! Files that are replaced as a whole, or not at all.

use std::fs::{self, File, FileType, Permissions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use candle_core::{Result, bail};

/// As many symbolic links, one behind the other, as Linux follows.
const MAX_LINKS: usize = 40;

/// A file to write: the one that a path leads to, which need not be there yet.
pub(crate) struct Target {
    path: PathBuf,
    /// Those of the file that is there.
    permissions: Option<Permissions>,
}

impl Target {
    /// Follows symbolic links.
    ///
    /// # Errors
    ///
    /// Anything but a regular file where the path leads, links in a loop, or no name of a file.
    pub fn of(path: &Path) -> Result<Self> {
        let mut path = path.to_path_buf();
        for _ in 0..=MAX_LINKS {
            let permissions = match fs::symlink_metadata(&path) {
                Ok(found) if found.is_symlink() => {
                    path = folder_of(&path).join(fs::read_link(&path)?);
                    continue;
                }
                Ok(found) if found.is_file() => Some(found.permissions()),
                Ok(found) => bail!("expected a regular file, found {}", kind(found.file_type())),
                Err(e) if e.kind() == ErrorKind::NotFound => None,
                Err(e) => return Err(e.into()),
            };
            if path.file_name().is_none() {
                bail!("expected the path of a file")
            }
            return Ok(Self { path, permissions });
        }
        bail!("more than {MAX_LINKS} symbolic links, one behind the other: a loop?")
    }

    /// Puts there what `write` writes to a temporary path in the same folder: flushed to the disk, then
    /// renamed. The permissions are those of the old file, or else what a new one gets.
    pub fn replace(self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let folder = folder_of(&self.path);
        let mut temporary = tempfile::Builder::new();
        // A short name: the file's own may be as long as a name can be.
        temporary.prefix(".srkl-").suffix(".tmp");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Of which the umask takes its part.
            temporary.permissions(Permissions::from_mode(0o666));
        }
        let temporary = temporary.tempfile_in(folder)?.into_temp_path();
        let new = fs::metadata(&temporary)?.permissions();
        write(&temporary)?;
        // Opened for writing, which Windows wants for this.
        let file = File::options().write(true).open(&temporary)?;
        file.set_permissions(self.permissions.unwrap_or(new))?;
        file.sync_all()?;
        drop(file);
        temporary.persist(&self.path).map_err(|e| e.error)?;
        // For the new name to outlive a crash. Not everywhere can a folder be flushed, and the file is there.
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn kind(found: FileType) -> &'static str {
    if found.is_dir() { "a folder" } else { "a device, a pipe or the like" }
}
