//! Of a few replicas, each decision that is asked of the router.

use super::*;
use crate::cost::Prices;

/// `speed` times as fast as 10 ms a step and 0.1 ms for each row more.
fn traits(speed: f64) -> Traits {
    let cost = CostModel::line(10e6 / speed, 0.1e6 / speed, Prices::default());
    Traits { cost, max_num_seqs: 4, max_num_batched_tokens: 512, kv_tokens: 1 << 20 }
}

fn router(speeds: &[f64]) -> Router {
    Router::new(16, &speeds.iter().map(|&speed| traits(speed)).collect::<Vec<_>>())
}

fn chain(root: u128, len: u128) -> Vec<BlockHash> {
    (0..len).map(|block| BlockHash(root << 32 | block)).collect()
}

fn ask(chain: &[BlockHash]) -> Ask<'_> {
    Ask { chain, prompt_tokens: 400, max_tokens: 100 }
}

fn place(router: &mut Router) -> Placement {
    router.place(ask(&[])).expect("an open replica")
}

/// Where it would go, with nothing left of it.
fn alone(router: &mut Router, ask: Ask) -> u16 {
    let placement = router.place(ask).expect("open");
    let replica = placement.replica.0;
    router.withdraw(placement);
    replica
}

#[test]
fn equal_replicas_take_turns() {
    let mut router = router(&[1.0; 4]);
    let places: Vec<Placement> = (0..8).map(|_| place(&mut router)).collect();
    let ids: Vec<u16> = places.iter().map(|placement| placement.replica.0).collect();
    assert_eq!(ids, [0, 1, 2, 3, 0, 1, 2, 3]);
}

/// Prices that were measured are never the same, and one client alone leaves all queues empty.
#[test]
fn nearly_equal_replicas_take_turns_but_for_a_prefix() {
    let mut router = router(&[1.0, 1.01, 0.995, 0.9]);
    let turns: Vec<u16> = (0..6).map(|_| alone(&mut router, ask(&[]))).collect();
    assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
    // It would end 16 ms later on the third than on the second, of 1.05 s. A block that is there saves 2 ms.
    let shared = chain(7, 24);
    let mut with = |num_blocks: usize| -> Vec<u16> {
        shared[..num_blocks].iter().for_each(|&hash| router.tell(ReplicaId(2), BlockEvent::Stored(hash)));
        (0..6).map(|_| alone(&mut router, ask(&shared))).collect()
    };
    assert_eq!(with(1), [0, 1, 2, 0, 1, 2]);
    assert_eq!(with(5), [2; 6]);
}

#[test]
fn work_goes_by_speed() {
    let mut router = router(&[1.0, 1.0, 2.0, 4.0]);
    let mut counts = [0u32; 4];
    let places: Vec<Placement> = (0..800).map(|_| place(&mut router)).collect();
    places.iter().for_each(|placement| counts[usize::from(placement.replica.0)] += 1);
    for (count, wanted) in counts.into_iter().zip([100u32, 100, 200, 400]) {
        assert!(count.abs_diff(wanted) <= wanted / 20, "{counts:?}");
    }
}

/// A prefix of 384 tokens saves 384 times what a token of a prompt costs there, and no more.
#[test]
fn a_prefix_counts_for_what_it_saves() {
    let mut router = router(&[1.0, 1.0]);
    let shared = chain(7, 24);
    shared.iter().for_each(|&hash| router.tell(ReplicaId(1), BlockEvent::Stored(hash)));
    let first = router.place(ask(&shared)).expect("open");
    assert_eq!((first.replica, first.cached_tokens), (ReplicaId(1), 384));
    // With four more there the saving is less than the wait for their prompts and a slot.
    let others: Vec<Placement> = (0..4).map(|_| router.place_on(ReplicaId(1), ask(&[]))).collect();
    let second = router.place(ask(&shared)).expect("open");
    assert_eq!((second.replica, second.cached_tokens), (ReplicaId(0), 0));
    // What has left its cache counts for nothing, wherever in the chain it was.
    others.into_iter().chain([first, second]).for_each(|placement| router.withdraw(placement));
    router.tell(ReplicaId(1), BlockEvent::Removed(shared[0]));
    assert_eq!(router.place(ask(&shared)).expect("open").cached_tokens, 0);
}

