//! Tokenizers against llama.cpp's ids, detokenizer and stop strings against naive twins, chat templates against hostile
//! messages and hostile templates. Needs the two models and llama.cpp's vectors (`make models`).

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use fullbore_engine::format::gguf::Gguf;
use fullbore_engine::request::TokenId;
use fullbore_engine::text::{
    ChatMessage, ChatTemplate, Detokenizer, GgufVocab, Special, StopStrings, TextError, Tokenizer,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

fn cache(file: &str, script: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/fullbore");
    let path = std::env::var_os("FULLBORE_CACHE").map_or_else(home, PathBuf::from).join(file);
    assert!(path.exists(), "{} is missing: run {script}", path.display());
    path
}

fn load(path: PathBuf) -> Arc<Tokenizer> {
    let gguf = Gguf::open(&path).expect("a model file");
    Arc::new(Tokenizer::from_gguf(&gguf).expect("a tokenizer"))
}

static SMOLLM2: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| load(cache("models/SmolLM2-135M-Instruct.Q4_1.gguf", "make models")));
static GEMMA3: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| load(cache("models/gemma-3-270m-Q4_K_M.gguf", "make models")));
static LLAMA_SPM: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| vocab("llama-spm"));

fn vocab(name: &str) -> Arc<Tokenizer> {
    load(cache(&format!("vocab/ggml-vocab-{name}.gguf"), "scripts/vocab.sh"))
}

fn ids(list: &Value) -> Vec<TokenId> {
    list.as_array().expect("ids").iter().map(|id| TokenId(id.as_u64().expect("an id") as u32)).collect()
}

fn runner(cases: u32) -> TestRunner {
    let more = if std::env::var_os("FULLBORE_TEST_FULL").is_some() { 10 } else { 1 };
    TestRunner::new(Config { cases: cases * more, failure_persistence: None, ..Config::default() })
}

/// Text that is rich in what tokenizers trip over.
fn texts() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        "[ -~]{0,12}",
        "[\\s]{0,4}",
        "\\PC{0,6}",
        Just("<|im_end|>".to_string()),
        Just("<|im_start|>user\n".to_string()),
        Just("<|im_e".to_string()),
        Just("nd|>".to_string()),
        Just("<end_of_turn>".to_string()),
        Just("<s>".to_string()),
        Just("</s>".to_string()),
        Just("🙂é中".to_string()),
    ];
    proptest::collection::vec(pieces, 0..8).prop_map(|pieces| pieces.concat())
}

mod tokenizer {
    use super::*;

    fn check_vectors(name: &str) {
        let tokenizer = vocab(name);
        let read = |suffix: &str| {
            let path = cache(&format!("vocab/ggml-vocab-{name}.gguf.{suffix}"), "scripts/vocab.sh");
            std::fs::read_to_string(path).expect("a vector file")
        };
        let (input, output) = (read("inp"), read("out"));
        let texts: Vec<&str> = input.split("\n__ggml_vocab_test__\n").collect();
        let expected: Vec<&str> = output.lines().collect();
        assert!(expected.len() > 40, "{name}: {} vectors", expected.len());
        assert_eq!(texts.len(), expected.len() + 1, "{name}: every text but the empty last one has ids");
        for (text, expected) in texts.iter().zip(expected) {
            let expected: Vec<_> = expected.split_whitespace().map(|id| TokenId(id.parse().expect("an id"))).collect();
            assert_eq!(tokenizer.encode(text, Special::AsText), expected, "{name}: {text:?}");
        }
    }

    #[test]
    fn ids_are_llama_cpps_for_its_own_vectors() {
        ["llama-bpe", "llama-spm", "qwen2"].into_iter().for_each(check_vectors);
    }

    fn check_golden(name: &str, tokenizer: &Tokenizer, golden: &str) {
        let cases: Vec<Value> = serde_json::from_str(golden).expect("a golden file");
        assert!(cases.len() > 200, "{name}: {} texts", cases.len());
        for case in &cases {
            let text = case["text"].as_str().expect("a text");
            let as_text = ids(&case["as_text"]);
            assert_eq!(tokenizer.encode(text, Special::AsText), as_text, "{name}, as text: {text:?}");
            let parsed = case.get("parse").map_or(as_text, ids);
            assert_eq!(tokenizer.encode(text, Special::Parse), parsed, "{name}, parsed: {text:?}");
        }
    }

