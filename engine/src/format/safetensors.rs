//! A folder as Hugging Face lays it out: safetensors in one file or in shards, and the JSON beside them.
//!
//! Invariant: every tensor that the index names is in the shard that it names, once. Only header bytes are parsed;
//! tensor data is read only through `rows`. Names and shapes are the folder's own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::{FormatError, TensorInfo, TensorTable};
use crate::backend::RowSource;
use crate::tensor::WeightFormat;

/// Bytes of a shard's header at most: the limit of the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of `tokenizer.json` at most; the largest in use are near 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Bytes of any other file beside the tensors at most.
const MAX_JSON_BYTES: u64 = 64 << 20;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

#[derive(Debug)]
pub struct SafetensorsDir {
    dir: PathBuf,
    table: TensorTable,
    config: Value,
    generation_config: Option<Value>,
    tokenizer_config: Option<Value>,
    chat_template: Option<String>,
    modules: Option<Value>,
    pooling: Option<Value>,
}

type Result<T> = std::result::Result<T, FormatError>;

impl SafetensorsDir {
    pub fn open(dir: &Path) -> Result<SafetensorsDir> {
        let mut table = TensorTable::default();
        if dir.join(SINGLE_FILE).is_file() {
            add_shard(&mut table, &dir.join(SINGLE_FILE))?;
        } else if dir.join(INDEX_FILE).is_file() {
            add_shards(&mut table, dir)?;
        } else {
            let what = format!("there is no {SINGLE_FILE} and no {INDEX_FILE}; get the model as safetensors or GGUF");
            return Err(FormatError::unsupported(dir, what));
        }
        let config_path = dir.join("config.json");
        Ok(SafetensorsDir {
            table,
            config: parse_json(&config_path, &read_capped(&config_path, MAX_JSON_BYTES)?)?,
            generation_config: read_optional_json(&dir.join("generation_config.json"))?,
            tokenizer_config: read_optional_json(&dir.join("tokenizer_config.json"))?,
            chat_template: read_optional_text(&dir.join("chat_template.jinja"))?,
            modules: read_optional(&dir.join("modules.json"))?.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            pooling: read_optional_json(&dir.join("1_Pooling/config.json"))?,
            dir: dir.to_owned(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    pub fn config_json(&self) -> &Value {
        &self.config
    }

    pub fn generation_config_json(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    pub fn tokenizer_config_json(&self) -> Option<&Value> {
        self.tokenizer_config.as_ref()
    }

    /// What sentence-transformers writes of a model that embeds: its modules, a list, and how it pools.
    pub fn modules_json(&self) -> Option<&Value> {
        self.modules.as_ref()
    }

    pub fn pooling_json(&self) -> Option<&Value> {
        self.pooling.as_ref()
    }

    /// `chat_template.jinja`; older folders have theirs in `tokenizer_config.json`.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The bytes of `tokenizer.json`, read now: they are many, and needed once.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        read_capped(&self.dir.join("tokenizer.json"), MAX_TOKENIZER_BYTES)
    }

    /// Where the tensors are.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        self.table.files.iter().map(|(path, _)| path.clone()).collect()
    }

    /// In the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.table.tensors.iter()
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.table.get(name)
    }

    /// The rows of a tensor, from the first on.
    pub fn rows(&self, name: &str) -> Result<Box<dyn RowSource>> {
        let missing = || FormatError::NoTensor { path: self.dir.clone(), name: name.to_owned() };
        self.table.rows(name).ok_or_else(missing)
    }

    pub fn total_tensor_bytes(&self) -> u64 {
        self.table.total_bytes()
    }
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: DistinctKeys<String>,
}

fn add_shards(table: &mut TensorTable, dir: &Path) -> Result<()> {
    let path = dir.join(INDEX_FILE);
    let json = read_capped(&path, MAX_JSON_BYTES)?;
    let index: Index =
        serde_json::from_slice(&json).map_err(|error| FormatError::malformed(&path, error.to_string()))?;
    let shards: BTreeSet<&str> = index.weight_map.0.values().map(String::as_str).collect();
    for shard in shards {
        if !is_plain_file_name(shard) {
            let what = format!("the shard `{shard}` is not the name of a file in this folder");
            return Err(FormatError::malformed(&path, what));
        }
        add_shard(table, &dir.join(shard))?;
    }
    for (tensor, shard) in &index.weight_map.0 {
        let holder = table.get(tensor).map(|info| table.files[info.file].0.as_path());
        if holder != Some(&dir.join(shard)) {
            return Err(FormatError::malformed(&path, format!("tensor `{tensor}` is not in its shard `{shard}`")));
        }
    }
    Ok(())
}

/// No folder, no parent, no drive: on no system does the name lead out of the folder.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let one = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    one && !name.contains(['/', '\\', ':', '\0'])
}

fn add_shard(table: &mut TensorTable, path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(FormatError::io(path))?;
    let file_bytes = file.metadata().map_err(FormatError::io(path))?.len();
    let malformed = |what: String| FormatError::malformed(path, what);
    let header = read_header(path, &mut file, file_bytes)?;
    let header_error = |error: serde_json::Error| malformed(format!("the header is wrong: {error}"));
    serde_json::from_slice::<DistinctKeys<IgnoredAny>>(&header).map_err(header_error)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(header_error)?;
    let data_start = LENGTH_BYTES + header.len() as u64;
    if data_start.checked_add(metadata.data_len() as u64) != Some(file_bytes) {
        let (tensors, left) = (metadata.data_len(), file_bytes - data_start);
        return Err(malformed(format!("the tensors take {tensors} bytes, but {left} follow the header")));
    }
    let file = table.add_file(path, file);
    for name in metadata.offset_keys() {
        let Some(tensor) = metadata.info(&name) else { continue };
        let format = weight_format(&name, tensor.dtype).map_err(|what| FormatError::unsupported(path, what))?;
        let dims: Vec<u64> = tensor.shape.iter().rev().map(|dim| *dim as u64).collect();
        let info = TensorInfo::new(name, format, &dims).map_err(malformed)?;
        let start = data_start + tensor.data_offsets.0 as u64;
        table.add(TensorInfo { file, start, ..info }).map_err(malformed)?;
    }
    Ok(())
}

const LENGTH_BYTES: u64 = 8;

/// The JSON at the head of a shard, its length held against the file first.
fn read_header(path: &Path, file: &mut File, file_bytes: u64) -> Result<Vec<u8>> {
    if file_bytes < LENGTH_BYTES {
        return Err(FormatError::malformed(path, format!("{file_bytes} bytes are no safetensors file")));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(FormatError::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > file_bytes - LENGTH_BYTES {
        let what =
            format!("the header claims {length} bytes; the file has {file_bytes}, the limit is {MAX_HEADER_BYTES}");
        return Err(FormatError::malformed(path, what));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(FormatError::io(path))?;
    Ok(header)
}

fn weight_format(name: &str, dtype: Dtype) -> std::result::Result<WeightFormat, String> {
    match dtype {
        Dtype::F32 => Ok(WeightFormat::F32),
        Dtype::F16 => Ok(WeightFormat::F16),
        Dtype::BF16 => Ok(WeightFormat::BF16),
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ => {
            Err(format!("tensor `{name}` is {dtype:?}: FP8 is not supported yet; get the model in BF16 or as GGUF"))
        }
        _ => Err(format!("tensor `{name}` is {dtype:?}; get the model in F32, F16 or BF16, or as GGUF")),
    }
}

fn read_capped(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(FormatError::io(path))?;
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(FormatError::io(path))?;
    if bytes.len() as u64 > max_bytes {
        return Err(FormatError::unsupported(path, format!("the file is larger than {max_bytes} bytes")));
    }
    Ok(bytes)
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match read_capped(path, MAX_JSON_BYTES) {
        Err(FormatError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn read_optional_json(path: &Path) -> Result<Option<Value>> {
    read_optional(path)?.map(|bytes| parse_json(path, &bytes)).transpose()
}

fn read_optional_text(path: &Path) -> Result<Option<String>> {
    let not_utf8 = |_| FormatError::malformed(path, "the text is not UTF-8");
    read_optional(path)?.map(|bytes| String::from_utf8(bytes).map_err(not_utf8)).transpose()
}

/// A JSON object.
fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    match serde_json::from_slice(bytes) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(FormatError::malformed(path, "the JSON is not an object")),
        Err(error) => Err(FormatError::malformed(path, format!("the JSON is wrong: {error}"))),
    }
}

/// A JSON object in which no key comes twice; serde's own maps keep the last.
struct DistinctKeys<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for DistinctKeys<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(DistinctKeysVisitor(PhantomData))
    }
}

struct DistinctKeysVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for DistinctKeysVisitor<V> {
    type Value = DistinctKeys<V>;

    fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut entries: M) -> std::result::Result<Self::Value, M::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, value)) = entries.next_entry::<String, V>()? {
            if map.contains_key(&key) {
                return Err(M::Error::custom(format!("`{key}` is there twice")));
            }
            map.insert(key, value);
        }
        Ok(DistinctKeys(map))
    }
}
