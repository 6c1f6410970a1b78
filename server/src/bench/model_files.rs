//! What a result says of the files of a model: enough for others to see whether theirs is the same.
//!
//! Invariant: nothing is told that was not read here; files that are too large to be read for it have no hash.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use fullbore_bench::result::ModelFile;
use sha2::{Digest, Sha256};

/// Of all files of a model together; to read more would hold up each start.
const MAX_HASHED_BYTES: u64 = 8 << 30;

/// Of files that are still there; one that is not is warned of.
pub fn told(paths: &[PathBuf]) -> Vec<ModelFile> {
    told_below(MAX_HASHED_BYTES, paths)
}

fn told_below(max_hashed_bytes: u64, paths: &[PathBuf]) -> Vec<ModelFile> {
    let size = |path: &PathBuf| fs::metadata(path).map(|file| file.len());
    let is_hashed = paths.iter().filter_map(|path| size(path).ok()).sum::<u64>() <= max_hashed_bytes;
    let file = |path: &PathBuf| -> io::Result<ModelFile> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let sha256 = is_hashed.then(|| sha256(path)).transpose()?;
        Ok(ModelFile { name, size_bytes: size(path)?, sha256 })
    };
    let told = paths.iter().filter_map(|path| {
        let warn = |error: &io::Error| tracing::warn!("the result lacks {}: {error}", path.display());
        file(path).inspect_err(warn).ok()
    });
    told.collect()
}

/// In hexadecimal.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_told_by_its_hash_unless_it_is_too_large() {
        let folder = std::env::temp_dir().join(format!("fullbore-model-files-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let [first, second, missing] = ["a.gguf", "b.gguf", "no-such.gguf"].map(|name| folder.join(name));
        fs::write(&first, "abc").expect("a file");
        fs::write(&second, "").expect("a file");
        let paths = [first, missing, second];
        // NIST's example of a hash, and that of nothing.
        let hashes = [
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ];
        let file = |name: &str, size_bytes, sha256: Option<&str>| ModelFile {
            name: name.to_owned(),
            size_bytes,
            sha256: sha256.map(str::to_owned),
        };
        assert_eq!(told(&paths), [file("a.gguf", 3, Some(hashes[0])), file("b.gguf", 0, Some(hashes[1]))]);
        assert_eq!(told_below(3, &paths), told(&paths));
        assert_eq!(told_below(2, &paths), [file("a.gguf", 3, None), file("b.gguf", 0, None)]);
        fs::remove_dir_all(folder).expect("it is ours");
    }
}