    #[test]
    fn ids_are_llama_cpps_for_both_models() {
        check_golden("smollm2", &SMOLLM2, include_str!("golden/tokenizer-smollm2.json"));
        check_golden("gemma3", &GEMMA3, include_str!("golden/tokenizer-gemma3.json"));
    }

    #[test]
    fn beginnings_of_sequences_are_the_files() {
        assert_eq!((SMOLLM2.bos(), SMOLLM2.add_bos()), (Some(TokenId(1)), false));
        assert_eq!((GEMMA3.bos(), GEMMA3.add_bos()), (Some(TokenId(2)), true));
        assert_eq!(vocab("llama-bpe").bos(), Some(TokenId(128000)));
        assert!(vocab("llama-bpe").add_bos(), "a llama3 vocabulary adds BOS though the file does not say so");
        assert_eq!(SMOLLM2.special_id("<|im_end|>"), Some(TokenId(2)));
        assert_eq!(SMOLLM2.special_id("<|im_end"), None);
        assert_eq!(SMOLLM2.token(TokenId(2)), Some("<|im_end|>"));
        assert_eq!(SMOLLM2.vocab_size(), 49152);
        assert_eq!(SMOLLM2.token(TokenId(49152)), None);
    }

    #[test]
    fn content_never_becomes_a_special_token_and_comes_back_whole() {
        for tokenizer in [&*SMOLLM2, &*GEMMA3, &*LLAMA_SPM] {
            runner(300)
                .run(&texts(), |text| {
                    let ids = tokenizer.encode(&text, Special::AsText);
                    prop_assert!(ids.iter().all(|id| !tokenizer.is_special(*id)), "{text:?}: {ids:?}");
                    prop_assert_eq!(tokenizer.decode(&ids), text);
                    Ok(())
                })
                .expect("text comes back");
        }
    }

    /// Also of those texts that are the longest tokens, one after the other.
    #[test]
    fn no_text_is_fewer_tokens_than_its_length_says() {
        for tokenizer in [&*SMOLLM2, &*GEMMA3, &*LLAMA_SPM] {
            let length = |id: &u32| tokenizer.token_bytes(TokenId(*id)).len();
            let mut longest: Vec<u32> = (0..tokenizer.vocab_size() as u32).collect();
            longest.sort_by_key(|id| std::cmp::Reverse(length(id)));
            let longest: Vec<TokenId> = longest.into_iter().take(50).map(TokenId).collect();
            assert_eq!(tokenizer.least_tokens(length(&longest[0].0)), 1);
            let long = proptest::sample::subsequence(longest, 0..=50).prop_map(|ids| tokenizer.decode(&ids));
            runner(300)
                .run(&prop_oneof![texts(), long], |text| {
                    for special in [Special::AsText, Special::Parse] {
                        let num_tokens = tokenizer.encode(&text, special).len();
                        prop_assert!(tokenizer.least_tokens(text.len()) <= num_tokens, "{:?}: {}", text, num_tokens);
                    }
                    Ok(())
                })
                .expect("a bound");
        }
    }

    /// Where every place that is sound is one, too.
    #[test]
    fn a_text_in_parts_has_the_ids_of_the_whole() {
        let gguf =
            |path: PathBuf| Tokenizer::from_gguf(&Gguf::open(&path).expect("a model file")).expect("a tokenizer");
        let load: [&dyn Fn() -> Tokenizer; 6] = [
            &|| gguf(cache("models/SmolLM2-135M-Instruct.Q4_1.gguf", "make models")),
            &|| gguf(cache("models/gemma-3-270m-Q4_K_M.gguf", "make models")),
            &|| gguf(cache("vocab/ggml-vocab-llama-spm.gguf", "scripts/vocab.sh")),
            &|| gguf(cache("vocab/ggml-vocab-llama-bpe.gguf", "scripts/vocab.sh")),
            &|| gguf(cache("vocab/ggml-vocab-qwen2.gguf", "scripts/vocab.sh")),
            &|| Tokenizer::from_json(hf_json::smollm2_json().to_string().as_bytes()).expect("a tokenizer"),
        ];
        let words = "[a-zA-Z]{1,4}( [a-zA-Z]{1,4}){0,3}";
        let text = proptest::collection::vec(prop_oneof![words, Just("\n".to_owned()), texts()], 1..6);
        for load in load {
            let (whole, parts) = (load().with_parts_of(usize::MAX), load().with_parts_of(1));
            assert!(parts.cuts().parts("one two\nthree four").count() > 2);
            runner(200)
                .run(&text, |text| {
                    let text = text.concat();
                    for special in [Special::AsText, Special::Parse] {
                        let ids = whole.encode(&text, special);
                        prop_assert_eq!(&parts.encode(&text, special), &ids, "{:?}", text);
                        // What is cut short is a beginning of it.
                        let some = parts.encode_at_most(&text, special, 3);
                        prop_assert!(ids.starts_with(&some) && (some.len() > 3 || some.len() == ids.len()));
                    }
                    Ok(())
                })
                .expect("the same ids");
        }
    }

