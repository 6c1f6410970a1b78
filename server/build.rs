//! Tells the program which commit it is built from. Where there is no git checkout it has none.

use std::path::Path;
use std::process::Command;

/// What is compiled into the program, from the workspace's folder.
const COMPILED: [&str; 9] = [
    "Cargo.lock",
    "Cargo.toml",
    "benches/Cargo.toml",
    "benches/src",
    "cuda-kernels",
    "docs/results.schema.json",
    "engine",
    "server",
    "shaders",
];

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member of a workspace");
    for path in COMPILED {
        println!("cargo::rerun-if-changed={}", folder.join(path).display());
    }
    let git = |words: &[&str]| {
        let output = Command::new("git").arg("-C").arg(folder).args(words).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return };
    let changed = git(&[["status", "--porcelain", "--"].as_slice(), &COMPILED].concat());
    let dirty = if changed.is_none_or(|files| !files.is_empty()) { "-dirty" } else { "" };
    let version = env!("CARGO_PKG_VERSION");
    println!("cargo::rustc-env=FULLBORE_COMMIT={commit}{dirty}");
    println!("cargo::rustc-env=FULLBORE_VERSION_AND_COMMIT={version} ({commit}{dirty})");
}