#[test]
fn counts_go_back_to_nothing() {
    let mut router = router(&[1.0, 3.0]);
    let mut places: Vec<Placement> = (0..20).map(|_| place(&mut router)).collect();
    for (nth, placement) in places.iter_mut().enumerate() {
        (0..7 * nth).for_each(|_| router.token(placement));
    }
    for (nth, placement) in places.into_iter().enumerate() {
        match nth % 2 {
            0 => router.end(placement, 7 * nth as u32),
            _ => router.withdraw(placement),
        }
    }
    for replica in &router.replicas {
        let counts = (replica.num_placed, replica.prompt_tokens, replica.waiting_ns, replica.answer_tokens);
        assert_eq!(counts, (0, 0, 0, 0));
    }
}

#[test]
fn answers_are_expected_as_long_as_they_were() {
    let mut router = router(&[1.0]);
    for _ in 0..50 {
        let placement = router.place(Ask { max_tokens: 10_000, ..ask(&[]) }).expect("open");
        router.end(placement, 300);
    }
    assert_eq!(router.place(Ask { max_tokens: 10_000, ..ask(&[]) }).expect("open").answer_tokens, 300);
    assert_eq!(router.place(Ask { max_tokens: 20, ..ask(&[]) }).expect("open").answer_tokens, 20);
}

/// The fast one has a prompt before them that takes 0.24 s: who has little to say goes to the slow one.
#[test]
fn where_answers_are_known_the_long_and_the_short_part() {
    let mut router = router(&[1.0, 4.0]);
    let before = router.place_on(ReplicaId(1), Ask { prompt_tokens: 8000, max_tokens: 1, ..ask(&[]) });
    let with = |router: &mut Router, max_tokens: u32| {
        let placement = router.place(Ask { max_tokens, ..ask(&[]) }).expect("open");
        let found = (placement.replica.0, placement.answer_tokens);
        router.withdraw(placement);
        found
    };
    assert_eq!([1000, 10_000].map(|most| with(&mut router, most)), [(1, 128); 2], "the mean, whatever it may be");
    router.expect_max_tokens();
    assert_eq!([5, 1000].map(|length| with(&mut router, length)), [(0, 5), (1, 1000)]);
    router.withdraw(before);
}

/// A prompt of 4,000 tokens takes 0.24 s on the fast one, and 0.48 s on the slow one. It would end sooner on the
/// fast one, where three decode that would wait for it.
#[test]
fn a_long_prompt_keeps_away_from_those_that_decode() {
    let mut router = router(&[1.0, 2.0]);
    let mut others: Vec<Placement> = (0..3).map(|_| router.place_on(ReplicaId(1), ask(&[]))).collect();
    others.iter_mut().for_each(|placement| router.token(placement));
    let long = Ask { prompt_tokens: 4000, max_tokens: 20, ..ask(&[]) };
    assert_eq!([alone(&mut router, long), alone(&mut router, ask(&[]))], [0, 1]);
    router.mind_own_end_alone();
    assert_eq!(alone(&mut router, long), 1);
    others.into_iter().for_each(|placement| router.withdraw(placement));
}

/// Eight streams of one prefix over four replicas of many slots: first when nobody has it, then when one does, which
/// is to get what its prefix saves and no more.
#[test]
fn streams_that_share_a_prefix_leave_no_replica_idle() {
    let traits = Traits { max_num_seqs: 16, ..traits(1.0) };
    let mut router = Router::new(16, &[traits; 4]);
    let shared = chain(7, 24);
    let counts = |router: &mut Router| {
        let places: Vec<Placement> = (0..8).map(|_| router.place(ask(&shared)).expect("open")).collect();
        let counts = [0, 1, 2, 3].map(|id| router.num_placed(ReplicaId(id)));
        places.into_iter().for_each(|placement| router.withdraw(placement));
        counts
    };
    assert_eq!(counts(&mut router), [2; 4]);
    shared.iter().for_each(|&hash| router.tell(ReplicaId(1), BlockEvent::Stored(hash)));
    let warm = counts(&mut router);
    assert!(warm.iter().all(|&count| count > 0) && warm[1] > 2, "{warm:?}");
}

#[test]
fn who_is_closed_gets_nothing_and_what_waits_moves() {
    let mut router = router(&[1.0, 1.0]);
    router.set_open(ReplicaId(1), false);
    let places: Vec<Placement> = (0..12).map(|_| place(&mut router)).collect();
    assert!(places.iter().all(|placement| placement.replica == ReplicaId(0)));
    assert_eq!(router.most_behind(|_| true), Some(ReplicaId(0)));
    assert_eq!(router.most_behind(|_| false), None);
    let last = places.last().expect("twelve");
    assert!(!router.is_worth_a_move(last, ask(&[]), ReplicaId(1)));
    router.set_open(ReplicaId(1), true);
    assert!(router.is_worth_a_move(last, ask(&[]), ReplicaId(1)));
    assert!(!router.is_worth_a_move(last, ask(&[]), ReplicaId(0)));
    router.set_open(ReplicaId(0), false);
    router.set_open(ReplicaId(1), false);
    assert_eq!(router.place(ask(&[])), None);
}