    /// A vocabulary in which merging, or a word as a whole, could spell control tokens.
    #[test]
    fn merging_never_makes_a_special_token() {
        let tokens = ["<", "s", ">", "<s", "<s>", "stop", "t", "o", "p", "st", "op"].map(str::to_string).to_vec();
        let token_types = vec![1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1];
        let merges = ["< s", "<s >", "s t", "o p", "st op"].map(str::to_string).to_vec();
        let vocab = GgufVocab { tokens, token_types, merges, pre: "llama-bpe".to_string(), ..GgufVocab::default() };
        let byte_level = GgufVocab { model: "gpt2".to_string(), ..vocab.clone() };
        let pieces = GgufVocab {
            model: "llama".to_string(),
            scores: vec![0.0; 11],
            unk: Some(1),
            add_space_prefix: Some(false),
            ..vocab
        };
        for vocab in [byte_level, pieces] {
            let tokenizer = Tokenizer::from_vocab(vocab).expect("a vocabulary");
            let as_text = |text| tokenizer.encode(text, Special::AsText);
            assert_eq!(as_text("<s>"), [TokenId(3), TokenId(2)]);
            assert_eq!(as_text("stop"), [TokenId(9), TokenId(10)]);
            assert_eq!(tokenizer.encode("<s>stop", Special::Parse), [TokenId(4), TokenId(5)]);
        }
    }

    #[test]
    fn a_hundred_kilobytes_take_no_quadratic_time() {
        let long = |pattern: &str| pattern.repeat(100_000 / pattern.len());
        let texts = ["a", " ", "\n", "1", "=", "中", "🙂", "the quick brown fox ", "<|im_e", " \n", "ab1 \t"].map(long);
        for (name, tokenizer) in [("smollm2", &*SMOLLM2), ("gemma3", &*GEMMA3), ("llama-spm", &*LLAMA_SPM)] {
            for text in &texts {
                let start = Instant::now();
                let ids = tokenizer.encode(text, Special::Parse);
                let taken = start.elapsed();
                let head: String = text.chars().take(10).collect();
                println!("{name} {head:?}: {} ids in {taken:?}", ids.len());
                assert_eq!(tokenizer.decode(&ids), *text);
                assert!(taken < Duration::from_secs(5), "{name}: {head:?}… took {taken:?}");
            }
        }
    }

    #[test]
    fn damaged_vocabularies_are_named() {
        let check = |vocab: GgufVocab, expected: &str| {
            let error = Tokenizer::from_vocab(vocab).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        };
        let tokens = vec!["a".to_string(), "b".to_string()];
        let sound = GgufVocab { model: "gpt2".to_string(), tokens, ..GgufVocab::default() };
        assert!(Tokenizer::from_vocab(sound.clone()).is_ok());
        check(GgufVocab { model: "rwkv".to_string(), ..sound.clone() }, "\"rwkv\"");
        check(GgufVocab { pre: "klingon".to_string(), ..sound.clone() }, "\"klingon\"");
        check(GgufVocab { tokens: Vec::new(), ..sound.clone() }, "is empty");
        check(GgufVocab { token_types: vec![1], ..sound.clone() }, "token_type has 1");
        check(GgufVocab { bos: Some(2), ..sound.clone() }, "bos_token_id is 2");
        check(GgufVocab { merges: vec!["ab".to_string()], ..sound.clone() }, "\"ab\" is not two tokens");
        check(GgufVocab { merges: vec!["a b".to_string()], ..sound.clone() }, "\"ab\", which is missing");
        check(GgufVocab { model: "llama".to_string(), ..sound }, "byte 0x00");
    }
}

mod hf_json {
    use super::*;

