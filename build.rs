//! Compiles the CUDA kernels with nvcc, for feature `cuda`, and makes `abi.rs` of `kernels/abi.h` anew, for
//! feature `bindgen`.
//!
//! | variable | meaning |
//! |---|---|
//! | `CUDA_COMPUTE_CAP` | the GPU's compute capability, as 80 or 8.0; otherwise nvidia-smi is asked |
//! | `NVCC` | the compiler; otherwise `nvcc` of the path, of `CUDA_HOME` or of `CUDA_PATH` |
//! | `NVCC_CCBIN` | the host compiler that nvcc uses |
//!
//! nvcc is called by hand, since the result is one file with machine code for the GPU and PTX for
//! later ones, which the build crates of candle don't make.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest CUDA that is known to compile the kernels as they are meant.
const OLDEST_CUDA: u32 = 12;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "bindgen")]
    abi();
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    // All files in it.
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["CUDA_COMPUTE_CAP", "NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // Else a path that some wrapper has changed would cost minutes.
    if env::var_os("NVCC").is_none() {
        println!("cargo::rerun-if-env-changed=PATH");
    }
    if let Err(message) = compile() {
        println!("cargo::error={message}");
    }
}

/// What `src/backend/cuda/abi.rs` must be, for `tests/abi.rs`.
#[cfg(feature = "bindgen")]
fn abi() {
    println!("cargo::rerun-if-changed=kernels/abi.h");
    let bindings = bindgen::builder()
        .header("kernels/abi.h")
        .allowlist_item("Srkl.*|SRKL_.*")
        .derive_default(true)
        .derive_partialeq(true)
        .generate_comments(false)
        .rust_target(env!("CARGO_PKG_RUST_VERSION").parse().unwrap())
        .rust_edition(bindgen::RustEdition::Edition2024)
        .generate()
        .unwrap();
    bindings.write_to_file(Path::new(&env::var_os("OUT_DIR").unwrap()).join("abi.rs")).unwrap();
}

fn compile() -> Result<(), String> {
    let nvcc = nvcc()?;
    let capability = capability()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("srkl.fatbin");
    let (arch, sm) = (format!("compute_{capability}"), format!("sm_{capability}"));
    let mut command = Command::new(&nvcc);
    command
        .args(["-std=c++17", "-O3", "-lineinfo", "-fmad=false", "-ftz=false"])
        .args(["-prec-div=true", "-prec-sqrt=true", "-fatbin", "--no-compress"])
        .arg(format!("-gencode=arch={arch},code=[{arch},{sm}]"))
        .args(["kernels/srkl.cu", "-o"])
        .arg(&out);
    if let Some(host) = env::var_os("NVCC_CCBIN") {
        command.arg("-ccbin").arg(host);
    }
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).replace('\n', " | ");
        return Err(format!("nvcc could not compile the kernels for {arch}: {text}"));
    }
    Ok(())
}

/// The compiler, if it is there and not too old.
fn nvcc() -> Result<PathBuf, String> {
    let folder = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(env::var_os);
    let nvcc = match (env::var_os("NVCC"), folder) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (None, Some(folder)) => Path::new(&folder).join("bin/nvcc"),
        (None, None) => PathBuf::from("nvcc"),
    };
    let missing = |e| {
        let nvcc = nvcc.display();
        format!(
            "feature `cuda` needs nvcc, of CUDA {OLDEST_CUDA} or later; {nvcc}: {e}; set NVCC or CUDA_HOME"
        )
    };
    let output = Command::new(&nvcc).arg("--version").output().map_err(missing)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        text.split("release ").nth(1).and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    match version {
        Some(version) if version >= OLDEST_CUDA => Ok(nvcc),
        Some(version) => Err(format!(
            "feature `cuda` needs nvcc of CUDA {OLDEST_CUDA} or later; {} is of {version}",
            nvcc.display()
        )),
        None => Err(format!("{} does not say its version: {text:?}", nvcc.display())),
    }
}

/// The compute capability without a dot.
fn capability() -> Result<String, String> {
    let text = match env::var("CUDA_COMPUTE_CAP") {
        Ok(text) => text,
        Err(_) => {
            let asked = Command::new("nvidia-smi")
                .args(["--query-gpu=compute_cap", "--format=csv,noheader"])
                .output();
            let output = asked.map_err(|e| {
                format!("no CUDA_COMPUTE_CAP, and nvidia-smi: {e}; set CUDA_COMPUTE_CAP, as 80")
            })?;
            String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_string()
        }
    };
    let digits: String = text.trim().chars().filter(|c| *c != '.').collect();
    match digits.parse::<u32>() {
        Ok(number) if number >= 70 => Ok(digits),
        _ => Err(format!(
            "CUDA_COMPUTE_CAP: expected a capability of 7.0 or later, as 80, got {text:?}"
        )),
    }
}
