//! Hidden states as the engine pools them, on the tiny models of `tiny.rs`: what the output layer makes of them is what
//! `transformers` says, and neither chunks nor company change a bit of them. Needs nothing.

use fullbore_engine::format::quant::dequantize_row;
use fullbore_engine::format::safetensors::SafetensorsDir;
use fullbore_engine::request::{Event, Pooling, Request, TokenId};

use crate::tiny::{FAMILIES, expected, folder, ids, numbers, run_request};

/// As `tiny.rs` has it, against K and V in f16.
const TOLERANCE: f64 = 4e-4;

fn embed(name: &str, prompt: &[TokenId], pooling: Pooling, chunk: u32) -> Vec<f32> {
    let request = Request { prompt: prompt.to_vec(), pooling: Some(pooling), ..Request::default() };
    let events = run_request(name, request, chunk, |_| {});
    let [Event::Started { .. }, Event::Pooled(vector), Event::Finished { .. }] = events.as_slice() else {
        panic!("{events:?}")
    };
    vector.clone()
}

/// Rows of the output layer.
fn output(name: &str, dim: usize) -> Vec<Vec<f32>> {
    let dir = SafetensorsDir::open(&folder(name)).unwrap_or_else(|error| panic!("{error}"));
    let find = |wanted: &str| dir.tensors().find(|info| info.name == wanted);
    let info = find("lm_head.weight").or(find("model.embed_tokens.weight")).expect("an output layer");
    let mut bytes = vec![0; info.size_bytes as usize];
    dir.rows(&info.name).expect("a tensor").read_rows(&mut bytes).expect("its rows");
    let mut values = vec![0.0; info.rows as usize * info.cols as usize];
    let row_bytes = info.format.row_bytes(info.cols) as usize;
    for (row, out) in bytes.chunks_exact(row_bytes).zip(values.chunks_exact_mut(dim)) {
        dequantize_row(info.format, row, out);
    }
    values.chunks_exact(dim).map(<[f32]>::to_vec).collect()
}

#[test]
fn the_output_layer_makes_of_them_what_transformers_says() {
    for name in FAMILIES {
        let expected = expected(name);
        let hidden = embed(name, &ids(&expected["prompt"]), Pooling::Last, 64);
        let dot = |row: &Vec<f32>| row.iter().zip(&hidden).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let logits: Vec<f64> = output(name, hidden.len()).iter().map(dot).collect();
        let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = logits.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln() + most;
        let rows = expected["last_rows"].as_array().expect("rows");
        let wanted = numbers(rows.last().expect("a row"));
        let worst = logits.iter().zip(&wanted).map(|(logit, wanted)| (logit - sum - wanted).abs()).fold(0.0, f64::max);
        assert!(worst < TOLERANCE, "{name}: log-probabilities differ by {worst}");
    }
}

#[test]
fn the_mean_is_that_of_the_last_ones_of_all_beginnings() {
    for name in ["llama", "gemma3"] {
        let prompt = &ids(&expected(name)["prompt"])[..9];
        let mut mean = vec![0.0; embed(name, prompt, Pooling::Last, 64).len()];
        for end in 1..=prompt.len() {
            let last = embed(name, &prompt[..end], Pooling::Last, 64);
            mean.iter_mut().zip(last).for_each(|(sum, value)| *sum += value);
        }
        mean.iter_mut().for_each(|value| *value /= prompt.len() as f32);
        assert_eq!(embed(name, prompt, Pooling::Mean, 64), mean, "{name}");
    }
}

#[test]
fn chunks_give_the_same_bits() {
    for name in FAMILIES {
        let prompt = ids(&expected(name)["prompt"]);
        for pooling in [Pooling::Last, Pooling::Mean] {
            let whole = embed(name, &prompt, pooling, 64);
            for chunk in [7, 1] {
                assert_eq!(embed(name, &prompt, pooling, chunk), whole, "{name}, {pooling:?} in chunks of {chunk}");
            }
        }
    }
}
