"""Workers behind SMG, for real: routing by prefix, loss, drain and return of a worker, and KV events.

    python3 tests/cluster/smg.py BINARY

Needs smg, pyzmq and msgpack (scripts/cluster.sh sees to them), and the default model in the cache. All sockets are on
127.0.0.1. Ends with `N passed, N failed`, and with status 1 if any failed.
"""

import concurrent.futures
import contextlib
import random
import sys

from cluster import Smg, Worker, chat, free_port, run, until
from events import Index, Subscriber
from load import PLACES, SYSTEM, Load, check_hits, hits, long_streams, sessions

BINARY = sys.argv[1]
NUM_WORKERS = 3


@contextlib.contextmanager
def cluster(policy, num_workers=NUM_WORKERS, *flags):
    with contextlib.ExitStack() as stack:
        start = lambda index: Worker(BINARY, f"cpu@{index % 2}", *flags)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            workers = [stack.enter_context(worker) for worker in pool.map(start, range(num_workers))]
        yield stack.enter_context(Smg([worker.url for worker in workers], policy)), workers


def hits_of(policy, num_workers=NUM_WORKERS, *flags):
    with cluster(policy, num_workers, *flags) as (smg, workers):
        routed = sessions(smg)
        return hits(workers), routed


def prefixes_decide_where_a_request_goes():
    ideal, _ = hits_of("round_robin", 1)
    round_robin, scattered = hits_of("round_robin")
    routed, sticky = hits_of("cache_aware")
    for number, workers in enumerate(sticky):
        assert len(set(workers)) == 1, f"session {number} was with {workers}"
    assert any(len(set(workers)) > 1 for workers in scattered), "round robin is sticky too"
    print(f"  tokens found: {routed:.0f} by prefix, {round_robin:.0f} round robin, {ideal:.0f} by one worker")
    check_hits(routed, round_robin, ideal)
    # Workers that keep no prefixes must be seen to.
    without, _ = hits_of("cache_aware", NUM_WORKERS, "--no-prefix-cache")
    try:
        check_hits(without, round_robin, ideal)
    except AssertionError:
        return
    raise AssertionError(f"{without} tokens were found without prefix caches, and nobody minds")


def workers_die_leave_and_return():
    with cluster("round_robin", NUM_WORKERS, "--drain-accept-seconds", "4") as (smg, workers), \
            concurrent.futures.ThreadPoolExecutor() as pool:
        # One dies: whole answers come from others, and its streams end with an error that is told.
        streams = long_streams(smg, pool)
        victim = workers[0]
        with Load(smg) as load:
            victim.kill()
            ends = [one.result(120) for one in streams]
            until("requests after the loss", lambda: load.num_done >= 6)
        assert not load.failures, f"whole answers failed: {load.failures[:3]}"
        lost = [end for end in ends if end.worker == victim.url]
        assert lost and all(end.error for end in lost), f"streams of a dead worker ended as if whole: {lost}"
        assert all(end.error is None and end.finished for end in ends if end.worker != victim.url), ends
        # It returns, with nothing, and is used again.
        victim.restart()
        seen = lambda: chat(smg, [{"role": "user", "content": "Who is it?"}], max_tokens=1).worker == victim.url
        until("the worker that was started anew", seen, seconds=60)
        # One is told to end: nobody notices.
        streams = long_streams(smg, pool)
        leaver = workers[1]
        with Load(smg) as load:
            leaver.terminate()
            ends = [one.result(120) for one in streams]
            assert leaver.process.wait(60) == 0
            done = load.num_done
            until("requests after the end", lambda: load.num_done >= done + 6)
        assert not load.failures, f"requests failed while a worker ended: {load.failures[:3]}"
        assert any(end.worker == leaver.url for end in ends)
        assert all(end.error is None and end.finished for end in ends), ends


def full_workers_are_passed_over():
    """429 of one is an answer of another."""
    with contextlib.ExitStack() as stack:
        small, large = (stack.enter_context(Worker(BINARY, f"cpu@{core}", *flags)) for core, flags in
                        [(0, ["--max-queued-requests", "1", "--max-num-seqs", "1"]), (1, [])])
        smg = stack.enter_context(Smg([small.url, large.url], "round_robin"))
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            ask = lambda number: chat(smg, [{"role": "user", "content": f"Number {number}?"}], max_tokens=16)
            replies = list(pool.map(ask, range(12)))
        assert {reply.worker for reply in replies} >= {large.url}
        assert small.metric('fullbore_http_responses_total{status="429"}') > 0, "it was never full"


def random_prompts(source):
    """Tokens, which often begin as earlier ones do."""
    prompts = [[]]
    for _ in range(40):
        earlier = source.choice(prompts)
        prompts.append(earlier[:source.randrange(len(earlier) + 1)] + source.choices(range(100, 40000), k=source.randrange(8, 80)))
    return [prompt[:400] for prompt in prompts[1:]]


def events_are_the_truth():
    """An index of events alone, by libzmq, against the worker's block table; replay, and a start anew."""
    events, replay = free_port(), free_port()
    config = f'{{"endpoint": "tcp://127.0.0.1:{events}", "replay_endpoint": "tcp://127.0.0.1:{replay}", "topic": "kv@w"}}'
    flags = ["--kv-events-config", config, "--kv-memory", "12MiB", "--max-model-len", "512"]
    with Worker(BINARY, "cpu@0", *flags) as worker, Smg([worker.url], "cache_aware") as smg:
        subscriber = Subscriber(events, replay)
        sessions(smg)
        cached = lambda: worker.metric('fullbore_kv_blocks{state="cached"}')

        def agree():
            subscriber.take()
            return worker.metric('fullbore_kv_blocks{state="used"}') == 0 and len(subscriber.index.blocks) == cached()

        until("events of all blocks", agree)
        assert subscriber.index.num_removed > 0, "nothing was evicted"
        late = Index()
        Subscriber.replay(replay, 0, late)
        assert late.blocks == subscriber.index.blocks, "a late subscriber knows other blocks"
        # Of what prompts have, who knows events alone finds what the worker finds in its table.
        body = {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PLACES[0]}]}
        prompts = [worker.post("/tokenize", body)["tokens"]]
        prompts += random_prompts(random.Random(7))
        num_found = 0
        for prompt in prompts:
            until("events of all blocks", agree)
            found = subscriber.index.num_found(prompt)
            usage = worker.post("/v1/completions", {"model": "smollm2", "prompt": prompt, "max_tokens": 1})["usage"]
            cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            assert found == cached_tokens, f"{found} of {len(prompt)} tokens by events, {cached_tokens} by the worker"
            num_found += found
        assert num_found > 0, "none of them had anything in common"
        worker.kill()
        worker.restart()
        fresh = Index()
        until("the first batch", lambda: Subscriber.replay(replay, 0, Index()) > 0)
        Subscriber.replay(replay, 0, fresh)
        assert fresh.first_seq == 0 and not fresh.blocks, f"a worker that was started anew knows {fresh.blocks}"


run(prefixes_decide_where_a_request_goes, workers_die_leave_and_return, full_workers_are_passed_over,
    events_are_the_truth)
