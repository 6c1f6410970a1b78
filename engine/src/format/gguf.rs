//! GGUF, versions 2 and 3, little-endian: metadata and the table of tensors.
//!
//! Invariant: a `Gguf` that opened is sound. Every tensor lies inside the file, aligned, of a known format, in whole
//! blocks, and overlaps no other. The header is read once, front to back; tensor data only through `rows`.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

mod reader;

use reader::Reader;
pub use reader::{Array, Value};

use super::{FormatError, TensorInfo, TensorTable};
use crate::backend::RowSource;
use crate::tensor::WeightFormat;

#[derive(Debug)]
pub struct Gguf {
    version: u32,
    metadata: HashMap<String, Value>,
    table: TensorTable,
}

type Result<T> = std::result::Result<T, FormatError>;

impl Gguf {
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(FormatError::io(path))?;
        let header = file.try_clone().map_err(FormatError::io(path))?;
        let mut reader = Reader::new(path.to_owned(), header)?;
        let version = read_version(&mut reader)?;
        let num_tensors = reader.count(MIN_TENSOR_BYTES, "tensors")?;
        let num_keys = reader.count(MIN_KEY_BYTES, "metadata keys")?;
        let metadata = read_metadata(&mut reader, num_keys)?;
        refuse_split(&reader, &metadata)?;
        let alignment = alignment(&reader, &metadata)?;
        let mut table = TensorTable::default();
        table.add_file(path, file);
        for index in 0..num_tensors {
            reader.enter(format!("the entry of tensor {index}"));
            let info = read_tensor(&mut reader, alignment)?;
            table.add(info).map_err(|what| reader.malformed(what))?;
        }
        place_tensors(&reader, alignment, &mut table)?;
        Ok(Gguf { version, metadata, table })
    }

    pub fn version(&self) -> u32 {
        self.version
    }

    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Any integer that fits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer of 32 bits", |value| value.as_u64()?.try_into().ok())
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", |value| match value {
            Value::F32(value) => Some(*value),
            Value::F64(value) => Some(*value as f32),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(value) => Some(value.as_str()),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of 32-bit floats", |value| match value {
            Value::Array(Array::F32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    pub fn i32s(&self, key: &str) -> Result<Option<&[i32]>> {
        self.typed(key, "an array of 32-bit integers", |value| match value {
            Value::Array(Array::I32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let wrong_type = || FormatError::WrongType {
            path: self.path().to_owned(),
            key: key.to_owned(),
            wanted,
            found: value.kind(),
        };
        get(value).map(Some).ok_or_else(wrong_type)
    }

    pub fn path(&self) -> &Path {
        &self.table.files[0].0
    }

    /// In the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.table.tensors.iter()
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.table.get(name)
    }

    /// The rows of a tensor, from the first on.
    pub fn rows(&self, name: &str) -> Result<Box<dyn RowSource>> {
        let missing = || FormatError::NoTensor { path: self.path().to_owned(), name: name.to_owned() };
        self.table.rows(name).ok_or_else(missing)
    }

    pub fn total_tensor_bytes(&self) -> u64 {
        self.table.total_bytes()
    }
}

/// Bytes of the shortest entries: a name of one byte, one dimension.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
const MAX_RANK: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

fn read_version(reader: &mut Reader) -> Result<u32> {
    reader.enter("the header".to_owned());
    let big_endian = "big-endian GGUF is not supported; convert the model again for a little-endian machine";
    match &reader.magic()? {
        b"GGUF" => {}
        b"FUGG" => return Err(reader.unsupported(big_endian)),
        b"ggjt" | b"tjgg" | b"ggml" | b"lmgg" => {
            return Err(reader.unsupported("this is a GGML file from before GGUF; get the model as GGUF"));
        }
        _ => return Err(reader.unsupported("this is not a GGUF file: it does not begin with `GGUF`")),
    }
    match reader.u32()? {
        version @ 2..=3 => Ok(version),
        version if matches!(version.swap_bytes(), 1..=0xffff) => Err(reader.unsupported(big_endian)),
        version => {
            Err(reader.unsupported(format!("GGUF version {version} is not supported; get the model in version 3")))
        }
    }
}

fn read_metadata(reader: &mut Reader, num_keys: usize) -> Result<HashMap<String, Value>> {
    let mut metadata = HashMap::new();
    for index in 0..num_keys {
        reader.enter(format!("metadata key {index}"));
        let key = reader.name()?;
        reader.enter(format!("the value of `{key}`"));
        let value = reader.value()?;
        if metadata.contains_key(&key) {
            return Err(reader.malformed(format!("the metadata key `{key}` is there twice")));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// A part of a split model opens well and then lacks tensors; better to say so here.
fn refuse_split(reader: &Reader, metadata: &HashMap<String, Value>) -> Result<()> {
    match metadata.get("split.count").and_then(Value::as_u64) {
        Some(parts @ 2..) => Err(reader.unsupported(format!(
            "this is one of {parts} parts of a split model; join them first: llama-gguf-split --merge"
        ))),
        _ => Ok(()),
    }
}

fn alignment(reader: &Reader, metadata: &HashMap<String, Value>) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() => Ok(alignment),
        Some(alignment) => Err(reader.malformed(format!("`general.alignment` is {alignment}, not a power of two"))),
        None => Err(reader.malformed(format!("`general.alignment` is {}, not a power of two", value.kind()))),
    }
}

/// An entry of the tensor table; its start is relative to the data.
fn read_tensor(reader: &mut Reader, alignment: u64) -> Result<TensorInfo> {
    let name = reader.name()?;
    reader.enter(format!("the entry of tensor `{name}`"));
    let rank = reader.u32()?;
    if !(1..=MAX_RANK).contains(&rank) {
        return Err(reader.malformed(format!("tensor `{name}` has {rank} dimensions, not 1 to {MAX_RANK}")));
    }
    let mut dims = [0; MAX_RANK as usize];
    let dims = &mut dims[..rank as usize];
    for dim in dims.iter_mut() {
        *dim = reader.u64()?;
    }
    let number = reader.u32()?;
    let Some(format) = weight_format(number) else {
        return Err(reader.unsupported(unknown_format(&name, number)));
    };
    let mut info = TensorInfo::new(name, format, dims).map_err(|what| reader.malformed(what))?;
    info.start = reader.u64()?;
    if !info.start.is_multiple_of(alignment) {
        let (name, start) = (&info.name, info.start);
        return Err(reader.malformed(format!("tensor `{name}` starts at {start}, no multiple of {alignment}")));
    }
    Ok(info)
}

/// Turns starts relative to the data into positions in the file, and checks that every tensor has its own bytes.
fn place_tensors(reader: &Reader, alignment: u64, table: &mut TensorTable) -> Result<()> {
    let file_bytes = reader.file_bytes();
    let data = reader.position().checked_next_multiple_of(alignment);
    for info in &mut table.tensors {
        let start = data.and_then(|data| data.checked_add(info.start));
        let end = start.and_then(|start| start.checked_add(info.size_bytes));
        info.start = match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => start,
            _ => return Err(reader.malformed(format!("tensor `{}` lies beyond the end of the file", info.name))),
        };
    }
    let mut by_start: Vec<&TensorInfo> = table.tensors.iter().collect();
    by_start.sort_by_key(|info| info.start);
    for pair in by_start.windows(2) {
        if pair[0].start + pair[0].size_bytes > pair[1].start {
            let (first, second) = (&pair[0].name, &pair[1].name);
            return Err(reader.malformed(format!("tensors `{first}` and `{second}` overlap")));
        }
    }
    Ok(())
}

fn weight_format(number: u32) -> Option<WeightFormat> {
    Some(match number {
        0 => WeightFormat::F32,
        1 => WeightFormat::F16,
        2 => WeightFormat::Q4_0,
        3 => WeightFormat::Q4_1,
        6 => WeightFormat::Q5_0,
        7 => WeightFormat::Q5_1,
        8 => WeightFormat::Q8_0,
        10 => WeightFormat::Q2K,
        11 => WeightFormat::Q3K,
        12 => WeightFormat::Q4K,
        13 => WeightFormat::Q5K,
        14 => WeightFormat::Q6K,
        20 => WeightFormat::IQ4NL,
        23 => WeightFormat::IQ4XS,
        30 => WeightFormat::BF16,
        _ => return None,
    })
}

/// Formats of GGML that Fullbore cannot read, for the error's sake.
const OTHER_FORMATS: [(u32, &str); 19] = [
    (9, "q8_1"),
    (15, "q8_k"),
    (16, "iq2_xxs"),
    (17, "iq2_xs"),
    (18, "iq3_xxs"),
    (19, "iq1_s"),
    (21, "iq3_s"),
    (22, "iq2_s"),
    (24, "i8"),
    (25, "i16"),
    (26, "i32"),
    (27, "i64"),
    (28, "f64"),
    (29, "iq1_m"),
    (34, "tq1_0"),
    (35, "tq2_0"),
    (39, "mxfp4"),
    (40, "nvfp4"),
    (41, "q1_0"),
];

fn unknown_format(tensor: &str, number: u32) -> String {
    let name = OTHER_FORMATS.iter().find(|(other, _)| *other == number).map_or("unknown", |(_, name)| name);
    let formats = WeightFormat::ALL.map(WeightFormat::name).join(", ");
    format!("tensor `{tensor}` has the format {name} (GGML type {number}); get the model in one of: {formats}")
}