    /// The tokenizer.json that says what SmolLM2's GGUF says.
    pub(super) fn smollm2_json() -> Value {
        let gguf = Gguf::open(&cache("models/SmolLM2-135M-Instruct.Q4_1.gguf", "make models")).expect("a model");
        let tokens = gguf.strings("tokenizer.ggml.tokens").expect("strings").expect("tokens");
        let merges = gguf.strings("tokenizer.ggml.merges").expect("strings").expect("merges");
        let vocab: serde_json::Map<String, Value> = tokens.iter().cloned().zip((0u32..).map(Value::from)).collect();
        let added = |id: usize| json!({"id": id, "content": tokens[id], "special": true, "normalized": false});
        json!({
            "added_tokens": (0..17).map(added).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            ]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        })
    }

    #[test]
    fn the_same_vocabulary_gives_the_same_ids() {
        let tokenizer = Tokenizer::from_json(smollm2_json().to_string().as_bytes()).expect("a tokenizer");
        runner(300)
            .run(&texts(), |text| {
                for special in [Special::AsText, Special::Parse] {
                    let ids = tokenizer.encode(&text, special);
                    prop_assert_eq!(&ids, &SMOLLM2.encode(&text, special));
                    prop_assert_eq!(tokenizer.decode(&ids), SMOLLM2.decode(&ids));
                }
                Ok(())
            })
            .expect("equal ids");
    }

    /// Whoever tokenizes elsewhere reads the file by the crate that is the format's own.
    #[test]
    fn a_written_vocabulary_gives_the_same_ids() {
        for (name, tokenizer) in
            [("smollm2", SMOLLM2.clone()), ("gemma3", GEMMA3.clone())].into_iter().chain(BPE_AND_SPM.map(named))
        {
            let written = tokenizer.to_json().to_string();
            let read = Tokenizer::from_json(written.as_bytes()).expect(name);
            let elsewhere: tokenizers::Tokenizer = written.parse().expect(name);
            assert_eq!((read.vocab_size(), read.add_bos()), (tokenizer.vocab_size(), tokenizer.add_bos()), "{name}");
            assert_eq!(elsewhere.get_vocab_size(true), tokenizer.vocab_size(), "{name}");
            runner(60)
                .run(&texts(), |text| {
                    let ids = tokenizer.encode(&text, Special::Parse);
                    prop_assert_eq!(&ids, &read.encode(&text, Special::Parse));
                    let theirs = elsewhere.encode(text.as_str(), false).expect("ids");
                    prop_assert_eq!(&ids, &theirs.get_ids().iter().map(|id| TokenId(*id)).collect::<Vec<_>>());
                    prop_assert_eq!(tokenizer.decode(&ids), elsewhere.decode(theirs.get_ids(), true).expect("text"));
                    Ok(())
                })
                .expect(name);
        }
    }

    const BPE_AND_SPM: [&str; 3] = ["llama-bpe", "llama-spm", "qwen2"];

    fn named(name: &str) -> (&str, Arc<Tokenizer>) {
        (name, vocab(name))
    }

    /// A vocabulary in SentencePiece's manner, as files of Llama 2 and Mistral hold it.
    fn metaspace(change: impl Fn(&mut Value)) -> Result<Tokenizer, TextError> {
        let mut pieces = vec!["<unk>".to_string(), "<s>".to_string()];
        pieces.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        pieces.extend(["▁", "a", "b", "▁a", "ab", "[X]"].map(str::to_string));
        let vocab: serde_json::Map<String, Value> = pieces.into_iter().zip((0u32..).map(Value::from)).collect();
        let mut json = json!({
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 263, "content": "[X]", "special": false, "rstrip": true},
            ],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab,
                "merges": [["▁", "a"], ["a", "b"]]},
        });
        change(&mut json);
        Tokenizer::from_json(json.to_string().as_bytes())
    }

    #[test]
    fn bytes_prefixes_and_added_tokens_are_followed() {
        let tokenizer = metaspace(|_| ()).expect("a tokenizer");
        // One of its tokens takes any white space with it, so length says nothing of the number of tokens.
        assert_eq!(tokenizer.least_tokens(1 << 30), 1);
        let plain = metaspace(|json| json["added_tokens"][2]["rstrip"] = json!(false)).expect("a tokenizer");
        assert_eq!(plain.least_tokens("<unk>".len() * 100), 100);
        let encode = |text, special| tokenizer.encode(text, special).iter().map(|id| id.0).collect::<Vec<_>>();
        assert_eq!((tokenizer.bos(), tokenizer.add_bos()), (Some(TokenId(1)), true));
        assert_eq!(encode("a ab", Special::AsText), [261, 261, 260]);
        assert_eq!(encode("é", Special::AsText), [258, 2 + 0xC3, 2 + 0xA9]);
        assert_eq!(encode("<s>ab", Special::Parse), [1, 262]);
        assert_eq!(encode("b[X]  ab", Special::AsText), [258, 260, 263, 262]);
        assert!(encode("<s>", Special::AsText).iter().all(|id| *id > 1));
        let text = "a é ab";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, Special::AsText)), text);
    }

    #[test]
    fn what_is_not_followed_is_named() {
        let check = |expected: &str, change: &dyn Fn(&mut Value)| {
            let error = metaspace(change).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("\"Unigram\"", &|json| json["model"]["type"] = json!("Unigram"));
        check("end_of_word_suffix", &|json| json["model"]["end_of_word_suffix"] = json!("</w>"));
        check("single_word", &|json| json["added_tokens"][2]["single_word"] = json!(true));
        check("4000000000", &|json| json["added_tokens"][2]["id"] = json!(4_000_000_000u64));
        check("no \"vocab\"", &|json| json["model"]["vocab"] = json!(null));
        check("pre_tokenizer cannot be read", &|json| json["pre_tokenizer"]["type"] = json!("Klingon"));
        check("no \"model\"", &|json| json["model"] = json!(7));
        assert!(Tokenizer::from_json(b"{").is_err());
    }
}