#[test]
fn who_is_stalled_is_passed_by_and_what_waits_there_moves() {
    let mut router = router(&[1.0, 1.0]);
    let waiting = place(&mut router);
    assert!(!router.is_worth_a_move(&waiting, ask(&[]), ReplicaId(1)));
    // A full step takes 61 ms; a prompt of 8,000 tokens takes 0.95 s, whatever steps it is cut into.
    router.set_stalled(ReplicaId(0), Duration::from_millis(61));
    assert!(!router.is_worth_a_move(&waiting, ask(&[]), ReplicaId(1)));
    let long = router.place_on(ReplicaId(0), Ask { prompt_tokens: 8000, ..ask(&[]) });
    router.set_stalled(ReplicaId(0), Duration::from_millis(900));
    assert_eq!((router.replicas[0].late_ns, router.late().collect::<Vec<_>>()), (0, vec![ReplicaId(0)]));
    router.withdraw(long);
    router.set_stalled(ReplicaId(0), Duration::from_secs(1));
    assert!(router.is_worth_a_move(&waiting, ask(&[]), ReplicaId(1)));
    router.withdraw(waiting);
    assert!((0..5).all(|_| place(&mut router).replica == ReplicaId(1)));
    router.set_stalled(ReplicaId(0), Duration::ZERO);
    assert_eq!(place(&mut router).replica, ReplicaId(0));
}

#[test]
fn a_device_that_gets_slower_gets_less() {
    let mut router = router(&[1.0, 1.0]);
    router.set_cost(ReplicaId(0), traits(0.25).cost);
    let places: Vec<Placement> = (0..100).map(|_| place(&mut router)).collect();
    let slow = places.iter().filter(|placement| placement.replica == ReplicaId(0)).count();
    assert!((15..=25).contains(&slow), "{slow}");
}

/// One that runs has 100 tokens to come: 1.1 s where a step takes 10 ms, and 51 ms on one that is twenty times as fast,
/// its prompt of 500 tokens again and all.
#[test]
fn who_runs_begins_anew_where_that_is_so_much_sooner() {
    let restarts = |speed: f64, prompt_tokens: u32, max_tokens: u32| {
        let mut router = router(&[1.0, speed]);
        let mut placement = router.place_on(ReplicaId(0), ask(&[]));
        router.token(&mut placement);
        let is_worth_it =
            router.is_worth_a_restart(&placement, Ask { chain: &[], prompt_tokens, max_tokens }, ReplicaId(1));
        router.withdraw(placement);
        is_worth_it
    };
    assert!(restarts(20.0, 500, 100));
    // There is nothing to gain where both are alike, nor for the last token, nor beside a long prompt.
    assert!(!restarts(1.0, 500, 100) && !restarts(20.0, 5000, 1) && !restarts(20.0, 200_000, 100));
    // What is late is as good as slow.
    let mut router = router(&[1.0, 1.0]);
    let mut placement = router.place_on(ReplicaId(0), ask(&[]));
    router.token(&mut placement);
    assert!(!router.is_worth_a_restart(&placement, ask(&[]), ReplicaId(1)));
    router.set_stalled(ReplicaId(0), Duration::from_secs(5));
    assert!(router.is_worth_a_restart(&placement, ask(&[]), ReplicaId(1)));
    assert_eq!(router.slowest(|_| true), Some(ReplicaId(0)));
    assert_eq!(router.slowest(|replica| replica == ReplicaId(1)), Some(ReplicaId(1)));
    router.withdraw(placement);
}

/// Both have six slots; the second has memory for two requests, and gets no third while the first has a slot.
#[test]
fn a_slot_without_memory_is_none() {
    let large = Traits { max_num_seqs: 6, ..traits(1.0) };
    let small = Traits { kv_tokens: 2 * 528, ..large };
    let mut router = Router::new(16, &[large, small]);
    let places: Vec<Placement> = (0..8).map(|_| place(&mut router)).collect();
    let counts = [0, 1].map(|id| router.num_placed(ReplicaId(id)));
    assert_eq!(counts, [6, 2]);
    places.into_iter().for_each(|placement| router.withdraw(placement));
}
