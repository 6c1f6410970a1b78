//! Replicas whose threads do not run: what becomes of requests is what a test says.

use super::moves::Why;
use super::*;
use crate::backend::sim::{SimBackend, SimOptions};
use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::model::{Checkpoint, Model, ModelConfig};
use crate::request::{Event, Flow, Pooling, TokenId};
use crate::tensor::WeightFormat;
use crate::worker::Worker;

struct Nobody;

impl Sink for Nobody {
    fn event(&mut self, _event: Event) -> Flow {
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// A replica whose thread does not run: what becomes of a request is what the test says.
fn replica() -> (EngineHandle, Worker) {
    let config = EngineConfig { num_blocks: 8, max_model_len: 64, max_num_seqs: 3, ..EngineConfig::default() };
    let mut backend = Box::new(SimBackend::new(SimOptions::default()));
    let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
    let model = ModelConfig::tiny(64, 1);
    let model = Model::load(model, config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {});
    EngineHandle::new(Engine::new(config, model.expect("a small model"), backend, (1, 2)), "sim".to_owned())
}

/// A request of 8 tokens and 50 to come, on this one of two replicas, which alone is open then.
fn placed_on(dispatch: &Arc<Dispatch>, replica: ReplicaId, request: Request, has_begun: bool) -> Arc<Routed> {
    for id in [ReplicaId(0), ReplicaId(1)] {
        lock(&dispatch.board).router.set_open(id, id == replica);
    }
    let request = Arc::new(Request { prompt: vec![TokenId(1); 8], max_tokens: 50, ..request });
    let routed = Arc::new(Routed::new(dispatch.clone(), request, BlockChain::default(), Box::new(Nobody)));
    dispatch.place(&routed);
    if has_begun {
        dispatch.begun(&routed, &mut lock(&routed.now));
    }
    routed
}

/// What is predicted of the next request goes down by an answer that had no token, and by nothing else that ends.
#[test]
fn what_failed_or_was_pooled_teaches_nothing_of_answers() {
    let (engines, _workers): (Vec<EngineHandle>, Vec<Worker>) = [replica(), replica()].into_iter().unzip();
    let dispatch = Arc::new(Dispatch::new(engines, None));
    let handed_in = |pooling: Option<Pooling>| {
        let request = Request { prompt: vec![TokenId(1); 8], max_tokens: 50, pooling, ..Request::default() };
        let routed =
            Arc::new(Routed::new(dispatch.clone(), Arc::new(request), BlockChain::default(), Box::new(Nobody)));
        dispatch.place(&routed);
        routed
    };
    let predicted = || {
        let routed = handed_in(None);
        let predicted = lock(&routed.now).placement.as_ref().expect("it is placed").predicted_ns;
        routed.recall(&mut lock(&routed.now));
        predicted
    };
    let end = |pooling: Option<Pooling>, reason: FinishReason| {
        let routed = handed_in(pooling);
        dispatch.end(&routed, &mut lock(&routed.now), &reason);
    };
    let before = predicted();
    let sentence = || "its row is not finite".to_owned();
    end(None, FinishReason::Error(sentence()));
    end(None, FinishReason::Contradiction(sentence()));
    end(None, FinishReason::DeviceLost(sentence()));
    end(Some(Pooling::Last), FinishReason::Length);
    end(Some(Pooling::Mean), FinishReason::Stop);
    assert_eq!(predicted(), before);
    end(None, FinishReason::Stop);
    assert!(predicted() < before / 10, "{} {before}", predicted());
    assert_eq!([0, 1].map(|id| lock(&dispatch.board).router.num_placed(ReplicaId(id))), [0, 0]);
}

/// The first replica is full and three urgent ones wait there; the second has a slot, and one who waits for it.
#[test]
fn a_free_slot_draws_one_of_those_that_wait_elsewhere() {
    let (engines, _workers): (Vec<EngineHandle>, Vec<Worker>) = [replica(), replica()].into_iter().unzip();
    let dispatch = Arc::new(Dispatch::new(engines, None));
    let on = |replica: ReplicaId, priority: i32, has_begun: bool| {
        placed_on(&dispatch, replica, Request { priority, ..Request::default() }, has_begun)
    };
    let (full, free) = (ReplicaId(0), ReplicaId(1));
    let _begun = [full, full, full, free, free].map(|replica| on(replica, 5, true));
    let urgent = [0; 3].map(|priority| on(full, priority, false));
    let _patient = on(free, 5, false);
    [full, free].into_iter().for_each(|id| lock(&dispatch.board).router.set_open(id, true));
    let waits_at = |replica| dispatch.num_waiting_at(replica);
    assert_eq!((waits_at(full), waits_at(free)), (3, 1));
    for _ in 0..3 {
        dispatch.prefer(free);
        assert_eq!((waits_at(full), waits_at(free)), (2, 2));
    }
    let num_moved = urgent
        .iter()
        .filter(|routed| lock(&routed.now).placement.as_ref().is_some_and(|placement| placement.replica == free));
    assert_eq!(num_moved.count(), 1);
}

/// Of the first steps are known; the second takes twice as long for one sequence, and half as long as the third.
#[test]
fn who_is_not_known_is_taken_to_be_like_who_is() {
    let (known, unknown) = (CostModel::line(3e6, 1e6, Prices::default()), CostModel::UNKNOWN);
    let alone = [10, 20, 40].map(Duration::from_millis);
    assert_eq!(guessed(&[known, unknown, unknown], &alone), [known, known.faster(0.5), known.faster(0.25)]);
    // The third's own is nearer to the second.
    let third = CostModel::line(5e6, 1e6, Prices::default());
    assert_eq!(guessed(&[known, unknown, third], &alone), [known, known.faster(0.5), third]);
    let [first, .., last] = &guessed(&[unknown; 3], &alone)[..] else { panic!("three") };
    assert_eq!(*last, first.faster(0.25));
}

/// A step of the first takes twenty times as long; four run there, and the second has nothing to do.
#[test]
fn who_runs_on_a_slow_device_begins_anew_once_on_one_that_has_nothing_to_do() {
    let (engines, _workers): (Vec<EngineHandle>, Vec<Worker>) = [replica(), replica()].into_iter().unzip();
    let dispatch = Arc::new(Dispatch::new(engines, None));
    let (slow, fast) = (ReplicaId(0), ReplicaId(1));
    let cost = |speed: f64| CostModel::line(10e6, 0.1e6, Prices::default()).faster(speed);
    let runs_at = |replica: ReplicaId| lock(&dispatch.board).seats[usize::from(replica.0)].running.len();
    {
        let mut board = lock(&dispatch.board);
        board.learn(slow, cost(0.05));
        board.learn(fast, cost(1.0));
    }
    let begun = |pooling: Option<Pooling>| placed_on(&dispatch, slow, Request { pooling, ..Request::default() }, true);
    let all = [Some(Pooling::Last), None, None].map(begun);
    let ending = begun(None);
    let (_, mut sink) = ending.next_attempt(&lock(&ending.now));
    sink.will_end();
    assert_eq!((runs_at(slow), runs_at(fast)), (4, 0));
    lock(&dispatch.board).router.set_open(fast, true);
    dispatch.relieve(fast, 3, Why::Runs);
    // They wait there now; what is pooled has no tokens with which it could begin anew, and what ends no more to come.
    assert_eq!((runs_at(slow), dispatch.num_waiting_at(fast)), (2, 2));
    all[1..].iter().for_each(|routed| dispatch.begun(routed, &mut lock(&routed.now)));
    // Who has been taken is not taken back.
    lock(&dispatch.board).learn(fast, cost(0.001));
    dispatch.relieve(slow, 3, Why::Runs);
    assert_eq!((runs_at(slow), runs_at(fast)), (2, 2));
    for routed in all.iter().chain([&ending]) {
        dispatch.end(routed, &mut lock(&routed.now), &FinishReason::Length);
    }
    assert_eq!((runs_at(slow), runs_at(fast)), (0, 0));
}

/// Both are full, and one waits at the second too.
#[test]
fn who_is_with_a_device_that_is_late_goes_elsewhere_though_others_wait_there() {
    let (engines, _workers): (Vec<EngineHandle>, Vec<Worker>) = [replica(), replica()].into_iter().unzip();
    let dispatch = Arc::new(Dispatch::new(engines, None));
    let (late, other) = (ReplicaId(0), ReplicaId(1));
    let on = |replica: ReplicaId, pooling: Option<Pooling>, has_begun: bool| {
        placed_on(&dispatch, replica, Request { pooling, ..Request::default() }, has_begun)
    };
    let pooled = on(late, Some(Pooling::Last), true);
    let begun = [late, late, other, other, other].map(|id| on(id, None, true));
    let waiting = [late, late, late, other].map(|id| on(id, None, false));
    [late, other].into_iter().for_each(|id| lock(&dispatch.board).router.set_open(id, true));
    let there = |id: ReplicaId| {
        let board = lock(&dispatch.board);
        let seat = &board.seats[usize::from(id.0)];
        (seat.running.len(), seat.waiting.len())
    };
    let relieve_late = || {
        let late = lock(&dispatch.board).router.late().collect();
        dispatch.relieve_late(late);
    };
    for _ in 0..3 {
        relieve_late();
        assert_eq!([late, other].map(there), [(3, 3), (3, 1)], "nobody is late");
    }
    lock(&dispatch.board).router.set_stalled(late, Duration::from_secs(100));
    relieve_late();
    // What is pooled has no tokens with which it could begin anew.
    assert_eq!([late, other].map(there), [(1, 0), (3, 6)]);
    let in_order: Vec<Arc<Routed>> = lock(&dispatch.board).seats[1].waiting.iter().cloned().collect();
    let expected = [&waiting[3], &waiting[0], &waiting[1], &waiting[2], &begun[0], &begun[1]];
    assert!(in_order.iter().zip(expected).all(|(routed, expected)| Arc::ptr_eq(routed, expected)));
    for routed in begun.iter().chain(&waiting).chain([&pooled]) {
        dispatch.end(routed, &mut lock(&routed.now), &FinishReason::Length);
    }
    assert_eq!([late, other].map(there), [(0, 0), (0, 0)]);
}
