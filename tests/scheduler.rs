//! The scheduler, step by step, as expected text: one line a step, in the format of its trace.

use std::sync::Arc;

use fullbore_engine::arrival::Arrival;
use fullbore_engine::batch::{Batch, Logits, SequenceId};
use fullbore_engine::config::{EngineConfig, LatencyTarget, UnfitRequest};
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::memory::KvCache;
use fullbore_engine::request::{FinishReason, Request, SamplingParams, Share, TokenId};
use fullbore_engine::scheduler::{Choice, Scheduler, StepTrace};
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
    max_queued_requests: 8,
    max_queued_tokens: 1024,
    max_queue_ms: None,
    max_logit_rows: 4,
    pipeline_depth: 1,
    latency: LatencyTarget::None,
    max_grammar_bytes: 256 << 20,
    prefix_cache: true,
};

struct Run {
    scheduler: Scheduler,
    cache: KvCache,
    batch: Batch,
    trace: StepTrace,
    next_id: u64,
}

impl Run {
    fn new(config: EngineConfig) -> Run {
        let cache = KvCache::new(config.num_blocks, config.block_size, config.prefix_cache.then_some((1, 2)));
        Run {
            scheduler: Scheduler::new(config),
            cache,
            batch: Batch::default(),
            trace: StepTrace::default(),
            next_id: 0,
        }
    }

    /// A request whose prompt is `len` tokens from `first` on.
    fn add(&mut self, first: u32, len: u32, max_tokens: u32) -> SequenceId {
        let prompt = (first..first + len).map(TokenId).collect();
        self.add_request(Request { prompt, max_tokens, ..Request::default() })
    }

    fn add_request(&mut self, request: Request) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let chain = self.cache.chain(&request.prompt, request.cache_salt);
        self.scheduler.add(Sequence::new(id, Arrival::new(Arc::new(request), chain, None)));
        id
    }

    /// A step that samples token 900 + its sequence for every slice that samples.
    fn step(&mut self) -> String {
        self.scheduler.schedule(&mut self.cache, &mut self.batch, &mut self.trace);
        self.complete();
        self.trace.to_string()
    }

    fn complete(&mut self) {
        let choose = |slice: &fullbore_engine::batch::Slice| match slice.sample {
            true => Choice::Token(TokenId(900 + slice.sequence.0 as u32)),
            false => Choice::None,
        };
        let choices: Vec<Choice> = self.batch.slices.iter().map(choose).collect();
        self.scheduler.complete(&mut self.cache, &self.batch, &choices, &mut self.trace, &mut Vec::new());
        self.scheduler.check(&self.cache, std::iter::empty());
    }

    /// A step, and what the tenant of all sequences has been charged when it is planned.
    fn step_charged(&mut self) -> u64 {
        self.scheduler.schedule(&mut self.cache, &mut self.batch, &mut self.trace);
        let charged = self.scheduler.running().next().map_or(0, |one| self.scheduler.queue().counter(one.tenant));
        self.complete();
        charged
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
step 1  decode -   prefill a[0..3/3] b[0..5/9]   blocks 3+0/6   preempt -   finish -   held budget
step 2  decode a   prefill b[5..9/9]   blocks 4+0/6   preempt -   finish -   held -
step 3  decode a b   prefill -   blocks 0+3/6   preempt -   finish a:length b:length   held -";
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

/// What a preempted sequence finds of its own is no hit.
#[test]
fn recomputation_is_not_reported_as_cached() {
    let mut run = Run::new(CONFIG);
    run.add(0, 8, 12);
    let second = run.add(100, 8, 8);
    let mut readmitted = false;
    while !readmitted {
        let text = run.step();
        let preempted_before = run.scheduler.num_preemptions() == 1 && !text.contains("preempt b");
        readmitted = preempted_before && run.scheduler.running().any(|sequence| sequence.id == second);
        assert!(run.trace.step < 40, "{text}");
    }
    let found = run.trace.prefilled.iter().find(|(id, ..)| *id == second);
    assert!(found.is_some_and(|(_, computed, _)| computed.start > 0), "it found its own blocks: {}", run.trace);
    let usage = run.scheduler.abort(&mut run.cache, second).expect("it runs");
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (8, 0));
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
    run.scheduler.check(&run.cache, std::iter::empty());
    let decoding = run.add(200, 4, 4);
    run.steps(2);
    assert_eq!(run.scheduler.num_running(), 1);
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
    let sampling = |sampling| Request { sampling, ..request(2, 2) };
    let bias = SamplingParams { logit_bias: vec![(TokenId(3), 1.0), (TokenId(40), 1.0)], ..SamplingParams::default() };
    assert_eq!(CONFIG.fits(&sampling(bias.clone()), 41), Ok(()));
    assert_eq!(CONFIG.fits(&sampling(bias), 40), Err(UnfitRequest::NoSuchToken { id: 40, vocab_size: 40 }));
    let masked = |mask: &[u32]| sampling(SamplingParams { allowed_tokens: Some(mask.into()), ..Default::default() });
    assert_eq!(CONFIG.fits(&masked(&[0, 128]), 40), Ok(()));
    for mask in [&[0, 0][..], &[1], &[1, 0, 0], &[1, 256]] {
        let refused = CONFIG.fits(&masked(mask), 40).expect_err("no mask of 40 tokens").to_string();
        assert!(refused.contains("mask") && refused.contains("40"), "{refused}");
    }
    let starved = EngineConfig { num_blocks: 5, ..CONFIG };
    assert!(starved.check().is_err_and(|error| error.to_string().contains("KV memory")));
}

