//! Model files: each is refused with a sentence, or as sound as it says.

use std::fs;
use std::path::PathBuf;

use fullbore::start::memory_table;
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::bundle::{Bundle, BundleError};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::format::gguf::Gguf;
use fullbore_engine::format::quant::dequantize_row;
use fullbore_engine::format::safetensors::SafetensorsDir;
use fullbore_engine::model::{Checkpoint, Model, Weights};
use fullbore_engine::text::{ChatMessage, Detokenizer, Special};

use super::{check_sentence, parts};

/// A GGUF file.
pub fn gguf(data: &[u8]) {
    let folder = Folder::new("gguf");
    let path = folder.write("model.gguf", data);
    if let Ok(file) = Gguf::open(&path) {
        for tensor in file.tensors() {
            let mut source = file.rows(&tensor.name).expect("it is listed");
            let (mut bytes, mut row) = (vec![0; tensor.format.row_bytes(tensor.cols) as usize], Vec::new());
            row.resize(tensor.cols as usize, 0.0);
            for _ in 0..tensor.rows {
                source.read_rows(&mut bytes).expect("every tensor lies inside the file");
                dequantize_row(tensor.format, &bytes, &mut row);
            }
        }
    }
    try_out(Bundle::open(&path));
}

/// A folder: config.json, tokenizer.json, tokenizer_config.json, generation_config.json, an index where there is one,
/// and the safetensors file itself.
pub fn safetensors(data: &[u8]) {
    let folder = Folder::new("safetensors");
    let [config, tokenizer, tokenizer_config, generation_config, index, tensors] = parts(data);
    folder.write("config.json", config);
    folder.write("tokenizer.json", tokenizer);
    folder.write("tokenizer_config.json", tokenizer_config);
    folder.write("generation_config.json", generation_config);
    if index.is_empty() {
        folder.write("model.safetensors", tensors);
    } else {
        folder.write("model.safetensors.index.json", index);
        folder.write("model-00001-of-00001.safetensors", tensors);
    }
    if let Ok(dir) = SafetensorsDir::open(&folder.0) {
        for tensor in dir.tensors() {
            let mut bytes = vec![0; tensor.size_bytes as usize];
            let mut source = dir.rows(&tensor.name).expect("it is listed");
            source.read_rows(&mut bytes).expect("every tensor lies inside its file");
        }
    }
    try_out(Bundle::open(&folder.0));
}

/// More than any file here can be the reason for.
const MAX_STATE_BYTES: u64 = 64 << 20;

fn try_out(opened: Result<Bundle, BundleError>) {
    let bundle = match opened {
        Ok(bundle) => bundle,
        Err(error) => return check_sentence(&error.to_string()),
    };
    let Bundle { config, checkpoint, tokenizer, chat_template, stop_ids, .. } = bundle;
    let vocab_size = config.vocab_size;
    assert!(stop_ids.iter().all(|id| id.0 < vocab_size));
    let text = "Hé, <s> 12 <|im_end|>\n";
    for special in [Special::Parse, Special::AsText] {
        let ids = tokenizer.encode(text, special);
        assert!(ids.iter().all(|id| id.0 < vocab_size), "{ids:?} of {vocab_size}");
        let mut detokenizer = Detokenizer::new(tokenizer.clone()).with_special(true);
        ids.iter().for_each(|id| drop(detokenizer.push(*id)));
        detokenizer.finish();
    }
    if let Some(template) = chat_template {
        let messages = ["system", "user"].map(|role| ChatMessage::new(role, text));
        if let Err(error) = template.encode(&tokenizer, &messages, true) {
            check_sentence(&error.to_string());
        }
    }
    let limits = EngineConfig { max_num_seqs: 2, max_num_batched_tokens: 16, max_logit_rows: 2, ..small() };
    let limits = EngineConfig { max_model_len: config.max_positions.min(64), ..limits };
    let weights = Weights::file_bytes(&config, &checkpoint);
    if limits.check().is_err() || memory_table(&config, &limits, weights).total() > MAX_STATE_BYTES {
        return;
    }
    let mut device = SimBackend::new(SimOptions::default());
    let loaded = Model::load(config, limits.state_limits(), &checkpoint, &mut device, &mut |_| {});
    match loaded {
        Ok(_) => assert!(!matches!(*checkpoint, Checkpoint::Random { .. })),
        Err(error) => check_sentence(&error.to_string()),
    }
}

fn small() -> EngineConfig {
    EngineConfig { block_size: 16, num_blocks: 8, ..EngineConfig::default() }
}

/// A folder of this thread, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("fullbore-fuzz-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder for what is tried");
        Folder(path)
    }

    fn write(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, data).expect("a file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
