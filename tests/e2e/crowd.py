"""End to end: ten thousand connections that say nothing.

    python3 tests/e2e/crowd.py BINARY

On a server with room for them, on one with its usual limits, and on one that has fewer file descriptors than it would
take. Ends with `N passed, N failed`, and with status 1 if any failed.
"""

import contextlib
import http.client
import os
import resource
import socket
import sys
import time

from run import Server, run, until

HARD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
# Fewer only where this machine lets nobody have as many files.
COUNT = 10_000 if HARD_LIMIT == resource.RLIM_INFINITY else min(10_000, HARD_LIMIT - 500)
# Of a connection that says nothing, at most: its task, and hyper's buffer of 8 KiB for what it may say.
MAX_BYTES_EACH = 24 << 10


class Crowd(contextlib.ExitStack):
    """Connections that say nothing; those that a server does not take wait, or are closed by it.

    The system has a queue for those that are not accepted yet, and tries what is beyond again only after seconds: a
    crowd that is to be held whole is `let_in`, and waits for the server every hundred: no queue is shorter."""

    def __init__(self, server, count, let_in=False):
        super().__init__()
        host, port = server.url.removeprefix("http://").split(":")
        for index in range(count):
            if index % 100 == 0:
                time.sleep(0.005)
            if let_in and index % 100 == 0:
                until(f"{index} to be let in", lambda: num_descriptors(server) >= index)
            connection = self.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex((host, int(port)))


class Regular(http.client.HTTPConnection):
    """A client that was there before the crowd, and keeps its connection."""

    def __init__(self, server):
        super().__init__(*server.url.removeprefix("http://").split(":"), timeout=20)

    def is_served(self):
        self.request("GET", "/health/live")
        reply = self.getresponse()
        reply.read()
        return reply.status == 200


def num_descriptors(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def resident_bytes(server):
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def processor_seconds(server):
    with open(f"/proc/{server.process.pid}/stat") as file:
        fields = file.read().rsplit(")")[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def assert_rests(server):
    before = processor_seconds(server)
    time.sleep(2)
    busy = processor_seconds(server) - before
    assert busy < 0.5, f"{busy:.2f} s of 2 s at work, for nobody"


def asks(server):
    return server.post("/v1/completions", {"prompt": "x", "max_tokens": 4})[0]


def ten_thousand_are_held_and_cost_little():
    # The server raises its own limit as far as it may.
    with Server("sim", "--max-connections", str(COUNT + 100), descriptors=(1024, HARD_LIMIT)) as server:
        assert asks(server) == 200
        usual, before = num_descriptors(server), resident_bytes(server)
        with Crowd(server, COUNT, let_in=True):
            until("all of them", lambda: num_descriptors(server) >= usual + COUNT)
            each = (resident_bytes(server) - before) / COUNT
            print(f"        {COUNT} idle connections take {each:.0f} bytes each")
            assert each < MAX_BYTES_EACH, each
            assert asks(server) == 200
            assert_rests(server)
        until("their end", lambda: num_descriptors(server) < usual + 50)
        assert asks(server) == 200


def the_cap_holds_and_who_is_in_is_served():
    with Server("sim") as server:
        regular = Regular(server)
        assert regular.is_served()
        usual = num_descriptors(server)
        with Crowd(server, COUNT):
            # The last of them may wait to be told.
            until("most to be sent away", lambda: regular.is_served() and sent_away(regular) > COUNT // 2)
            assert num_descriptors(server) <= usual + 1024 + 100, num_descriptors(server)
            assert regular.is_served()
            assert_rests(server)
        until("room", lambda: asks(server) == 200)


def sent_away(regular):
    regular.request("GET", "/metrics")
    text = regular.getresponse().read().decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("fullbore_connections_refused_total"))


def without_descriptors_it_waits_and_serves_who_is_in():
    with Server("sim", descriptors=(256, 256)) as server:
        regular = Regular(server)
        assert regular.is_served()
        with Crowd(server, 1000):
            until("the last descriptor", lambda: num_descriptors(server) >= 255)
            assert regular.is_served()
            assert_rests(server)
            assert regular.is_served()
        until("room", lambda: asks(server) == 200)


def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (HARD_LIMIT, HARD_LIMIT))
    tests = [ten_thousand_are_held_and_cost_little, the_cap_holds_and_who_is_in_is_served,
             without_descriptors_it_waits_and_serves_who_is_in]
    results = [run("crowd", test) for test in tests]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