/// The penalties of sequences apply to tokens that the device has counted: it is told them with each new slot.
#[test]
fn a_slot_is_told_what_its_sequence_holds() {
    let penalised = |first: u32, len: u32, max_tokens| Request {
        prompt: (first..first + len).map(TokenId).collect(),
        max_tokens,
        sampling: SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() },
        ..Request::default()
    };
    let told = |run: &Run| -> Vec<(u64, Vec<u32>, u32)> {
        let of_slot = |slot| run.batch.slices.iter().find(|slice| slice.slot == slot).expect("it runs").sequence.0;
        let told = run.batch.resets.iter().map(|reset| {
            let tokens = &run.batch.known_tokens[reset.tokens.start as usize..reset.tokens.end as usize];
            (of_slot(reset.slot), tokens.iter().map(|token| token.0).collect(), reset.num_prompt_tokens)
        });
        told.collect()
    };
    let mut run = Run::new(CONFIG);
    run.add(0, 8, 12);
    run.add_request(penalised(100, 8, 8));
    let mut all = Vec::new();
    while !run.scheduler.is_idle() {
        run.step();
        all.extend(told(&run));
    }
    assert_eq!(run.scheduler.num_preemptions(), 1);
    let prompt: Vec<u32> = (100..108).collect();
    let [(1, first, 8), (1, second, 8)] = all.as_slice() else { panic!("{all:?}") };
    assert_eq!(*first, prompt);
    assert!(second.len() > 8 && second[..8] == prompt && second[8..].iter().all(|token| *token == 901), "{second:?}");

    // A step tells no more than `max_model_len` tokens; the next is admitted in the step after.
    let mut run = Run::new(EngineConfig { max_num_batched_tokens: 64, num_blocks: 18, ..CONFIG });
    for nth in 0..3 {
        run.add_request(penalised(100 * nth, 13, 4));
    }
    for _ in 0..3 {
        run.step();
        assert_eq!(run.batch.known_tokens.len(), 13);
    }
    // Nobody is told where no token is chosen.
    let mut run = Run::new(CONFIG);
    run.add_request(Request { prompt_logprobs: Some(0), ..penalised(0, 4, 0) });
    run.step();
    assert!(run.batch.resets.is_empty());
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

/// A prefix of two blocks that three requests share is computed once, whoever comes while it is on its way.
#[test]
fn a_shared_prefix_is_computed_once() {
    let config = EngineConfig { num_blocks: 24, max_num_batched_tokens: 6, ..CONFIG };
    let mut run = Run::new(config);
    for own in [100, 200, 300] {
        let prompt = (0..10).chain(own..own + 2).map(TokenId).collect();
        run.add_request(Request { prompt, max_tokens: 1, ..Request::default() });
    }
    let expected = "\
step 1  decode -   prefill a[0..6/12]   blocks 2+0/24   preempt -   finish -   held prefix
step 2  decode -   prefill a[6..12/12]   blocks 0+3/24   preempt -   finish a:length   held prefix
step 3  decode -   prefill b[8..12/12] c[8..10/12]   blocks 3+2/24   preempt -   finish b:length   held budget
step 4  decode -   prefill c[10..12/12]   blocks 0+5/24   preempt -   finish c:length   held -";
    assert_eq!(run.steps(4), expected);
}

