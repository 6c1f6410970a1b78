//! Readers and dequantisers: PyPI's gguf is the reference for numbers; a hostile file gets a sentence, never a panic.
//! Needs the two models of `make test`.

use std::fs;
use std::path::{Path, PathBuf};

use fullbore_engine::backend::RowSource;
use fullbore_engine::format::gguf::{Array, Gguf, Value};
use fullbore_engine::format::quant::{decode_block, dequantize_row};
use fullbore_engine::format::safetensors::SafetensorsDir;
use fullbore_engine::tensor::WeightFormat;

use crate::random::Random;

mod golden {
    use super::*;

    /// A record of `quants.bin`; quants.py says how they are written.
    struct Record {
        label: String,
        stored: Vec<u8>,
        values: Vec<f32>,
    }

    fn records() -> Vec<Record> {
        let mut rest: &[u8] = include_bytes!("golden/quants.bin");
        let mut records = Vec::new();
        while !rest.is_empty() {
            let label = String::from_utf8(take(&mut rest, 1)).expect("a label");
            let stored = take(&mut rest, 1);
            let values = take(&mut rest, 4).chunks_exact(4).map(|value| f32_at(value, 0)).collect();
            records.push(Record { label, stored, values });
        }
        records
    }

    /// A counted run of elements.
    fn take(rest: &mut &[u8], element_bytes: usize) -> Vec<u8> {
        let (count, tail) = rest.split_at(4);
        let count = u32::from_le_bytes(count.try_into().expect("four bytes")) as usize;
        let (run, tail) = tail.split_at(count * element_bytes);
        *rest = tail;
        run.to_vec()
    }

    fn f32_at(bytes: &[u8], at: usize) -> f32 {
        f32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    }

    /// Bit for bit; any NaN equals any other, since their bits are the machine's choice.
    fn assert_same(label: &str, values: &[f32], expected: &[f32]) {
        assert_eq!(values.len(), expected.len(), "{label}");
        for (index, (value, expected)) in values.iter().zip(expected).enumerate() {
            let same = value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan();
            assert!(same, "{label}, element {index}: {value:e}, expected {expected:e}");
        }
    }

    fn format_named(name: &str) -> Option<WeightFormat> {
        WeightFormat::ALL.into_iter().find(|format| format.name() == name)
    }

    #[test]
    fn every_format_equals_pypi_gguf_bit_for_bit() {
        let records: Vec<_> = records().into_iter().filter(|record| !record.label.contains(':')).collect();
        let labels: Vec<&str> = records.iter().map(|record| record.label.as_str()).collect();
        assert_eq!(labels.len(), WeightFormat::ALL.len(), "{labels:?}");
        for Record { label, stored, values } in &records {
            let format = format_named(label).expect("a format's name");
            let mut row = vec![0.0; values.len()];
            dequantize_row(format, stored, &mut row);
            assert_same(label, &row, values);
        }
    }

    #[test]
    fn codes_and_scales_are_the_whole_value() {
        for Record { label, stored, values } in &records() {
            let Some(format) = format_named(label) else { continue };
            let blocks = stored.chunks_exact(format.block_bytes() as usize);
            for (bytes, values) in blocks.zip(values.chunks_exact(format.block_len() as usize)) {
                let block = decode_block(format, bytes);
                let value = |index: usize| {
                    let group = index / block.group_len;
                    block.scale[group] * f32::from(block.codes[index]) - block.min[group]
                };
                let row: Vec<f32> = (0..values.len()).map(value).collect();
                assert_same(label, &row, values);
            }
        }
    }

    #[test]
    fn both_models_open_and_their_rows_are_right() {
        let expected = [
            ("SmolLM2-135M-Instruct.Q4_1.gguf", 272, 96_576_768, 49_152, "<|endoftext|>"),
            ("gemma-3-270m-Q4_K_M.gguf", 236, 246_587_904, 262_144, "<pad>"),
        ];
        for (file, num_tensors, tensor_bytes, vocab_size, first_token) in expected {
            let gguf = open_model(file);
            assert_eq!(gguf.version(), 3);
            assert_eq!(gguf.tensors().count(), num_tensors);
            assert_eq!(gguf.total_tensor_bytes(), tensor_bytes);
            let tokens = gguf.strings("tokenizer.ggml.tokens").expect("strings").expect("tokens");
            assert_eq!((tokens.len(), tokens[0].as_str()), (vocab_size, first_token));
        }
        let rows: Vec<_> = records().into_iter().filter(|record| record.label.contains(':')).collect();
        assert_eq!(rows.len(), 2);
        for Record { label, stored, values } in rows {
            let [file, tensor, row] = label.split(':').collect::<Vec<_>>().try_into().expect("file:tensor:row");
            let gguf = open_model(file);
            let info = gguf.tensor(tensor).expect("the tensor");
            let mut bytes = vec![0; stored.len()];
            let mut source = gguf.rows(tensor).expect("rows");
            for _ in 0..=row.parse().expect("a row") {
                source.read_rows(&mut bytes).expect("a row");
            }
            assert_eq!(bytes, stored, "{label}");
            let mut row = vec![0.0; info.cols as usize];
            dequantize_row(info.format, &bytes, &mut row);
            assert_same(&label, &row, &values);
        }
    }

