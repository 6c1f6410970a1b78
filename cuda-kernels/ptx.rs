//! PTX of every module, compiled beforehand and kept in the binary (`ptx.lzma`), for machines without NVRTC.
//!
//! Invariant: what is kept was compiled from the text that the binary has; a test holds it by hash. `make ptx` writes
//! it anew.

use std::io::{self, BufRead, Read, Write};
use std::sync::OnceLock;

use lzma_rust2::{LzmaOptions, LzmaReader, LzmaWriter};

use crate::Module;

const SHIPPED: &[u8] = include_bytes!("ptx.lzma");
/// KiB that reading may take: the dictionary, and what is beside it.
const MEMORY_KIB: u32 = 96 << 10;
const DICTIONARY_BYTES: u32 = 32 << 20;

/// What NVRTC made of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ptx {
    /// Of the module.
    pub name: String,
    /// Compute capability that it is for: 80 is 8.0. Newer GPUs take it too.
    pub architecture: u32,
    /// Of the module's text.
    pub hash: u64,
    pub text: String,
}

/// The architecture for which a module is compiled beforehand. What is on tensor cores is worth its size for Ampere and
/// newer alone.
pub fn shipped_architecture(module: &Module) -> u32 {
    if module.parts.contains(&"matrix") { 80 } else { 75 }
}

/// All that is kept.
pub fn shipped() -> &'static [Ptx] {
    static ALL: OnceLock<Vec<Ptx>> = OnceLock::new();
    ALL.get_or_init(|| unpack(SHIPPED).expect("the archive was written by `pack`"))
}

/// What a GPU of this architecture takes of a module.
pub fn find(module: &Module, architecture: u32) -> Option<&'static Ptx> {
    let (name, hash) = (module.name(), module.text_hash());
    let fits = |ptx: &&Ptx| ptx.name == name && ptx.hash == hash && ptx.architecture <= architecture;
    shipped().iter().find(fits)
}

/// One stream: a line of name, architecture, hash and bytes before each text.
pub fn pack(all: &[Ptx]) -> io::Result<Vec<u8>> {
    // Text has no alignment.
    let options = LzmaOptions { dict_size: DICTIONARY_BYTES, lc: 4, lp: 0, pb: 0, ..LzmaOptions::with_preset(9) };
    let mut writer = LzmaWriter::new_use_header(Vec::new(), &options, None)?;
    for Ptx { name, architecture, hash, text } in all {
        writeln!(writer, "{name} {architecture} {hash:016x} {}", text.len())?;
        writer.write_all(text.as_bytes())?;
    }
    writer.finish()
}

fn unpack(packed: &[u8]) -> io::Result<Vec<Ptx>> {
    let mut reader = io::BufReader::new(LzmaReader::new_mem_limit(packed, MEMORY_KIB, None)?);
    let (mut all, mut line) = (Vec::new(), String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(all);
        }
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "no line before a text");
        let [name, architecture, hash, num_bytes] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            return Err(invalid());
        };
        let name = name.to_owned();
        let architecture = architecture.parse().map_err(|_| invalid())?;
        let hash = u64::from_str_radix(hash, 16).map_err(|_| invalid())?;
        let mut text = vec![0; num_bytes.parse().map_err(|_| invalid())?];
        reader.read_exact(&mut text)?;
        let text = String::from_utf8(text).map_err(|_| invalid())?;
        all.push(Ptx { name, architecture, hash, text });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_found_again() {
        let ptx = |name: &str, architecture, text: &str| {
            let (name, text) = (name.to_owned(), text.to_owned());
            Ptx { name, architecture, hash: 7, text }
        };
        let all = [ptx("one:1-2", 75, "a\nb\n"), ptx("one:1-2", 80, ""), ptx("two", 75, &"c".repeat(100_000))];
        let packed = pack(&all).expect("memory is written");
        assert!(packed.len() < 1000, "{} bytes", packed.len());
        assert_eq!(unpack(&packed).expect("it was packed"), all);
        assert!(unpack(&packed[..packed.len() / 2]).is_err());
    }
}