/// What was promised is no longer, once who promised it has left: the next one computes it.
#[test]
fn a_promise_ends_with_its_owner() {
    let config = EngineConfig { num_blocks: 24, max_num_batched_tokens: 5, ..CONFIG };
    let mut run = Run::new(config);
    let first = run.add(0, 12, 1);
    run.add(0, 12, 1);
    assert!(run.step().contains("prefill a[0..5/12]   "));
    run.scheduler.abort(&mut run.cache, first);
    assert!(run.step().contains("prefill b[4..9/12]"));
}

#[test]
fn a_tenant_below_its_share_takes_the_place_of_one_above() {
    let config = EngineConfig { max_num_seqs: 2, num_blocks: 24, max_num_batched_tokens: 12, ..CONFIG };
    let mut run = Run::new(config);
    let request = |tenant, first: u32| {
        let prompt = (first..first + 4).map(TokenId).collect();
        Request { prompt, max_tokens: 12, tenant, ..Request::default() }
    };
    for first in [0, 100, 200] {
        run.add_request(request(1, first));
    }
    run.steps(2);
    run.add_request(request(2, 300));
    // The newest of the first tenant gives way, and not again before it has advanced.
    let text = run.step();
    assert!(text.contains("decode a   prefill d[0..4/4]") && text.contains("preempt b"), "{text}");
    assert_eq!(run.scheduler.num_preemptions(), 1);
    let rest = run.steps(40);
    assert_eq!(run.scheduler.num_preemptions(), 1, "{rest}");
    assert!(run.scheduler.is_idle(), "{rest}");
}

/// A request of `tenant` whose prompt is `len` tokens from `first` on.
fn of_tenant(tenant: u64, first: u32, len: u32, max_tokens: u32) -> Request {
    Request { prompt: (first..first + len).map(TokenId).collect(), max_tokens, tenant, ..Request::default() }
}

#[test]
fn who_got_less_has_its_prompt_computed_before_one_that_is_under_way() {
    let config = EngineConfig { max_num_batched_tokens: 6, num_blocks: 24, ..CONFIG };
    let mut run = Run::new(config);
    run.add_request(of_tenant(1, 0, 20, 1));
    run.step();
    run.add_request(of_tenant(2, 100, 4, 1));
    let expected = "\
step 2  decode -   prefill b[0..4/4] a[6..8/20]   blocks 2+1/24   preempt -   finish b:length   held budget
step 3  decode -   prefill a[8..14/20]   blocks 4+1/24   preempt -   finish -   held budget";
    assert_eq!(run.steps(2), expected);
}

#[test]
fn several_give_way_in_one_step_to_several_below_their_share() {
    let config =
        EngineConfig { max_num_seqs: 4, max_logit_rows: 4, num_blocks: 40, max_num_batched_tokens: 24, ..CONFIG };
    let mut run = Run::new(config);
    for first in [0, 100, 200, 300] {
        run.add_request(of_tenant(1, first, 4, 16));
    }
    run.steps(5);
    for first in [400, 500, 600] {
        run.add_request(of_tenant(2, first, 4, 2));
    }
    // Two of four places are theirs; the third waits.
    let text = run.step();
    assert!(text.contains("prefill e[0..4/4] f[0..4/4]   ") && text.contains("preempt d c"), "{text}");
}

/// Four of one tenant that hold all memory, two blocks each, after four steps.
fn four_that_fill_memory() -> Run {
    let config = EngineConfig {
        max_num_seqs: 16,
        max_logit_rows: 16,
        max_num_batched_tokens: 32,
        num_blocks: 8,
        prefix_cache: false,
        ..CONFIG
    };
    let mut run = Run::new(config);
    for first in [0, 100, 200, 300] {
        run.add_request(of_tenant(1, first, 4, 16));
    }
    assert!(run.steps(4).ends_with("blocks 8+0/8   preempt -   finish -   held -"));
    run
}

/// Where memory bounds how many run, a share is one of those, not of slots that nobody can use.
#[test]
fn a_share_is_one_of_what_memory_allows() {
    let mut run = four_that_fill_memory();
    run.add_request(of_tenant(2, 400, 4, 6));
    let text = run.step();
    assert!(text.contains("decode a b c   prefill e[0..4/4]   ") && text.contains("preempt d "), "{text}");
}

#[test]
fn who_is_below_its_share_joins_a_step_in_which_memory_runs_out() {
    let mut run = four_that_fill_memory();
    run.step();
    run.add_request(of_tenant(2, 400, 4, 6));
    // Each of the others needs a third block.
    let text = run.step();
    assert!(text.contains("decode a b   prefill e[0..4/4]   ") && text.contains("preempt d c "), "{text}");
}