    fn open_model(file: &str) -> Gguf {
        let home = || std::env::home_dir().expect("a home folder").join(".cache/fullbore");
        let cache = std::env::var_os("FULLBORE_CACHE").map_or_else(home, PathBuf::from);
        let path = cache.join("models").join(file);
        assert!(path.exists(), "{} is missing: run make test, which fetches the models", path.display());
        Gguf::open(&path).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// A folder of its own below Cargo's, empty.
fn fresh_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("formats").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a temporary folder");
    dir
}

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).expect("a temporary file");
    path
}

/// Reads a tensor of `rows` rows, two at a time, and dequantises it.
fn read_values(mut source: Box<dyn RowSource>, format: WeightFormat, rows: u32, cols: u32) -> Vec<f32> {
    let row_bytes = format.row_bytes(cols) as usize;
    let mut values = vec![0.0; rows as usize * cols as usize];
    for chunk in values.chunks_mut(2 * cols as usize) {
        let mut bytes = vec![0; chunk.len() / cols as usize * row_bytes];
        source.read_rows(&mut bytes).expect("rows of a sound file");
        dequantize_row(format, &bytes, chunk);
    }
    values
}

/// Some bytes of the header changed, to extremes, to anything or to others of the header, or the file cut short.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>, header_bytes: usize) {
    if random.below(8) == 0 {
        bytes.truncate(random.below(bytes.len() as u32) as usize);
        return;
    }
    for _ in 0..=random.below(3) {
        let at = random.below(header_bytes as u32) as usize;
        bytes[at] = match random.below(8) {
            0 => 0,
            1 => 0xff,
            2 => random.next() as u8,
            3 => bytes[at] ^ 1 << random.below(8),
            _ => bytes[random.below(header_bytes as u32) as usize],
        };
    }
}

mod gguf {
    use super::*;

    /// A GGUF file to be, every part of which a test may make wrong.
    #[derive(Clone)]
    struct Sample {
        magic: [u8; 4],
        version: u32,
        num_tensors: Option<u64>,
        num_keys: Option<u64>,
        /// Name and encoded type and value.
        keys: Vec<(String, Vec<u8>)>,
        tensors: Vec<Entry>,
        alignment: usize,
        data: Vec<u8>,
    }

    #[derive(Clone)]
    struct Entry {
        name: &'static str,
        dims: Vec<u64>,
        format: u32,
        start: u64,
    }

    const U32: u32 = 4;
    const BOOL: u32 = 7;
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn typed(number: u32, value: &[u8]) -> Vec<u8> {
        [&number.to_le_bytes(), value].concat()
    }

    fn array(number: u32, count: u64, elements: &[u8]) -> Vec<u8> {
        [&typed(ARRAY, &number.to_le_bytes()), &count.to_le_bytes()[..], elements].concat()
    }

