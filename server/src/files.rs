//! Small files that are kept from one run to the next. Invariant: a file appears whole or not at all.

use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

/// A name for what `parts` say, of which none has a line break.
pub fn name_of(parts: &[&str]) -> String {
    let digest = Sha256::digest(parts.join("\n").as_bytes());
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    name + ".json"
}

/// Written beside its place first, in a folder that is made if it is not there.
pub fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = fs::write(&part, text).and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        // What was written of it is of no use; it may not even be there.
        let _ = fs::remove_file(&part);
    }
    written
}