#[test]
fn shares_have_weights_and_caps() {
    let config = EngineConfig { max_num_seqs: 3, num_blocks: 40, max_num_batched_tokens: 12, ..CONFIG };
    let mut run = Run::new(config);
    let weights = [(1, Share { weight: 1, max_num_seqs: 1 }), (2, Share { weight: 3, ..Share::default() })];
    for index in 0..12 {
        for (tenant, share) in weights {
            let prompt = (index * 100 + tenant * 50..index * 100 + tenant * 50 + 4).map(TokenId).collect();
            run.add_request(Request { prompt, max_tokens: 8, tenant: tenant.into(), share, ..Request::default() });
        }
    }
    let mut most = 0;
    while run.scheduler.queue().iter().any(|sequence| sequence.request.tenant == 2) {
        run.step();
        let of_first = run.scheduler.running().filter(|sequence| sequence.request.tenant == 1).count();
        most = most.max(of_first);
    }
    assert_eq!(most, 1, "a tenant ran more than its cap");
    let left = run.scheduler.queue().len();
    assert!((7..=9).contains(&left), "at weights of 1 to 3 a third as many had been served, and {left} of 12 are left");
}

#[test]
fn priorities_order_the_requests_of_a_tenant() {
    let config = EngineConfig { max_num_seqs: 1, ..CONFIG };
    let mut run = Run::new(config);
    for (first, priority) in [(0, 0), (100, 5), (200, -1)] {
        let prompt = (first..first + 4).map(TokenId).collect();
        run.add_request(Request { prompt, max_tokens: 2, priority, ..Request::default() });
    }
    let text = run.steps(6);
    let order: Vec<_> = ["finish c", "finish a", "finish b"].iter().map(|word| text.find(word)).collect();
    assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{text}");
}

/// On a device where a row takes a millisecond after the first ten, a step in which somebody decodes is filled up to
/// the target and not beyond; a prompt advances all the same where the target is tighter than anything allows.
#[test]
fn a_prompt_takes_what_the_target_leaves_of_a_step() {
    let cost = CostModel::line(10e6, 1e6, Prices::default());
    let chunks = |latency| {
        let config = EngineConfig { max_num_batched_tokens: 64, max_model_len: 128, num_blocks: 64, latency, ..CONFIG };
        let mut run = Run::new(config);
        run.scheduler.set_cost(cost);
        run.add(0, 40, 20);
        run.step();
        run.add(100, 100, 1);
        let text = run.steps(3);
        let chunks = text.lines().map(|line| {
            let (_, rest) = line.split_once("b[").expect("the prompt advances in each step");
            let (range, _) = rest.split_once('/').expect("a range");
            let (start, end) = range.split_once("..").expect("a range");
            end.parse::<u32>().expect("a number") - start.parse::<u32>().expect("a number")
        });
        chunks.collect::<Vec<_>>()
    };
    // One row takes 10 ms, so 30 ms have room for 20 more.
    assert_eq!(chunks(LatencyTarget::Milliseconds(30)), [20, 20, 20]);
    assert_eq!(chunks(LatencyTarget::Stretch(300)), [20, 20, 20]);
    assert_eq!(chunks(LatencyTarget::Milliseconds(11)), [8, 8, 8]);
}

/// What becomes of a request on its way does not change what its tenant pays for it.
#[test]
fn nobody_pays_for_having_been_preempted() {
    let charged = |num_blocks, prefix_cache| {
        let mut run = Run::new(EngineConfig { num_blocks, prefix_cache, ..CONFIG });
        run.add(0, 8, 12);
        run.add(100, 8, 8);
        let mut charged = 0;
        while !run.scheduler.is_idle() {
            charged = run.step_charged().max(charged);
        }
        (charged, run.scheduler.num_preemptions())
    };
    let (roomy, none) = charged(60, false);
    // Prompts, and of each answer all but the last token.
    assert_eq!((roomy >> 10, none), (8 + 8 + 2 * (11 + 7), 0));
    for prefix_cache in [true, false] {
        let (scarce, num_preemptions) = charged(6, prefix_cache);
        assert!(num_preemptions > 0);
        assert_eq!(scarce, roomy, "prefix cache: {prefix_cache}");
    }
}