    impl Sample {
        /// Two tensors (f32 of 2 x 3, then q8_0 of 2 x 2 x 32) and a key of every kind.
        fn sound(version: u32) -> Sample {
            let names = [text("a"), text("βγ"), text("")].concat();
            let inner = [&U32.to_le_bytes()[..], &1u64.to_le_bytes(), &5u32.to_le_bytes()].concat();
            let keys: [(&str, Vec<u8>); 11] = [
                ("general.name", typed(STRING, &text("tiny"))),
                ("a.u8", typed(0, &[200])),
                ("a.i16", typed(3, &(-2i16).to_le_bytes())),
                ("a.u32", typed(U32, &7u32.to_le_bytes())),
                ("a.f32", typed(6, &0.5f32.to_le_bytes())),
                ("a.f64", typed(12, &0.25f64.to_le_bytes())),
                ("a.u64", typed(10, &(1u64 << 40).to_le_bytes())),
                ("a.bool", typed(BOOL, &[1])),
                ("a.strings", array(STRING, 3, &names)),
                ("a.f32s", array(6, 2, &[1f32.to_le_bytes(), 2f32.to_le_bytes()].concat())),
                ("a.nested", array(ARRAY, 1, &inner)),
            ];
            let floats: Vec<u8> = (0..6).flat_map(|value| (value as f32).to_le_bytes()).collect();
            let block = [&[0x00, 0x3c][..], &(0..32).collect::<Vec<u8>>()].concat();
            Sample {
                magic: *b"GGUF",
                version,
                num_tensors: None,
                num_keys: None,
                keys: keys.map(|(key, value)| (key.to_owned(), value)).to_vec(),
                tensors: vec![
                    Entry { name: "floats", dims: vec![3, 2], format: 0, start: 0 },
                    Entry { name: "blocks", dims: vec![32, 2, 2], format: 8, start: 32 },
                ],
                alignment: 32,
                data: [&floats[..], &[0; 8], &block.repeat(4)].concat(),
            }
        }

        fn header(&self) -> Vec<u8> {
            let num_tensors = self.num_tensors.unwrap_or(self.tensors.len() as u64);
            let num_keys = self.num_keys.unwrap_or(self.keys.len() as u64);
            let mut out = [&self.magic[..], &self.version.to_le_bytes()].concat();
            out.extend([num_tensors, num_keys].map(u64::to_le_bytes).as_flattened());
            for (key, value) in &self.keys {
                out.extend([text(key), value.clone()].concat());
            }
            for Entry { name, dims, format, start } in &self.tensors {
                out.extend(text(name));
                out.extend((dims.len() as u32).to_le_bytes());
                dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
                out.extend(format.to_le_bytes());
                out.extend(start.to_le_bytes());
            }
            out
        }

        /// Bytes of the header that the tensors' entries take.
        fn entries_bytes(&self) -> usize {
            let bare = Sample { tensors: Vec::new(), ..self.clone() };
            self.header().len() - bare.header().len()
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = self.header();
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            [&out[..], &self.data].concat()
        }

        fn with_key(mut self, key: &str, value: Vec<u8>) -> Sample {
            self.keys.push((key.to_owned(), value));
            self
        }
    }

