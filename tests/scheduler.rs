//! The scheduler, step by step, as expected text: one line a step, in the format of its trace.

use std::sync::Arc;

use fullbore_engine::batch::{Batch, Logits, SequenceId};
use fullbore_engine::config::{EngineConfig, UnfitRequest};
use fullbore_engine::memory::KvCache;
use fullbore_engine::request::{Request, TokenId};
use fullbore_engine::scheduler::{Choice, Scheduler};
use fullbore_engine::sequence::Sequence;
use fullbore_engine::tensor::KvType;

const CONFIG: EngineConfig = EngineConfig {
    max_num_seqs: 3,
    max_num_batched_tokens: 8,
    max_model_len: 24,
    kv_type: KvType::F16,
    block_size: 4,
    num_blocks: 6,
    num_host_blocks: 0,
    max_waiting: 8,
    max_logit_rows: 4,
    prefix_cache: true,
};

struct Run {
    scheduler: Scheduler,
    cache: KvCache,
    batch: Batch,
    next_id: u64,
}

impl Run {
    fn new(config: EngineConfig) -> Run {
        let cache = KvCache::new(config.num_blocks, config.block_size, config.prefix_cache.then_some((1, 2)));
        Run { scheduler: Scheduler::new(config), cache, batch: Batch::default(), next_id: 0 }
    }

    /// A request whose prompt is `len` tokens from `first` on.
    fn add(&mut self, first: u32, len: u32, max_tokens: u32) -> SequenceId {
        let prompt = (first..first + len).map(TokenId).collect();
        self.add_request(Request { prompt, max_tokens, ..Request::default() })
    }

    fn add_request(&mut self, request: Request) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.scheduler.add(Sequence::new(id, Arc::new(request)));
        id
    }

    /// A step that samples token 900 + its sequence for every slice that samples.
    fn step(&mut self) -> String {
        let mut trace = self.scheduler.schedule(&mut self.cache, &mut self.batch);
        let choose = |slice: &fullbore_engine::batch::Slice| match slice.sample {
            true => Choice::Token(TokenId(900 + slice.sequence.0 as u32)),
            false => Choice::None,
        };
        let choices: Vec<Choice> = self.batch.slices.iter().map(choose).collect();
        self.scheduler.complete(&mut self.cache, &self.batch, &choices, &mut trace, &mut Vec::new());
        self.scheduler.check(&self.cache);
        trace.to_string()
    }

    fn steps(&mut self, num_steps: usize) -> String {
        (0..num_steps).map(|_| self.step()).collect::<Vec<_>>().join("\n")
    }
}

#[test]
fn prompts_are_chunked_and_mixed_with_decodes() {
    let mut run = Run::new(CONFIG);
    run.add(0, 3, 3);
    run.add(100, 9, 2);
    let expected = "\
step 1  decode -   prefill a[0..3/3] b[0..5/9]   blocks 3+0/6   preempt -   finish -
step 2  decode a   prefill b[5..9/9]   blocks 4+0/6   preempt -   finish -
step 3  decode a b   prefill -   blocks 0+3/6   preempt -   finish a:length b:length";
    assert_eq!(run.steps(3), expected);
    assert!(run.scheduler.is_idle());
}

#[test]
fn out_of_blocks_preempts_the_newest_which_is_recomputed() {
    let mut run = Run::new(CONFIG);
    run.add(0, 8, 12);
    run.add(100, 8, 8);
    let text = run.steps(16);
    let preempted: Vec<&str> = text.lines().filter(|line| line.contains("preempt b")).collect();
    assert_eq!(preempted.len(), 1, "{text}");
    assert!(text.contains("finish a:length"), "{text}");
    let tail = run.steps(12);
    assert!(tail.contains("finish b:length") || text.contains("finish b:length"), "{text}\n{tail}");
    assert_eq!(run.scheduler.num_preemptions(), 1);
    assert!(run.scheduler.is_idle());
}

#[test]
fn a_known_prefix_is_not_computed_again() {
    let mut run = Run::new(CONFIG);
    run.add(0, 8, 1);
    run.step();
    run.add(0, 8, 1);
    // The last token is computed all the same: its logits are wanted.
    assert!(run.step().contains("prefill b[4..8/8]"));
}

#[test]
fn abort_frees_blocks_in_every_phase() {
    let mut run = Run::new(CONFIG);
    let prefilling = run.add(0, 12, 4);
    let waiting = run.add(100, 12, 4);
    run.step();
    assert!(run.scheduler.abort(&mut run.cache, waiting).is_some());
    assert!(run.scheduler.abort(&mut run.cache, prefilling).is_some());
    assert!(run.scheduler.abort(&mut run.cache, prefilling).is_none());
    run.scheduler.check(&run.cache);
    let decoding = run.add(200, 4, 4);
    run.steps(2);
    assert_eq!(run.scheduler.running().len(), 1);
    run.scheduler.abort(&mut run.cache, decoding);
    assert_eq!(run.cache.counts().referenced, 0);
    assert!(run.scheduler.is_idle());
}

#[test]
fn what_can_never_fit_is_refused_with_its_numbers() {
    let request =
        |len: u32, max_tokens| Request { prompt: (0..len).map(TokenId).collect(), max_tokens, ..Request::default() };
    assert_eq!(CONFIG.fits(&request(20, 4), 1000), Ok(()));
    let too_long = UnfitRequest::TooLong { prompt_tokens: 20, max_tokens: 5, max_model_len: 24 };
    assert_eq!(CONFIG.fits(&request(20, 5), 1000), Err(too_long));
    assert_eq!(CONFIG.fits(&request(20, u32::MAX), 1000).map_err(|error| error.to_string().contains("24")), Err(true));
    assert_eq!(CONFIG.fits(&request(0, 1), 1000), Err(UnfitRequest::Empty));
    assert_eq!(CONFIG.fits(&request(9, 1), 8), Err(UnfitRequest::NoSuchToken { id: 8, vocab_size: 8 }));
    let starved = EngineConfig { num_blocks: 5, ..CONFIG };
    assert!(starved.check().is_err_and(|error| error.to_string().contains("KV memory")));
}

#[test]
fn prompt_logprobs_take_no_more_rows_than_there_are() {
    let mut run = Run::new(CONFIG);
    let prompt = (0..7).map(TokenId).collect();
    run.add_request(Request { prompt, max_tokens: 1, prompt_logprobs: Some(0), ..Request::default() });
    run.add(100, 3, 1);
    run.step();
    assert_eq!(run.batch.num_logit_rows(), CONFIG.max_logit_rows);
    assert_eq!(run.batch.slices[0].logits, Logits::All);
    run.step();
    assert!(run.batch.num_logit_rows() <= CONFIG.max_logit_rows);
}
