//! A file that says which devices serve, and what each may have: `--device devices.toml`.
//!
//! ```toml
//! [[device]]
//! name = "vulkan:0"
//! max-num-seqs = 64
//! kv-memory = "8GiB"
//! ```

use std::path::Path;
use std::{fs, io};

use serde::Deserialize;

use crate::args::{EngineArgs, parse_bytes};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceFile {
    device: Vec<Listed>,
}

/// What is not said is as for all.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Listed {
    pub name: String,
    max_num_seqs: Option<u32>,
    max_num_batched_tokens: Option<u32>,
    kv_memory: Option<String>,
    memory_fraction: Option<f64>,
    swap_memory: Option<String>,
}

/// Whether a `--device` is the path of a file.
pub fn is_file(device: &str) -> bool {
    Path::new(device).extension().is_some_and(|extension| extension == "toml")
}

/// At least one device.
pub fn read(path: &str) -> Result<Vec<Listed>, String> {
    let text = fs::read_to_string(path).map_err(|error: io::Error| format!("cannot read {path}: {error}"))?;
    parse(&text).map_err(|problem| format!("{path}: {problem}"))
}

fn parse(text: &str) -> Result<Vec<Listed>, String> {
    let DeviceFile { device } = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    if device.is_empty() {
        return Err("it names no device; begin one with [[device]] and its name".to_owned());
    }
    for listed in &device {
        listed.check().map_err(|problem| format!("{}: {problem}", listed.name))?;
    }
    Ok(device)
}

impl Listed {
    fn check(&self) -> Result<(), String> {
        let sizes = [&self.kv_memory, &self.swap_memory];
        sizes.into_iter().flatten().try_for_each(|size| parse_bytes(size).map(drop))?;
        match self.memory_fraction {
            Some(_) if self.kv_memory.is_some() => Err("it has both kv-memory and memory-fraction".to_owned()),
            Some(share) if !(share > 0.0 && share <= 1.0) => Err(format!("{share} is no share of the memory")),
            _ => Ok(()),
        }
    }

    pub fn has_own_fraction(&self) -> bool {
        self.memory_fraction.is_some()
    }

    /// `args`, but for what the device has of its own.
    pub fn apply(&self, args: &mut EngineArgs) {
        let size = |text: &Option<String>| text.as_deref().and_then(|text| parse_bytes(text).ok());
        args.max_num_seqs = self.max_num_seqs.unwrap_or(args.max_num_seqs);
        args.max_num_batched_tokens = self.max_num_batched_tokens.unwrap_or(args.max_num_batched_tokens);
        args.swap_memory = size(&self.swap_memory).or(args.swap_memory);
        if self.kv_memory.is_some() || self.memory_fraction.is_some() {
            args.kv_blocks = None;
            args.kv_memory = size(&self.kv_memory);
            args.memory_fraction = self.memory_fraction;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::ModelArgs;

    #[test]
    fn a_device_has_what_the_file_says_and_else_what_all_have() {
        let first = "[[device]]\nname = \"vulkan:0\"\nmax-num-seqs = 64\nkv-memory = \"2GiB\"\n";
        let text = format!("{first}[[device]]\nname = \"cpu@0\"");
        let [first, second] = &parse(&text).expect("it is right")[..] else { panic!("two") };
        let all = EngineArgs { memory_fraction: Some(0.5), ..EngineArgs::new(ModelArgs::new("", "cpu")) };
        let (mut of_first, mut of_second) = (all.clone(), all.clone());
        first.apply(&mut of_first);
        second.apply(&mut of_second);
        assert_eq!((of_first.max_num_seqs, of_first.kv_memory, of_first.memory_fraction), (64, Some(2 << 30), None));
        assert_eq!(second.name, "cpu@0");
        assert_eq!((of_second.max_num_seqs, of_second.memory_fraction), (all.max_num_seqs, Some(0.5)));
        assert!(!second.has_own_fraction());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = [
            ("", "device"),
            ("device = []", "no device"),
            ("[[device]]\nname = \"a\"\nkv-memroy = \"1GiB\"", "kv-memroy"),
            ("[[device]]\nmax-num-seqs = 1", "name"),
            ("[[device]]\nname = \"a\"\nkv-memory = \"much\"", "a: "),
            ("[[device]]\nname = \"a\"\nmemory-fraction = 1.5", "1.5 is no share"),
            ("[[device]]\nname = \"a\"\nmemory-fraction = 0.5\nkv-memory = \"1GiB\"", "both"),
        ];
        for (text, part) in wrong {
            let sentence = parse(text).expect_err("refused");
            assert!(sentence.contains(part), "{text}: {sentence}");
        }
        assert!(read("/no/such/file.toml").is_err_and(|sentence| sentence.contains("/no/such/file.toml")));
    }
}
