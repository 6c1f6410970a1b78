//! Model files: readers of GGUF and of safetensors, and the block formats inside them.
//!
//! Invariant: a file is hostile until read. Every count is held against the bytes that are left before anything is
//! allocated for it, sums are checked, and what is wrong is named. Tensors are never held: their rows are read from
//! the file at a position, a few at a time. This folder knows no architecture.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::RowSource;
use crate::tensor::WeightFormat;

pub mod gguf;
pub mod quant;
pub mod quantize;
pub mod safetensors;

/// Why a model file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("cannot read {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: {what}; the file is damaged: fetch or convert it again", path.display())]
    Malformed { path: PathBuf, what: String },
    #[error("{}: {what}", path.display())]
    Unsupported { path: PathBuf, what: String },
    #[error("{}: the metadata key `{key}` is {found}, not {wanted}", path.display())]
    WrongType { path: PathBuf, key: String, wanted: &'static str, found: &'static str },
    #[error("{}: there is no tensor `{name}`", path.display())]
    NoTensor { path: PathBuf, name: String },
}

impl FormatError {
    fn io(path: &Path) -> impl Fn(io::Error) -> FormatError + '_ {
        |error| FormatError::Io { path: path.to_owned(), error }
    }

    fn malformed(path: &Path, what: impl Into<String>) -> FormatError {
        FormatError::Malformed { path: path.to_owned(), what: what.into() }
    }

    fn unsupported(path: &Path, what: impl Into<String>) -> FormatError {
        FormatError::Unsupported { path: path.to_owned(), what: what.into() }
    }
}

/// A tensor of a file as a matrix: the innermost dimension is a row, and all others together count the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub format: WeightFormat,
    pub rows: u32,
    pub cols: u32,
    pub size_bytes: u64,
    /// Index of its file, and its begin in there.
    file: usize,
    start: u64,
}

impl TensorInfo {
    /// A tensor of the given dimensions, innermost first; `file` and `start` are the owner's to fill in.
    fn new(name: String, format: WeightFormat, dims: &[u64]) -> Result<TensorInfo, String> {
        if dims.contains(&0) {
            return Err(format!("tensor `{name}` has a dimension of zero"));
        }
        let (cols, outer) = dims.split_first().map_or((1, dims), |(cols, outer)| (*cols, outer));
        let too_large = || format!("tensor `{name}` is too large: {dims:?}");
        let rows = outer.iter().try_fold(1u64, |rows, dim| rows.checked_mul(*dim)).ok_or_else(too_large)?;
        let rows = u32::try_from(rows).map_err(|_| too_large())?;
        let cols = u32::try_from(cols).map_err(|_| too_large())?;
        if !cols.is_multiple_of(format.block_len()) {
            let (block_len, format) = (format.block_len(), format.name());
            return Err(format!("tensor `{name}` has rows of {cols}, no multiple of {format}'s block of {block_len}"));
        }
        let size_bytes = format.row_bytes(cols).checked_mul(u64::from(rows)).ok_or_else(too_large)?;
        Ok(TensorInfo { name, format, rows, cols, size_bytes, file: 0, start: 0 })
    }
}

/// The open files of a checkpoint and the tensors in them, in the order of the files.
#[derive(Debug, Default)]
struct TensorTable {
    files: Vec<(PathBuf, Arc<File>)>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl TensorTable {
    /// The index for tensors of this file.
    fn add_file(&mut self, path: &Path, file: File) -> usize {
        self.files.push((path.to_owned(), Arc::new(file)));
        self.files.len() - 1
    }

    /// Refuses a second tensor of the same name.
    fn add(&mut self, info: TensorInfo) -> Result<(), String> {
        match self.by_name.entry(info.name.clone()) {
            Entry::Occupied(_) => Err(format!("tensor `{}` is there twice", info.name)),
            Entry::Vacant(entry) => {
                entry.insert(self.tensors.len());
                self.tensors.push(info);
                Ok(())
            }
        }
    }

    fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|index| &self.tensors[*index])
    }

    fn rows(&self, name: &str) -> Option<Box<dyn RowSource>> {
        let info = self.get(name)?;
        let file = self.files[info.file].1.clone();
        let end = info.start + info.size_bytes;
        Some(Box::new(FileRows { name: info.name.clone(), file, position: info.start, end }))
    }

    fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|info| info.size_bytes).sum()
    }
}

/// The rows of one tensor, read at a position of their own: any number of these may share a file.
struct FileRows {
    name: String,
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl RowSource for FileRows {
    fn read_rows(&mut self, out: &mut [u8]) -> io::Result<()> {
        assert!(out.len() as u64 <= self.end - self.position, "tensor `{}` has no more rows", self.name);
        read_exact_at(&self.file, out, self.position)
            .map_err(|error| io::Error::new(error.kind(), format!("tensor `{}`: {error}", self.name)))?;
        self.position += out.len() as u64;
        Ok(())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], position: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, position)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut position: u64) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, position)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                out = &mut out[read..];
                position += read as u64;
            }
        }
    }
    Ok(())
}