    fn check_sound(gguf: &Gguf, version: u32) {
        assert_eq!(gguf.version(), version);
        assert_eq!(gguf.str("general.name").expect("a string"), Some("tiny"));
        assert_eq!(gguf.u32("a.u8").expect("an integer"), Some(200));
        assert_eq!(gguf.u32("a.u32").expect("an integer"), Some(7));
        assert_eq!(gguf.f32("a.f32").expect("a float"), Some(0.5));
        assert_eq!(gguf.f32("a.f64").expect("a float"), Some(0.25));
        assert_eq!(gguf.bool("a.bool").expect("a bool"), Some(true));
        assert_eq!(gguf.f32s("a.f32s").expect("floats"), Some(&[1.0, 2.0][..]));
        let strings = gguf.strings("a.strings").expect("strings").expect("there");
        assert_eq!(strings, ["a", "βγ", ""]);
        let nested = Value::Array(Array::Array(vec![Array::U32(vec![5])]));
        assert_eq!(gguf.metadata("a.nested"), Some(&nested));
        assert_eq!(gguf.u32("absent").expect("nothing wrong"), None);

        let shapes: Vec<_> = gguf.tensors().map(|info| (info.name.as_str(), info.rows, info.cols)).collect();
        assert_eq!(shapes, [("floats", 2, 3), ("blocks", 4, 32)]);
        assert_eq!(gguf.total_tensor_bytes(), 24 + 4 * 34);
        let floats = read_values(gguf.rows("floats").expect("rows"), WeightFormat::F32, 2, 3);
        assert_eq!(floats, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let blocks = read_values(gguf.rows("blocks").expect("rows"), WeightFormat::Q8_0, 4, 32);
        assert_eq!(blocks, (0..128).map(|index| (index % 32) as f32).collect::<Vec<_>>());
    }

    #[test]
    fn versions_two_and_three_read_the_same() {
        let dir = fresh_dir("sound");
        for version in [2, 3] {
            let path = write(&dir, &format!("v{version}.gguf"), Sample::sound(version).bytes());
            check_sound(&Gguf::open(&path).expect("a sound file"), version);
        }
    }

    #[test]
    fn alignment_is_the_file_s_own() {
        let mut sample = Sample::sound(3).with_key("general.alignment", typed(U32, &256u32.to_le_bytes()));
        sample.alignment = 256;
        sample.tensors[1].start = 256;
        let blocks = sample.data.split_off(32);
        sample.data.resize(256, 0);
        sample.data.extend(blocks);
        let path = write(&fresh_dir("alignment"), "a.gguf", sample.bytes());
        check_sound(&Gguf::open(&path).expect("a sound file"), 3);
    }

    #[test]
    fn wrong_types_and_absent_tensors_are_named() {
        let path = write(&fresh_dir("types"), "a.gguf", Sample::sound(3).bytes());
        let gguf = Gguf::open(&path).expect("a sound file");
        let errors = [
            (gguf.u32("general.name").map(drop), "`general.name` is a string, not an integer of 32 bits"),
            (gguf.u32("a.i16").map(drop), "`a.i16` is an integer, not an integer of 32 bits"),
            (gguf.u32("a.u64").map(drop), "`a.u64` is an unsigned integer, not an integer of 32 bits"),
            (gguf.f32("a.u32").map(drop), "`a.u32` is an unsigned integer, not a float"),
            (gguf.str("a.strings").map(drop), "`a.strings` is an array of strings, not a string"),
            (gguf.strings("a.f32s").map(drop), "`a.f32s` is an array of floats, not an array of strings"),
            (gguf.i32s("a.nested").map(drop), "`a.nested` is an array of arrays, not an array of 32-bit integers"),
            (gguf.rows("absent").map(drop), "there is no tensor `absent`"),
        ];
        for (result, expected) in errors {
            let sentence = result.expect_err(expected).to_string();
            assert!(sentence.contains(expected), "{sentence}");
        }
    }

    fn hostile_headers() -> Vec<(Vec<u8>, &'static str)> {
        let with = |change: fn(&mut Sample)| {
            let mut sample = Sample::sound(3);
            change(&mut sample);
            sample.bytes()
        };
        let cut = |size: usize| Sample::sound(3).bytes()[..size].to_vec();
        vec![
            (cut(0), "the file ends inside the header"),
            (cut(12), "the file ends inside the header"),
            (cut(24), "the header claims 2 tensors, but only 8 bytes are left"),
            (with(|sample| sample.magic = *b"ELF\x7f"), "not a GGUF file"),
            (with(|sample| sample.magic = *b"ggjt"), "from before GGUF"),
            (with(|sample| sample.magic = *b"FUGG"), "big-endian GGUF is not supported"),
            (with(|sample| sample.version = 3u32.swap_bytes()), "big-endian GGUF is not supported"),
            (with(|sample| sample.version = 1), "GGUF version 1 is not supported"),
            (with(|sample| sample.version = 4), "GGUF version 4 is not supported"),
            (with(|sample| sample.num_tensors = Some(u64::MAX)), "the header claims 18446744073709551615 tensors"),
            (with(|sample| sample.num_keys = Some(1 << 40)), "the header claims 1099511627776 metadata keys"),
            (with(|sample| sample.num_tensors = Some(3)), "the entry of tensor 2 has a name of 0 bytes"),
            (with(|sample| sample.num_keys = Some(12)), "the entry of tensor 0 claims 562949953421312 bytes of text"),
        ]
    }

    fn hostile_metadata() -> Vec<(Vec<u8>, &'static str)> {
        let with = |key: &str, value: Vec<u8>| Sample::sound(3).with_key(key, value).bytes();
        let five_deep = (0..4).fold(array(U32, 0, &[]), |inner, _| array(ARRAY, 1, &inner[4..]));
        vec![
            (
                with("k", typed(STRING, &(1u64 << 40).to_le_bytes())),
                "the value of `k` claims 1099511627776 bytes of text",
            ),
            (with("k", array(STRING, 1 << 40, &[])), "the value of `k` claims 1099511627776 elements"),
            (with("k", array(10, 1 << 60, &[])), "the value of `k` claims 1152921504606846976 elements"),
            (with("k", array(ARRAY, u64::MAX, &[])), "the value of `k` claims 18446744073709551615 elements"),
            (
                with("k", array(STRING, 1, &u64::MAX.to_le_bytes())),
                "the value of `k` claims 18446744073709551615 bytes",
            ),
            (with("k", five_deep), "the value of `k` nests arrays deeper than 4"),
            (with("k", typed(13, &[])), "the value of `k` is of the unknown type 13"),
            (with("k", array(13, 0, &[])), "the value of `k` is of the unknown type 13"),
            (with("k", typed(BOOL, &[2])), "the value of `k` has a bool of 2"),
            (with("k", typed(STRING, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), "the value of `k` is not UTF-8"),
            (with("", typed(BOOL, &[1])), "metadata key 11 has a name of 0 bytes"),
            (with(&"k".repeat(65_536), typed(BOOL, &[1])), "metadata key 11 has a name of 65536 bytes"),
            (with("a.u8", typed(BOOL, &[1])), "the metadata key `a.u8` is there twice"),
            (
                with("general.alignment", typed(U32, &24u32.to_le_bytes())),
                "`general.alignment` is 24, not a power of two",
            ),
            (
                with("general.alignment", typed(U32, &0u32.to_le_bytes())),
                "`general.alignment` is 0, not a power of two",
            ),
            (with("general.alignment", typed(STRING, &text("32"))), "`general.alignment` is a string"),
            (with("general.alignment", typed(10, &(1u64 << 63).to_le_bytes())), "tensor `blocks` starts at 32"),
            (with("split.count", typed(2, &3u16.to_le_bytes())), "one of 3 parts of a split model"),
        ]
    }

    fn hostile_tensors() -> Vec<(Vec<u8>, &'static str)> {
        let with = |change: fn(&mut Entry)| {
            let mut sample = Sample::sound(3);
            change(&mut sample.tensors[1]);
            sample.bytes()
        };
        let mut short = Sample::sound(3);
        short.data.pop();
        vec![
            (with(|tensor| tensor.name = "floats"), "tensor `floats` is there twice"),
            (with(|tensor| tensor.name = ""), "the entry of tensor 1 has a name of 0 bytes"),
            (with(|tensor| tensor.dims = vec![]), "tensor `blocks` has 0 dimensions, not 1 to 4"),
            (with(|tensor| tensor.dims = vec![32, 1, 1, 1, 1]), "tensor `blocks` has 5 dimensions, not 1 to 4"),
            (with(|tensor| tensor.dims = vec![32, 0]), "tensor `blocks` has a dimension of zero"),
            (with(|tensor| tensor.dims = vec![0, 2]), "tensor `blocks` has a dimension of zero"),
            (with(|tensor| tensor.dims = vec![32, 1 << 32]), "tensor `blocks` is too large: [32, 4294967296]"),
            (with(|tensor| tensor.dims = vec![1 << 32]), "tensor `blocks` is too large"),
            (with(|tensor| tensor.dims = vec![32, 1 << 40, 1 << 40]), "tensor `blocks` is too large"),
            (with(|tensor| tensor.dims = vec![(1 << 32) - 32, (1 << 32) - 1]), "tensor `blocks` is too large"),
            (
                with(|tensor| tensor.dims = vec![33]),
                "tensor `blocks` has rows of 33, no multiple of q8_0's block of 32",
            ),
            (with(|tensor| tensor.format = 99), "tensor `blocks` has the format unknown (GGML type 99)"),
            (with(|tensor| tensor.format = 16), "tensor `blocks` has the format iq2_xxs (GGML type 16)"),
            (with(|tensor| tensor.start = 33), "tensor `blocks` starts at 33, no multiple of 32"),
            (with(|tensor| tensor.start = u64::MAX - 31), "tensor `blocks` lies beyond the end of the file"),
            (with(|tensor| tensor.start = 1 << 40), "tensor `blocks` lies beyond the end of the file"),
            (with(|tensor| tensor.dims = vec![32, 5]), "tensor `blocks` lies beyond the end of the file"),
            (with(|tensor| tensor.start = 0), "tensors `floats` and `blocks` overlap"),
            (short.bytes(), "tensor `blocks` lies beyond the end of the file"),
        ]
    }

    #[test]
    fn hostile_files_get_a_sentence() {
        let dir = fresh_dir("hostile-gguf");
        for (bytes, expected) in [hostile_headers(), hostile_metadata(), hostile_tensors()].concat() {
            let path = write(&dir, "hostile.gguf", bytes);
            let sentence = Gguf::open(&path).expect_err(expected).to_string();
            assert!(sentence.contains(expected), "expected `{expected}`, got `{sentence}`");
            assert!(sentence.contains("hostile.gguf"), "{sentence}");
        }
    }

    /// A sparse file is as long as it likes, and none of it need be there.
    #[test]
    fn a_header_over_the_limit_is_refused_unread() {
        let dir = fresh_dir("long-header-gguf");
        let open = |value: Vec<u8>| {
            let header = Sample::sound(3).with_key("k", value).header();
            let path = write(&dir, "long.gguf", &header[..header.len() - Sample::sound(3).entries_bytes()]);
            let sparse = fs::File::options().write(true).open(&path).and_then(|file| file.set_len(1 << 40));
            sparse.expect("a sparse file");
            Gguf::open(&path).expect_err("too long").to_string()
        };
        for value in [typed(STRING, &(1u64 << 30).to_le_bytes()), array(STRING, 1 << 30, &[]), array(0, 1 << 30, &[])] {
            let sentence = open(value);
            assert!(sentence.contains("the value of `k` claims 1073741824"), "{sentence}");
        }
    }

    #[test]
    fn an_absent_file_and_a_folder_are_named() {
        let dir = fresh_dir("absent");
        for path in [dir.join("absent.gguf"), dir.clone()] {
            let sentence = Gguf::open(&path).expect_err("not a file").to_string();
            assert!(sentence.contains(&path.display().to_string()), "{sentence}");
        }
    }

    /// A mutated file is refused, or sound: then all of its tensors can be read and fit side by side into it.
    #[test]
    fn mutated_files_never_panic() {
        let dir = fresh_dir("mutated-gguf");
        let mut random = Random::new(1);
        let sound = Sample::sound(3);
        let (header_bytes, sound) = (sound.header().len(), sound.bytes());
        let mut num_opened = 0;
        for _ in 0..4000 {
            let mut bytes = sound.clone();
            mutate(&mut random, &mut bytes, header_bytes);
            let path = write(&dir, "mutated.gguf", &bytes);
            let Ok(gguf) = Gguf::open(&path) else { continue };
            num_opened += 1;
            assert!(gguf.total_tensor_bytes() <= bytes.len() as u64);
            for info in gguf.tensors() {
                let source = gguf.rows(&info.name).expect("a tensor of this file");
                read_values(source, info.format, info.rows, info.cols);
            }
        }
        assert!((40..3960).contains(&num_opened), "{num_opened} of 4000 mutations opened: they test too little");
    }
}

mod safetensors {
    use super::*;

    const SOUND: &str = r#"{"__metadata__":{"format":"pt"},
        "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "b":{"dtype":"BF16","shape":[2,1,2],"data_offsets":[24,32]},
        "c":{"dtype":"F16","shape":[3],"data_offsets":[32,38]}}"#;

    fn shard(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    fn sound_data() -> Vec<u8> {
        let a = (0..6).flat_map(|value| (value as f32).to_le_bytes());
        let b = [0x3f80u16, 0x4000, 0xbf80, 0x0000].into_iter().flat_map(u16::to_le_bytes);
        let c = [0x3c00u16, 0x4000, 0x0001].into_iter().flat_map(u16::to_le_bytes);
        a.chain(b).chain(c).collect()
    }

    /// A shard of one f32 vector: the first letter of its name, twice.
    fn small_shard(tensor: &str) -> Vec<u8> {
        let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
        shard(&header, f32::from(tensor.as_bytes()[0]).to_le_bytes().repeat(2).as_slice())
    }

    fn model_dir(name: &str) -> PathBuf {
        let dir = fresh_dir(name);
        write(&dir, "config.json", r#"{"model_type":"llama"}"#);
        dir
    }

    #[test]
    fn one_file_and_its_json() {
        let dir = model_dir("single");
        write(&dir, "model.safetensors", shard(SOUND, &sound_data()));
        write(&dir, "generation_config.json", r#"{"temperature":0.5}"#);
        write(&dir, "chat_template.jinja", "{{ messages }}");
        write(&dir, "tokenizer.json", "{}");
        let model = SafetensorsDir::open(&dir).expect("a sound folder");
        assert_eq!(model.config_json()["model_type"], "llama");
        assert_eq!(model.generation_config_json().expect("there")["temperature"], 0.5);
        assert_eq!(model.tokenizer_config_json(), None);
        assert_eq!(model.chat_template(), Some("{{ messages }}"));
        assert_eq!(model.tokenizer_json().expect("there"), b"{}");

        let shapes: Vec<_> = model.tensors().map(|info| (info.name.as_str(), info.rows, info.cols)).collect();
        assert_eq!(shapes, [("a", 2, 3), ("b", 2, 2), ("c", 1, 3)]);
        assert_eq!(model.total_tensor_bytes(), 38);
        let values = |name: &str| {
            let info = model.tensor(name).expect("a tensor");
            read_values(model.rows(name).expect("rows"), info.format, info.rows, info.cols)
        };
        assert_eq!(values("a"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(values("b"), [1.0, 2.0, -1.0, 0.0]);
        assert_eq!(values("c"), [1.0, 2.0, 2f32.powi(-24)]);
    }

    #[test]
    fn shards_behind_an_index() {
        let dir = model_dir("shards");
        write(&dir, "1.safetensors", small_shard("a"));
        write(&dir, "2.safetensors", small_shard("b"));
        write(&dir, "model.safetensors.index.json", index(&[("a", "1.safetensors"), ("b", "2.safetensors")]));
        let model = SafetensorsDir::open(&dir).expect("a sound folder");
        let names: Vec<_> = model.tensors().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        for (name, expected) in [("a", f32::from(b'a')), ("b", f32::from(b'b'))] {
            let values = read_values(model.rows(name).expect("rows"), WeightFormat::F32, 1, 2);
            assert_eq!(values, [expected; 2]);
        }
    }

    fn index(weight_map: &[(&str, &str)]) -> String {
        let entries: Vec<_> = weight_map.iter().map(|(tensor, shard)| format!(r#""{tensor}":"{shard}""#)).collect();
        format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(","))
    }

    /// Opens `dir`, which must fail, with `expected` in the sentence.
    fn check_refused(dir: &Path, expected: &str) {
        let sentence = SafetensorsDir::open(dir).expect_err(expected).to_string();
        assert!(sentence.contains(expected), "expected `{expected}`, got `{sentence}`");
    }

    fn hostile_shards() -> Vec<(Vec<u8>, &'static str)> {
        let entry = |dtype: &str, shape: &str, size: usize| {
            let header = format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{size}]}}}}"#);
            shard(&header, &vec![0; size])
        };
        let twice = r#"{"t":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},
            "t":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#;
        let hole = r#"{"t":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#;
        let backwards = r#"{"t":{"dtype":"F16","shape":[1],"data_offsets":[4,2]}}"#;
        let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
        vec![
            (vec![], "0 bytes are no safetensors file"),
            (vec![0; 7], "7 bytes are no safetensors file"),
            (length(3), "the header claims 3 bytes; the file has 10"),
            (length(u64::MAX), "the header claims 18446744073709551615 bytes; the file has 10"),
            (shard("[]", &[]), "the header is wrong"),
            (shard("{", &[]), "the header is wrong"),
            (shard(&"[".repeat(100_000), &[]), "the header is wrong"),
            (shard(SOUND, &sound_data()[1..]), "the tensors take 38 bytes, but 37 follow the header"),
            (shard(SOUND, &[&sound_data()[..], &[0]].concat()), "the tensors take 38 bytes, but 39 follow the header"),
            (shard(twice, &[0; 2]), "`t` is there twice"),
            (shard(hole, &[0; 4]), "the header is wrong"),
            (shard(backwards, &[0; 4]), "the header is wrong"),
            (entry("F32", "[2]", 4), "the header is wrong"),
            (entry("F32", "[-1]", 4), "the header is wrong"),
            (entry("F32", "[4294967296,4294967296]", 0), "the header is wrong"),
            (entry("F32", "[18446744073709551615,2]", 0), "the header is wrong"),
            (entry("F7", "[1]", 1), "unknown variant `F7`"),
            (entry("F32", "[2,0]", 0), "tensor `t` has a dimension of zero"),
            (entry("F8_E4M3", "[4]", 4), "tensor `t` is F8_E4M3: FP8 is not supported yet"),
            (entry("F8_E5M2", "[4]", 4), "tensor `t` is F8_E5M2: FP8 is not supported yet"),
            (entry("I64", "[1]", 8), "tensor `t` is I64; get the model in F32, F16 or BF16"),
        ]
    }

    #[test]
    fn hostile_shards_get_a_sentence() {
        let dir = model_dir("hostile-shards");
        for (bytes, expected) in hostile_shards() {
            write(&dir, "model.safetensors", bytes);
            check_refused(&dir, expected);
        }
    }

    #[test]
    fn a_header_over_the_limit_is_refused_unread() {
        let dir = model_dir("long-header");
        let path = write(&dir, "model.safetensors", 100_000_001u64.to_le_bytes());
        let sparse = fs::File::options().write(true).open(path).expect("the file");
        sparse.set_len(200_000_000).expect("a sparse file");
        check_refused(&dir, "the limit is 100000000");
    }

    #[test]
    fn hostile_indices_get_a_sentence() {
        let dir = model_dir("hostile-index");
        write(&dir, "1.safetensors", small_shard("a"));
        write(&dir, "2.safetensors", small_shard("a"));
        let outside = fresh_dir("hostile-index-outside");
        write(&outside, "x.safetensors", small_shard("a"));
        let absolute = outside.join("x.safetensors").display().to_string();
        let indices = [
            ("{}".to_owned(), "missing field `weight_map`"),
            (r#"{"weight_map":{"a":1}}"#.to_owned(), "invalid type: integer `1`"),
            (index(&[("a", "1.safetensors"), ("a", "2.safetensors")]), "`a` is there twice"),
            (index(&[("a", "../hostile-index-outside/x.safetensors")]), "is not the name of a file in this folder"),
            (index(&[("a", &absolute)]), "is not the name of a file in this folder"),
            (index(&[("a", "..")]), "the shard `..` is not the name of a file"),
            (index(&[("a", "./1.safetensors")]), "the shard `./1.safetensors` is not the name of a file"),
            (index(&[("a", r"..\\1.safetensors")]), r"the shard `..\1.safetensors` is not the name of a file"),
            (index(&[("a", "C:1.safetensors")]), "the shard `C:1.safetensors` is not the name of a file"),
            (index(&[("a", "")]), "the shard `` is not the name of a file"),
            (index(&[("a", "3.safetensors")]), "3.safetensors: "),
            (index(&[("b", "1.safetensors")]), "tensor `b` is not in its shard `1.safetensors`"),
            (index(&[("a", "1.safetensors"), ("b", "2.safetensors")]), "tensor `a` is there twice"),
        ];
        for (json, expected) in indices {
            write(&dir, "model.safetensors.index.json", json);
            check_refused(&dir, expected);
        }
    }

    #[test]
    fn files_beside_the_tensors_are_checked() {
        let dir = fresh_dir("beside");
        check_refused(&dir, "there is no model.safetensors and no model.safetensors.index.json");
        write(&dir, "model.safetensors", small_shard("a"));
        check_refused(&dir, "config.json");
        write(&dir, "config.json", "[]");
        check_refused(&dir, "config.json: the JSON is not an object");
        write(&dir, "config.json", "{");
        check_refused(&dir, "config.json: the JSON is wrong");
        write(&dir, "config.json", "{}");
        write(&dir, "generation_config.json", "1");
        check_refused(&dir, "generation_config.json: the JSON is not an object");
        write(&dir, "generation_config.json", "{}");
        write(&dir, "chat_template.jinja", [0xff]);
        check_refused(&dir, "chat_template.jinja: the text is not UTF-8");
        write(&dir, "chat_template.jinja", "{{ messages }}");
        let long = write(&dir, "tokenizer_config.json", "{}");
        fs::File::options().write(true).open(&long).and_then(|file| file.set_len(65 << 20)).expect("a sparse file");
        check_refused(&dir, "tokenizer_config.json: the file is larger than 67108864 bytes");
        write(&dir, "tokenizer_config.json", "{}");
        let model = SafetensorsDir::open(&dir).expect("a sound folder");
        let sentence = model.tokenizer_json().expect_err("no tokenizer").to_string();
        assert!(sentence.contains("tokenizer.json"), "{sentence}");
        let sentence = model.rows("b").map(drop).expect_err("no such tensor").to_string();
        assert!(sentence.contains("there is no tensor `b`"), "{sentence}");
    }

    #[test]
    fn mutated_shards_never_panic() {
        let dir = model_dir("mutated-shards");
        let mut random = Random::new(2);
        let sound = shard(SOUND, &sound_data());
        let header_bytes = sound.len() - sound_data().len();
        let mut num_opened = 0;
        for _ in 0..4000 {
            let mut bytes = sound.clone();
            mutate(&mut random, &mut bytes, header_bytes);
            write(&dir, "model.safetensors", &bytes);
            let Ok(model) = SafetensorsDir::open(&dir) else { continue };
            num_opened += 1;
            assert!(model.total_tensor_bytes() <= bytes.len() as u64);
            for info in model.tensors() {
                let source = model.rows(&info.name).expect("a tensor of this folder");
                read_values(source, info.format, info.rows, info.cols);
            }
        }
        assert!((40..3960).contains(&num_opened), "{num_opened} of 4000 mutations opened: they test too little");
    }
}
