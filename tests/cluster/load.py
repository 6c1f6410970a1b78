"""What clients of a cluster do: conversations that go on, requests without an end, streams that take their time."""

import concurrent.futures
import threading

from cluster import chat, stream

NUM_SESSIONS, NUM_TURNS = 6, 4
SYSTEM = "You are a patient teacher of geography who answers in one short sentence, without lists and without jokes."
PLACES = ["Lisbon", "Nairobi", "Hanoi", "Bogota", "Tbilisi", "Wellington"]
ASKED = ["the river or the sea that it lies at", "the language that most people there speak", "a dish that it is known for",
         "the mountains that are nearest to it", "what its weather is like in the winter"]
# A share of what one worker with all sessions finds.
LEAST_OF_IDEAL = 0.9


def session(gateway, number):
    """A conversation, turn by turn; the workers that answered."""
    place = PLACES[number % len(PLACES)]
    messages = [{"role": "system", "content": SYSTEM}]
    workers = []
    for turn in range(NUM_TURNS):
        question = f"This is about {place} and nothing else but {place}, for a class of children. " * 2
        messages.append({"role": "user", "content": question + f"Please tell us {ASKED[turn % len(ASKED)]}."})
        reply = chat(gateway, messages, max_tokens=12)
        workers.append(reply.worker)
        messages.append({"role": "assistant", "content": reply.text})
    return workers


def sessions(gateway):
    with concurrent.futures.ThreadPoolExecutor(NUM_SESSIONS) as pool:
        return list(pool.map(lambda number: session(gateway, number), range(NUM_SESSIONS)))


def hits(workers):
    return sum(worker.metric("vllm:prefix_cache_hits_total") for worker in workers)


def check_hits(routed, round_robin, ideal):
    assert routed > round_robin, f"{routed} tokens were found, and {round_robin} round robin"
    assert routed >= LEAST_OF_IDEAL * ideal, f"{routed} tokens were found, and one worker alone finds {ideal}"


class Load:
    """Requests one after the other until it is told to stop; what failed."""

    def __init__(self, gateway, num_threads=2):
        self.gateway, self.stopped, self.failures, self.num_done = gateway, threading.Event(), [], 0
        self.threads = [threading.Thread(target=self.ask, args=[number]) for number in range(num_threads)]

    def ask(self, number):
        count = 0
        while not self.stopped.is_set():
            count += 1
            messages = [{"role": "user", "content": f"Say the number {number * 1000 + count}, please."}]
            try:
                chat(self.gateway, messages, max_tokens=4)
                self.num_done += 1
            except Exception as error:
                self.failures.append(error)

    def __enter__(self):
        [thread.start() for thread in self.threads]
        return self

    def __exit__(self, *_):
        self.stopped.set()
        [thread.join() for thread in self.threads]


def long_streams(gateway, pool, num_streams=4, max_tokens=250):
    """Streams that go on for a while, once all have begun."""
    streams = []
    for number in range(num_streams):
        messages = [{"role": "user", "content": f"{PLACES[number % 6]}: count on from {number}, in words."}]
        begun = threading.Event()
        streams.append(pool.submit(stream, gateway, messages, max_tokens, begun))
        assert begun.wait(60), "a stream has not begun"
    return streams