mod detokenizer {
    use super::*;

    fn streamed(mut detokenizer: Detokenizer, ids: &[TokenId]) -> (Vec<String>, String) {
        let pushed: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        let rest = detokenizer.finish();
        let whole = pushed.concat() + &rest;
        (pushed, whole)
    }

    /// Any ids, so most characters never come whole.
    #[test]
    fn pieces_put_together_are_the_whole() {
        for tokenizer in [&*SMOLLM2, &*GEMMA3, &*LLAMA_SPM] {
            let ids = proptest::collection::vec(0..tokenizer.vocab_size() as u32, 0..40);
            let bytes = proptest::collection::vec(3..259u32, 0..40);
            runner(300)
                .run(&prop_oneof![ids, bytes], |ids| {
                    let ids: Vec<_> = ids.into_iter().map(TokenId).collect();
                    let (_, whole) = streamed(Detokenizer::new(tokenizer.clone()).from_start(), &ids);
                    prop_assert_eq!(whole, tokenizer.decode(&ids));
                    let (_, special) = streamed(Detokenizer::new(tokenizer.clone()).with_special(true), &ids);
                    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect();
                    prop_assert_eq!(special, String::from_utf8_lossy(&bytes));
                    Ok(())
                })
                .expect("equal texts");
        }
    }

    #[test]
    fn half_a_character_never_leaves() {
        for tokenizer in [&*SMOLLM2, &*GEMMA3, &*LLAMA_SPM] {
            runner(200)
                .run(&"[🙂é中a ]{0,20}", |text| {
                    let ids = tokenizer.encode(&text, Special::AsText);
                    let (pushed, whole) = streamed(Detokenizer::new(tokenizer.clone()).from_start(), &ids);
                    prop_assert!(!pushed.iter().any(|piece| piece.contains(char::REPLACEMENT_CHARACTER)), "{pushed:?}");
                    prop_assert_eq!(whole, text);
                    Ok(())
                })
                .expect("whole characters");
        }
    }

    #[test]
    fn an_emoji_waits_for_its_last_byte() {
        let ids = LLAMA_SPM.encode("x🜁", Special::AsText);
        let (pushed, _) = streamed(Detokenizer::new(LLAMA_SPM.clone()).from_start(), &ids);
        assert_eq!(pushed, ["x", "", "", "", "🜁"]);
        let (pushed, whole) = streamed(Detokenizer::new(LLAMA_SPM.clone()), &ids[..3]);
        assert_eq!((pushed.concat().as_str(), whole.as_str()), (" x", " x\u{fffd}"));
    }

    #[test]
    fn control_tokens_are_for_the_model() {
        let ids = SMOLLM2.encode("a<|im_end|>b", Special::Parse);
        assert_eq!(streamed(Detokenizer::new(SMOLLM2.clone()), &ids).1, "ab");
        assert_eq!(streamed(Detokenizer::new(SMOLLM2.clone()).with_special(true), &ids).1, "a<|im_end|>b");
    }
}

