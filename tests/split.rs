//! A model whose layers are divided over several devices: the tokens and log-probabilities of one device, to the bit
//! where the devices compute alike; every family; and real weights over two versions of a driver, and over a driver and
//! the cpu. Needs Vulkan drivers: fails without one. What becomes of a split that loses a device is in `loss`.

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::split::{SplitBackend, Stage};
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions};
use fullbore_engine::request::Request;

use crate::golden::{self, Share};
use crate::ops::device_ids;
use crate::pipeline::{Answer, requests, run_all, with_grammars};
use crate::tiny::{EXACT, assert_every_family_agrees};

fn cpu() -> Box<dyn Backend> {
    let options = CpuOptions { num_threads: 1, ..CpuOptions::default() };
    Box::new(CpuBackend::new(options).expect("threads can be started"))
}

fn gpu(id: &str) -> Box<dyn Backend> {
    let options = WgpuOptions { selector: id.to_owned(), checked: true, ..WgpuOptions::default() };
    Box::new(WgpuBackend::open(&options).expect("a listed device opens"))
}

/// Each stage with its device, and how many layers it has.
pub fn split(stages: Vec<(Box<dyn Backend>, u32)>) -> Box<dyn Backend> {
    let mut next = 0;
    let stages = stages.into_iter().map(|(backend, num_layers)| {
        next += num_layers;
        Stage { backend, layers: next - num_layers..next }
    });
    Box::new(SplitBackend::new(stages.collect()))
}

fn answers(backend: Box<dyn Backend>, depth: u32, requests: Vec<Request>) -> Vec<Answer> {
    run_all(backend, depth, requests).0
}

/// Greedy and seeded, with penalties, under grammars, while memory runs out and blocks are swapped.
#[test]
fn a_split_over_cpus_gives_the_bits_of_one() {
    let two = || split(vec![(cpu(), 1), (cpu(), 1)]);
    for wanted in [requests, with_grammars] {
        let alone = answers(cpu(), 1, wanted());
        for depth in [1, 2] {
            let (split, num_preemptions) = run_all(two(), depth, wanted());
            assert!(num_preemptions > 0, "memory did not run out");
            assert_eq!(split, alone, "{depth} steps in flight");
        }
    }
}

/// With biases, head norms, windows, and norms of one layer that are used with the next.
#[test]
fn a_split_of_every_family_agrees_with_transformers() {
    assert_every_family_agrees(&EXACT, &|layers| match layers {
        7 => split(vec![(cpu(), 3), (cpu(), 2), (cpu(), 2)]),
        _ => split(vec![(cpu(), 1), (cpu(), layers - 1)]),
    });
}

#[test]
fn a_split_over_two_drivers_or_a_driver_and_the_cpu_gives_the_tokens_of_one() {
    let ids = device_ids();
    let (first, second) = (&ids[0], &ids[1 % ids.len()]);
    let tokens = |answers: Vec<Answer>| -> Vec<Vec<_>> {
        let ids = |answer: Answer| answer.tokens.into_iter().map(|(id, _)| id).collect();
        answers.into_iter().map(ids).collect()
    };
    let alone = tokens(answers(gpu(first), 1, requests()));
    let two = split(vec![(gpu(first), 1), (gpu(second), 1)]);
    assert_eq!(tokens(answers(two, 2, requests())), alone, "{first} and {second}");
    let mixed = split(vec![(cpu(), 1), (gpu(first), 1)]);
    assert_eq!(tokens(answers(mixed, 2, requests())), alone, "the cpu and {first}");
    let (file, name, text) = golden::MODELS[0];
    let share = Share { num_cases: 2, max_tokens: 16 };
    golden::follow(file, name, text, split(vec![(gpu(first), 14), (gpu(second), 16)]), share);
    let share = Share { num_cases: 2, max_tokens: 16 };
    golden::follow(file, name, text, split(vec![(cpu(), 20), (gpu(first), 10)]), share);
}
