//! Reads GGUF's primitive values and its metadata off a file, front to back.
//!
//! Invariant: no allocation is larger than a small multiple of the bytes that the file has left, and every error says
//! inside what the file went wrong.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::PathBuf;

use crate::format::FormatError;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// The elements of an array have one type.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

impl Value {
    /// What an error calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::U8(_) | Value::U16(_) | Value::U32(_) | Value::U64(_) => "an unsigned integer",
            Value::I8(_) | Value::I16(_) | Value::I32(_) | Value::I64(_) => "an integer",
            Value::F32(_) | Value::F64(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::String(_) => "a string",
            Value::Array(Array::String(_)) => "an array of strings",
            Value::Array(Array::F32(_) | Array::F64(_)) => "an array of floats",
            Value::Array(Array::Bool(_)) => "an array of bools",
            Value::Array(Array::Array(_)) => "an array of arrays",
            Value::Array(_) => "an array of integers",
        }
    }

    /// Any integer, if it is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(value) => Some(value.into()),
            Value::U16(value) => Some(value.into()),
            Value::U32(value) => Some(value.into()),
            Value::U64(value) => Some(value),
            Value::I8(value) => value.try_into().ok(),
            Value::I16(value) => value.try_into().ok(),
            Value::I32(value) => value.try_into().ok(),
            Value::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }
}

/// Arrays inside arrays, at most.
const MAX_ARRAY_DEPTH: u32 = 4;
/// Bytes of a key or of a tensor's name, at most: GGUF's own limit for keys.
const MAX_NAME_BYTES: u64 = 65_535;
/// Bytes before the tensor data, at most: tens of times what the largest vocabularies take. A sparse file is as long as
/// it likes, so its size alone justifies nothing.
const MAX_HEADER_BYTES: u64 = 256 << 20;

const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

pub(super) struct Reader {
    input: BufReader<File>,
    pub path: PathBuf,
    file_bytes: u64,
    position: u64,
    /// What is being read, for errors: "the value of `general.name`".
    place: String,
}

type Result<T> = std::result::Result<T, FormatError>;

impl Reader {
    pub fn new(path: PathBuf, file: File) -> Result<Reader> {
        let file_bytes = file.metadata().map_err(FormatError::io(&path))?.len();
        Ok(Reader { input: BufReader::new(file), path, file_bytes, position: 0, place: String::new() })
    }

    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes that the header may still take.
    fn left(&self) -> u64 {
        self.file_bytes.min(MAX_HEADER_BYTES) - self.position
    }

    pub fn enter(&mut self, place: String) {
        self.place = place;
    }

    pub fn malformed(&self, what: impl Into<String>) -> FormatError {
        FormatError::malformed(&self.path, what)
    }

    pub fn unsupported(&self, what: impl Into<String>) -> FormatError {
        FormatError::unsupported(&self.path, what)
    }

    /// A count of things that take `min_bytes` each at least, held against what is left.
    pub fn count(&mut self, min_bytes: u64, things: &str) -> Result<usize> {
        let count = self.u64()?;
        let left = self.left();
        if count > left / min_bytes {
            let place = &self.place;
            return Err(self.malformed(format!("{place} claims {count} {things}, but only {left} bytes are left")));
        }
        Ok(count as usize)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        let size = out.len() as u64;
        if size > self.file_bytes - self.position {
            return Err(self.malformed(format!("the file ends inside {}", self.place)));
        }
        if size > self.left() {
            return Err(self.malformed(format!("{} lies beyond {MAX_HEADER_BYTES} bytes of header", self.place)));
        }
        self.input.read_exact(out).map_err(FormatError::io(&self.path))?;
        self.position += size;
        Ok(())
    }

    pub fn magic(&mut self) -> Result<[u8; 4]> {
        self.bytes()
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<String> {
        let size = self.count(1, "bytes of text")?;
        let mut bytes = vec![0; size];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.malformed(format!("{} is not UTF-8", self.place)))
    }

    /// A key or a tensor's name.
    pub fn name(&mut self) -> Result<String> {
        let name = self.string()?;
        match name.len() as u64 {
            1..=MAX_NAME_BYTES => Ok(name),
            size => Err(self.malformed(format!("{} has a name of {size} bytes", self.place))),
        }
    }

    fn bool(&mut self) -> Result<bool> {
        match self.bytes()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [byte] => Err(self.malformed(format!("{} has a bool of {byte}", self.place))),
        }
    }

    /// A type number and a value of that type.
    pub fn value(&mut self) -> Result<Value> {
        Ok(match self.u32()? {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => Value::Bool(self.bool()?),
            TYPE_STRING => Value::String(self.string()?),
            TYPE_ARRAY => Value::Array(self.array(1)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            number => return Err(self.unknown_type(number)),
        })
    }

    fn array(&mut self, depth: u32) -> Result<Array> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(self.malformed(format!("{} nests arrays deeper than {MAX_ARRAY_DEPTH}", self.place)));
        }
        Ok(match self.u32()? {
            0 => Array::U8(self.numbers(u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(f32::from_le_bytes)?),
            7 => Array::Bool(self.elements(1, Reader::bool)?),
            TYPE_STRING => Array::String(self.elements(8, Reader::string)?),
            TYPE_ARRAY => Array::Array(self.elements(12, |reader| reader.array(depth + 1))?),
            10 => Array::U64(self.numbers(u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(f64::from_le_bytes)?),
            number => return Err(self.unknown_type(number)),
        })
    }

    fn numbers<const N: usize, T>(&mut self, number: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.elements(N as u64, |reader| reader.bytes().map(&number))
    }

    fn elements<T>(&mut self, min_bytes: u64, read: impl Fn(&mut Reader) -> Result<T>) -> Result<Vec<T>> {
        let count = self.count(min_bytes, "elements")?;
        let mut elements = Vec::with_capacity(count);
        for _ in 0..count {
            elements.push(read(self)?);
        }
        Ok(elements)
    }

    fn unknown_type(&self, number: u32) -> FormatError {
        self.malformed(format!("{} is of the unknown type {number}", self.place))
    }
}
