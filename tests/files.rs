//! Saving: one whole file, where the path leads, or the old one and an error that names the path.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Result};
use candle_nn::Optimizer;
use candle_srkl::{ParamsSrkl, Srkl};
use common::*;

/// An optimizer of `n` parameters with a momentum, after as many steps.
fn optimizer(n: usize, steps: u64) -> Result<Srkl> {
    let w = var(&vec![1.; n], DType::F32)?;
    let params = ParamsSrkl {
        curvature: candle_srkl::Curvature::GradSquare,
        trust: None,
        ..ParamsSrkl::kinetic()
    };
    let mut opt = Srkl::builder().default_group(params).build([("w".to_string(), w.clone())])?;
    (0..steps).try_for_each(|_| opt.step(&grads([(&w, w.ones_like()?)])))?;
    Ok(opt)
}

/// How many steps the optimizer had made that was saved there.
fn steps_in(path: &Path) -> Result<u64> {
    let mut opt = optimizer(10, 0)?;
    opt.load(path)?;
    opt.steps()
}

/// What is in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Saving to `path` must fail, name the path and `reason`, and leave the folder as it is.
#[track_caller]
fn assert_not_saved(path: &Path, reason: &str) {
    let folder = path.parent().unwrap();
    let before = folder.exists().then(|| names(folder));
    assert_error(optimizer(10, 1).unwrap().save(path), &[path.to_str().unwrap(), reason]);
    assert_eq!(folder.exists().then(|| names(folder)), before);
}

/// Saving leaves nothing but the file, and replaces an older one.
#[test]
fn saving_leaves_one_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    for steps in [3, 4] {
        optimizer(10, steps)?.save(&path)?;
        assert_eq!(steps_in(&path)?, steps);
        assert_eq!(names(folder.path()), ["state"]);
    }
    Ok(())
}

#[test]
fn paths_that_lead_to_no_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::create_dir_all(folder.path().join("folder/full"))?;
    for name in ["folder", "folder/full"] {
        assert_not_saved(&folder.path().join(name), "a folder");
    }
    assert_not_saved(&folder.path().join("no/such"), "");
    assert!(optimizer(10, 1)?.save("/").is_err());
    assert!(optimizer(10, 1)?.save("").is_err());
    Ok(())
}

/// A name may have 255 bytes.
#[test]
fn names_of_any_length() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["x".to_string(), "x".repeat(255), "ä".repeat(127)] {
        optimizer(10, 2)?.save(folder.path().join(&name))?;
        fs::remove_file(folder.path().join(name))?;
        assert!(names(folder.path()).is_empty());
    }
    Ok(())
}

/// Each save is whole, whoever saves there at the same time.
#[test]
fn several_threads_save_to_one_path() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state");
    optimizer(10, 1)?.save(&path)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<u64> {
            let mut reads = 0;
            while !done.load(Ordering::Relaxed) {
                assert!((1..=4).contains(&steps_in(&path)?));
                reads += 1;
            }
            Ok(reads)
        });
        let writer = |steps| {
            let path = &path;
            move || -> Result<()> {
                let mut opt = optimizer(10, steps)?;
                (0..50).try_for_each(|_| opt.save(path))
            }
        };
        let writers: Vec<_> = (1..=4).map(|steps| scope.spawn(writer(steps))).collect();
        let results: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap()? > 0);
        results.into_iter().collect()
    })?;
    assert_eq!(names(folder.path()), ["state"]);
    Ok(())
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode()
    }

    /// The links stay, and the file that they lead to is replaced, or made.
    #[test]
    fn symbolic_links_are_followed() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("a/b"))?;
        symlink("a/second", at("first"))?;
        symlink("b/third", at("a/second"))?;
        symlink(at("a/file"), at("a/b/third"))?;
        let links = ["first", "a/second", "a/b/third"];
        // Into nothing at first.
        for steps in [2, 3] {
            optimizer(10, steps)?.save(at("first"))?;
            assert_eq!(steps_in(&at("a/file"))?, steps);
            for link in links {
                assert!(fs::symlink_metadata(at(link))?.is_symlink(), "{link}");
            }
            assert_eq!(names(&at("a")), ["b", "file", "second"]);
            assert_eq!(
                (names(&at("a/b")), names(folder.path())),
                (vec!["third".into()], vec!["a".into(), "first".into()])
            );
        }
        symlink("no/such", at("astray"))?;
        assert_not_saved(&at("astray"), "No such file");
        symlink("a", at("to-folder"))?;
        assert_not_saved(&at("to-folder"), "a folder");
        symlink("there", at("back"))?;
        symlink("back", at("there"))?;
        assert_not_saved(&at("back"), "a loop");
        symlink("self", at("self"))?;
        assert_not_saved(&at("self"), "a loop");
        Ok(())
    }

    #[test]
    fn pipes_and_sockets_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (pipe, socket) = (folder.path().join("pipe"), folder.path().join("socket"));
        assert!(Command::new("mkfifo").arg(&pipe).status()?.success());
        let _socket = UnixListener::bind(&socket)?;
        for path in [pipe, socket] {
            assert_not_saved(&path, "a device, a pipe");
            assert!(!fs::metadata(&path)?.is_file());
        }
        Ok(())
    }

    /// Those of the old file, or what any new file gets.
    #[test]
    fn permissions() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (path, other) = (folder.path().join("state"), folder.path().join("other"));
        fs::File::create(&other)?;
        optimizer(10, 1)?.save(&path)?;
        assert_eq!(mode(&path), mode(&other));
        for permissions in [0o600, 0o640, 0o664, 0o444] {
            fs::set_permissions(&path, fs::Permissions::from_mode(permissions))?;
            optimizer(10, 1)?.save(&path)?;
            assert_eq!(mode(&path) & 0o7777, permissions);
        }
        Ok(())
    }

    /// A folder that can't be written to; as root every one can, so that the test says nothing.
    #[test]
    fn a_folder_that_may_not_be_written_to() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("state");
        optimizer(10, 1)?.save(&path)?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555))?;
        if fs::File::create(folder.path().join("other")).is_err() {
            assert_error(optimizer(10, 2)?.save(&path), &[path.to_str().unwrap(), "denied"]);
            assert_eq!((steps_in(&path)?, names(folder.path())), (1, vec!["state".to_string()]));
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// As on a full disk, writing fails beyond a limit: in a process of its own, and in its working directory.
    #[test]
    fn a_disk_that_is_full() -> Result<()> {
        const CHILD: &str = "SRKL_TEST_FULL_DISK";
        if std::env::var_os(CHILD).is_none() {
            let folder = tempfile::tempdir()?;
            let script =
                "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact unix::a_disk_that_is_full";
            let mut child = Command::new("sh");
            child.args(["-c", script]).arg(std::env::current_exe()?);
            let output = child.env(CHILD, "").current_dir(folder.path()).output()?;
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            assert_eq!(names(folder.path()), ["done", "state"]);
            return Ok(());
        }
        let path = Path::new("state");
        optimizer(10, 1)?.save(path)?;
        assert_error(optimizer(100_000, 2)?.save(path), &["\"state\"", "too large"]);
        assert_eq!((steps_in(path)?, names(Path::new("."))), (1, vec!["state".to_string()]));
        fs::write("done", "")?;
        Ok(())
    }
}