/// A step may fail a sequence that has been sent back to wait since it was submitted: what it had computed is as little
/// to be trusted as that of one that runs.
#[test]
fn what_a_waiting_sequence_computed_is_withdrawn_when_it_fails() {
    for prompt_len in [5, 8, 11] {
        let mut run = Run::new(EngineConfig { pipeline_depth: 2, ..CONFIG });
        let victim = run.add_request(Request { priority: 1, ..of_tenant(1, 0, prompt_len, 12) });
        while run.scheduler.running().all(|sequence| sequence.num_computed_tokens < prompt_len) {
            run.step();
        }
        run.scheduler.schedule(&mut run.cache, &mut run.batch, &mut run.trace);
        let in_flight = std::mem::take(&mut run.batch);
        // Somebody else needs all there is.
        run.add_request(of_tenant(1, 100, 20, 1));
        run.scheduler.schedule(&mut run.cache, &mut run.batch, &mut run.trace);
        assert_eq!(run.trace.preempted, [victim]);
        let tokens: Vec<TokenId> = (0..prompt_len).map(TokenId).collect();
        let chain = run.cache.chain(&tokens, 0);
        let found = |run: &Run| run.cache.find(&chain, &tokens, u32::MAX).num_blocks;
        assert!(found(&run) > 0, "it may be found while nothing is wrong");
        let failed = vec![Choice::Failed(FinishReason::Error("not finite".to_owned())); in_flight.slices.len()];
        run.scheduler.complete(&mut run.cache, &in_flight, &failed, &mut run.trace, &mut Vec::new());
        run.scheduler.check(&run.cache, std::iter::empty());
        assert_eq!(found(&run), 0, "a prompt of {prompt_len}");
    }
}

/// Who has waited for memory looks again once somebody computes what it begins with, and lets the next one pass.
#[test]
fn who_lacks_memory_sees_its_prefix_come() {
    let config = EngineConfig { max_num_batched_tokens: 6, num_blocks: 8, ..CONFIG };
    let mut run = Run::new(config);
    run.add_request(of_tenant(1, 100, 12, 12));
    run.steps(3);
    run.add_request(of_tenant(1, 0, 20, 1));
    run.add_request(of_tenant(1, 200, 2, 1));
    assert!(run.step().ends_with("held memory"));
    // The same beginning, of a tenant that comes first.
    run.add_request(of_tenant(2, 0, 8, 1));
    assert!(run.step().contains("d[0..5/8]"), "{}", run.trace);
    assert!(run.step().contains("prefill c[0..2/2] d[5..8/8]"), "{}", run.trace);
}

/// Of a sequence that leaves, what others hold stays: it is not copied, and counts nothing in what to do.
#[test]
fn only_what_would_be_lost_is_copied_to_the_host() {
    let swapped = |copy_ns| {
        let mut run = Run::new(EngineConfig { max_num_batched_tokens: 24, num_blocks: 7, ..CONFIG });
        run.scheduler.enable_swap(16, copy_ns);
        run.scheduler.set_cost(CostModel::line(1e6, 1e6, Prices::default()));
        // Three blocks of both, and then each has its own.
        let request = |own: u32| Request {
            prompt: (0..12).chain(own..own + 2).map(TokenId).collect(),
            max_tokens: 10,
            ..Request::default()
        };
        run.add_request(request(100));
        run.step();
        run.add_request(request(200));
        let mut copies = Vec::new();
        while run.scheduler.num_preemptions() == 0 {
            run.step();
        }
        let num_blocks = run.scheduler.num_swapped_blocks();
        while !run.scheduler.is_idle() {
            run.step();
            copies.extend(run.batch.copies.iter().map(|copy| copy.direction));
        }
        (num_blocks, run.scheduler.num_swaps(), copies.len())
    };
    // Of five blocks two are its own: at most 8 ms to compute again, or two copies each way.
    let (num_blocks, num_swaps, num_back) = swapped(1000);
    assert_eq!((num_blocks, num_swaps), (2, 1));
    assert!((1..=2).contains(&num_back), "{num_back}");
    assert_eq!(swapped(2_100_000), (0, 0, 0));
}

#[test]
fn a_target_below_one_step_is_refused_with_both_numbers() {
    let config = EngineConfig { latency: LatencyTarget::Milliseconds(5), ..CONFIG };
    assert_eq!(config.check(), Ok(()));
    let sentence = config.check_target(7_400_000).expect_err("below one step").to_string();
    assert!(
        sentence.contains("5 ms") && sentence.contains("7.4 ms") && sentence.contains("to 8 or more"),
        "{sentence}"
    );
    assert_eq!(config.check_target(4_000_000), Ok(()));
    let zero = EngineConfig { latency: LatencyTarget::Milliseconds(0), ..CONFIG };
    assert!(zero.check().is_err());
}