mod stop_strings {
    use super::*;

    /// The text before the first end of any stop string, tried at every place; the longest of those that end together.
    fn naive(text: &str, stops: &[String]) -> Option<usize> {
        (1..=text.len()).find_map(|end| {
            let ends = |stop: &&String| text.as_bytes()[..end].ends_with(stop.as_bytes());
            let longest = stops.iter().filter(|stop| !stop.is_empty()).filter(ends).map(String::len).max()?;
            Some(end - longest)
        })
    }

    /// The longest end of `text` that begins a stop string.
    fn held(text: &str, stops: &[String]) -> usize {
        let begins = |start: &usize| stops.iter().any(|stop| stop.as_bytes().starts_with(&text.as_bytes()[*start..]));
        (0..text.len()).find(begins).map_or(0, |start| text.len() - start)
    }

    fn check(stops: &[String], chunks: &[String]) -> Result<(), TestCaseError> {
        let mut scanner = StopStrings::new(stops.to_vec());
        let (mut sent, mut seen) = (String::new(), String::new());
        for chunk in chunks {
            let scan = scanner.push(chunk);
            seen.push_str(chunk);
            sent.push_str(&scan.text);
            let found = naive(&seen, stops);
            prop_assert_eq!(scan.stopped, found.is_some());
            let safe = found.unwrap_or(seen.len() - held(&seen, stops));
            prop_assert_eq!(&sent, &seen[..safe], "stops {:?} after {:?}", stops, &seen);
        }
        sent.push_str(&scanner.finish());
        prop_assert_eq!(&sent, &seen[..naive(&seen, stops).unwrap_or(seen.len())]);
        Ok(())
    }

    #[test]
    fn every_chunking_agrees_with_a_naive_search() {
        let stops = proptest::collection::vec("[abé]{0,4}", 0..4);
        let chunks = proptest::collection::vec("[abéc]{0,4}", 0..8);
        runner(5000).run(&(stops, chunks), |(stops, chunks)| check(&stops, &chunks)).expect("agreement");
    }

    #[test]
    fn a_stop_string_may_span_chunks() {
        let mut scanner = StopStrings::new(vec!["\n\nUser:".to_string()]);
        assert_eq!(scanner.push("hi\n").text, "hi");
        assert_eq!(scanner.push("\nU").text, "");
        assert_eq!(scanner.push("tah").text, "\n\nUtah");
        assert_eq!(scanner.push(" x\n\nUser: y").text, " x");
        assert!(scanner.push("more").stopped);
        assert_eq!(scanner.finish(), "");
    }

    #[test]
    fn a_stop_string_may_begin_where_nothing_stops() {
        let mut scanner = StopStrings::new(vec!["abab".to_string()]);
        // What ends where nothing stops is text but for what the next may begin in.
        assert_eq!(scanner.pass("xababa"), "xab");
        let scan = scanner.push("bc");
        assert_eq!((scan.text.as_str(), scan.stopped, scanner.found()), ("", true, Some("abab")));
        let mut scanner = StopStrings::new(vec!["ab".to_string()]);
        assert_eq!(scanner.pass("ab ab"), "ab ab");
        assert!(!scanner.push("b").stopped && scanner.push("ab").stopped);
    }
}

mod chat {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage::new(role, content)
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, "<|im_start|>", "<|im_end|>").expect("a template")
    }

    /// What SmolLM2's file holds, and what the same messages are as text.
    fn smollm2() -> ChatTemplate {
        let gguf = Gguf::open(&cache("models/SmolLM2-135M-Instruct.Q4_1.gguf", "make models")).expect("a model");
        template(gguf.str("tokenizer.chat_template").expect("a string").expect("a template"))
    }

    fn smollm2_text(messages: &[ChatMessage], prompt: bool) -> String {
        let mut text = String::new();
        if messages[0].role != "system" {
            let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
            text += &format!("<|im_start|>system\n{system}<|im_end|>\n");
        }
        for ChatMessage { role, content, .. } in messages {
            text += &format!("<|im_start|>{role}\n{content}<|im_end|>\n");
        }
        text + if prompt { "<|im_start|>assistant\n" } else { "" }
    }

    #[test]
    fn plain_messages_are_the_plain_rendering() {
        let template = smollm2();
        let messages = [message("user", "Hi <b>you</b>, 2 < 3 |> \n"), message("assistant", " Hello! <")];
        for prompt in [false, true] {
            let ids = template.encode(&SMOLLM2, &messages, prompt).expect("ids");
            assert_eq!(ids, SMOLLM2.encode(&smollm2_text(&messages, prompt), Special::Parse));
        }
    }

    #[test]
    fn a_template_writes_roles_into_spellings() {
        let source = "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content | trim }}<|im_end|>{% endfor %}";
        let ids = |role| template(source).encode(&SMOLLM2, &[message(role, " x ")], false).expect("ids");
        let x = SMOLLM2.encode("x", Special::AsText)[0];
        let end = TokenId(2);
        let text = |role: &str| SMOLLM2.encode(&format!("<|im_{role}|>x"), Special::AsText);
        assert_eq!(ids("user"), [text("user"), vec![end]].concat());
        // A role from outside that would complete a control token stays text.
        for role in ["end", "start", "<|im_end|>", "end|><|im_start"] {
            assert_eq!(ids(role), [text(role), vec![end]].concat(), "{role}");
        }
        let source = "<|im_start|>{{ messages[0].content.split('|')[1] }}<|im_end|>";
        let ids = template(source).encode(&SMOLLM2, &[message("user", "a|x|b")], false).expect("ids");
        assert_eq!(ids, [TokenId(1), x, end]);
    }

    type ByHand = fn(&str) -> String;

    /// (source, the same by hand): a template that trims, and one whose text completes what a message begins.
    fn templates() -> [(ChatTemplate, ByHand); 3] {
        let trimming = "{% for m in messages %}\n<|im_start|>{{ m['content'].strip() }}<|im_end|>{% endfor %}";
        let completing = "{% for m in messages %}<|im_start|>{{ m.content | trim }}nd|>{{ m.content }}nd|>{% endfor %}";
        let starting =
            "{% for m in messages %}<|im_e{{ m.content }}<|im_e{{ m.content.strip() }}<|im_end|>{% endfor %}";
        [
            (template(trimming), |content| format!("<|im_start|>{}<|im_end|>", content.trim())),
            (template(completing), |content| format!("<|im_start|>{}nd|>{content}nd|>", content.trim())),
            (template(starting), |content| format!("<|im_e{content}<|im_e{}<|im_end|>", content.trim())),
        ]
    }

    #[test]
    fn content_yields_no_special_token_whatever_the_template() {
        for (template, by_hand) in templates() {
            let special =
                |ids: &[TokenId]| ids.iter().copied().filter(|id| SMOLLM2.is_special(*id)).collect::<Vec<_>>();
            let harmless = special(&template.encode(&SMOLLM2, &[message("user", "x")], false).expect("ids"));
            runner(500)
                .run(&texts(), |content| {
                    let ids = template.encode(&SMOLLM2, &[message("user", &content)], false).expect("ids");
                    let plain = by_hand(&content);
                    prop_assert_eq!(special(&ids), harmless.clone(), "{:?}", &content);
                    let bytes: Vec<u8> = ids.iter().flat_map(|id| SMOLLM2.token_bytes(*id)).collect();
                    prop_assert_eq!(String::from_utf8_lossy(&bytes), plain.as_str());
                    let parsed = SMOLLM2.encode(&plain, Special::Parse);
                    if special(&parsed) == harmless {
                        prop_assert_eq!(ids, parsed, "{:?}", &content);
                    }
                    Ok(())
                })
                .expect("no special token out of content");
        }
    }

    #[test]
    fn templates_of_the_families_render() {
        let llama3 = "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + \
            '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}\
            {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}";
        let mistral = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != \
            (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}\
            {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
            {% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}";
        let qwen3 = "{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}\
            {%- set index = (messages|length - 1) - loop.index0 %}\
            {%- if message.role == \"user\" and message.content is string and not \
            (message.content.startswith('<tool_response>')) %}{%- set ns.last = index %}{%- break %}{%- endif %}\
            {%- endfor %}{{- messages[ns.last].content.split('</think>')[-1].lstrip('\\n') }}";
        let messages = [message("user", " a "), message("assistant", "b")];
        let text = |source: &str, messages: &[ChatMessage]| -> Result<String, TextError> {
            let template = ChatTemplate::new(source, "<s>", "</s>")?;
            let ids = template.encode(&SMOLLM2, messages, true)?;
            Ok(SMOLLM2.decode(&ids))
        };
        let header = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
        let expected =
            format!("<s>{}a<|eot_id|>{}b<|eot_id|>{}", header("user"), header("assistant"), header("assistant"));
        assert_eq!(text(llama3, &messages).expect("llama3"), expected);
        assert_eq!(text(mistral, &messages).expect("mistral"), "<s>[INST]  a  [/INST] b</s>");
        assert_eq!(text(qwen3, &messages).expect("qwen3"), " a ");
        let refused = text(mistral, &messages[1..]).expect_err("a template that wants a user first");
        assert_eq!(
            refused.to_string(),
            "the model's chat template refuses these messages: Roles must alternate user/assistant"
        );
        assert_eq!(
            text("{{ messages[0] | tojson }}", &messages).expect("json"),
            r#"{"role": "user", "content": " a "}"#
        );
        let year = text("{{ strftime_now('%Y') }}", &messages).expect("a year").parse::<u32>().expect("a number");
        assert!(year >= 2024);
    }

    #[test]
    fn hostile_templates_end_in_a_sentence() {
        let hostile = [
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "{% for i in range(10**9) %}x{% endfor %}",
            "{% for i in range(10**5) %}{{ 'x' * 10000 }}{% endfor %}",
            "{{ 'x' * 10**9 }}",
            "{{ ('x' * 10**6) * 10**6 }}",
            "{{ [0] * 10**9 }}",
            "{{ range(10**9)|list|length }}",
            "{{ 10 ** 10 ** 10 }}",
            "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|tojson %}{% endfor %}",
            "{% set n = namespace(x=0) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
            "{% include 'chat_template' %}",
            "{{ messages[0].content.undefined.attribute }}",
            "{{ no_such_function() }}",
        ];
        for source in hostile {
            let start = Instant::now();
            let error = template(source).encode(&SMOLLM2, &[message("user", "x")], true).expect_err(source);
            println!("{:?} {source}: {error}", start.elapsed());
            assert!(error.to_string().starts_with("the model's chat template"), "{source}: {error}");
            assert!(start.elapsed() < Duration::from_secs(5), "{source} took {:?}", start.elapsed());
        }
    }

    #[test]
    fn templates_that_do_not_compile_are_named() {
        let nested = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(60_000), close.repeat(60_000));
        let sources = [
            "{% if %}".to_string(),
            "{% for x in y %}".to_string(),
            "{{ 'unclosed }}".to_string(),
            nested("(", ")"),
            nested("[", "]"),
            "{% if x %}".repeat(12_000),
            "x".repeat(2 << 20),
        ];
        for source in sources {
            let error = ChatTemplate::new(&source, "", "").expect_err("no template").to_string();
            assert!(error.starts_with("the model's chat template cannot be used"), "{error}");
        }
    }

    /// What is nested as deep as a source can be costs stack, which there is.
    #[test]
    fn deep_sources_do_not_overflow_the_stack() {
        let deep = |max_bytes: usize, open: &str, inner: &str, close: &str| {
            let times = max_bytes / (open.len() + close.len());
            let source = format!("{{{{ {}{inner}{} }}}}", open.repeat(times), close.repeat(times));
            let start = Instant::now();
            let template = ChatTemplate::new(&source, "", "");
            println!("{open}{inner}{close}: compiled after {:?}", start.elapsed());
            if let Ok(template) = template {
                let ended = template.encode(&SMOLLM2, &[message("user", "x")], true).map(|ids| ids.len());
                println!("{open}{inner}{close}: {ended:?} after {:?}", start.elapsed());
            }
        };
        for (open, inner, close) in [
            ("not ", "x", ""),
            ("-", "1", ""),
            ("", "x", "|trim"),
            ("", "1", "+1"),
            ("", "x", ".y"),
            ("x if x else ", "x", ""),
        ] {
            deep(60_000, open, inner, close);
        }
        // Folding these constants takes quadratic time, which the deadline would cut short.
        deep(6_000, "", "x", "~x");
        deep(6_000, "2**", "1", "");
    }

    #[test]
    fn an_ordinary_conversation_is_far_from_the_limits() {
        let content = "The quick brown fox jumps over the lazy dog. ".repeat(100);
        let messages: Vec<_> =
            ["user", "assistant"].iter().cycle().take(400).map(|role| message(role, &content)).collect();
        let ids = smollm2().encode(&SMOLLM2, &messages, true).expect("ids");
        assert_eq!(ids, SMOLLM2.encode(&smollm2_text(&messages, true), Special::Parse));
    }
}
