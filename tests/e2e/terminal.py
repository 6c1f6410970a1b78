"""End to end: what people use at a terminal: `fullbore run` as a chat, and `fullbore top`.

    python3 tests/e2e/terminal.py BINARY

Needs what run.py needs. Terminals are pseudo-terminals.
"""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

from run import BINARY, Server, run, until

CHAT = ["run", "--device", "cpu", "--temperature", "0"]


class Terminal:
    """A command on a pseudo-terminal; `with` ends it."""

    def __init__(self, *arguments):
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="100", LINES="30")
            os.execv(BINARY, [BINARY, *arguments])
        self.text, self.status = "", None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.end)

    def type(self, text):
        os.write(self.end, text.encode())

    def read(self, pattern, seconds=60):
        """What comes until the pattern does, with it."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"waited in vain for {pattern!r} after {self.text[-2000:]!r}"
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.end, 1 << 16).decode(errors="replace")
                except OSError:
                    # So the end of a pseudo-terminal is told.
                    raise AssertionError(f"it ended before {pattern!r}, after {self.text[-2000:]!r}") from None
        before, self.text = self.text[:found.end()], self.text[found.end():]
        return before

    def wait(self, seconds=20):
        """The exit status."""
        deadline = time.monotonic() + seconds
        while self.status is None:
            assert time.monotonic() < deadline, f"it goes on after {self.text[-2000:]!r}"
            if select.select([self.end], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self.end, 1 << 16).decode(errors="replace")
                except OSError:
                    pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status


def chat(*lines):
    done = subprocess.run([BINARY, *CHAT, "--max-tokens", "12"], input="".join(line + "\n" for line in lines), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and "panicked" not in done.stderr, done
    return done.stdout, [int(count) for count in re.findall(r"(\d+) prompt tokens", done.stderr)], done.stderr


def a_chat_remembers():
    text, [first], _ = chat("Name a colour.")
    whole, counts, _ = chat("Name a colour.", "And another.", "/clear", "Name a colour.", "/system Be brief.", "Name a colour.")
    assert whole.startswith(text) and counts[0] == first and counts[1] > first + 12, (whole, counts)
    # Forgotten; and with other words before.
    assert counts[2] == first and counts[3] not in (first, counts[1]), counts
    _, [two_lines], _ = chat("Name a colour.\\", "And another.")
    assert two_lines > first
    _, counts, told = chat("/nothing", "", "word " * 9000, "Name a colour.")
    assert "/help" in told and "context" in told and counts == [first], (told, counts)


def ctrl_c_stops_an_answer_and_ctrl_d_ends():
    with Terminal(*CHAT) as terminal:
        terminal.read("smollm2 on .*/help.*\r\n> ")
        terminal.type("Count from one to a thousand.\n")
        terminal.read(r"thousand\.\r\n")
        terminal.read("[a-zA-Z0-9]")
        terminal.type("\x03")
        told = terminal.read(r"(\d+) tokens at [\d.]+ a second\r\n> ")
        assert int(re.search(r"(\d+) tokens at", told)[1]) < 1000, told
        terminal.type("\x03")
        terminal.read("Ctrl-D ends\r\n> ")
        terminal.type("/help\n")
        terminal.read("/clear.*\r\n")
        terminal.read("\r\n> ")
        terminal.type("\x04")
        assert terminal.wait() == 0


def a_server_is_watched():
    with Server("sim", "--api-key", "a-key-of-the-test") as server:
        top = [BINARY, "top", "--url", server.url]
        refused = subprocess.run([*top, "--once"], capture_output=True, text=True, timeout=30)
        assert refused.returncode == 1 and "API key" in refused.stderr, refused
        environment = {**os.environ, "FULLBORE_API_KEY": "a-key-of-the-test"}

        def once():
            done = subprocess.run([*top, "--once"], env=environment, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done
            return done.stdout

        until("a frame", lambda: "KV blocks" in once())
        text = once()
        assert text.startswith("smollm2 on simulated device\n") and "\x1b" not in text and "0 of 16" in text, text
        assert re.search(r"device time, last \d+ s\n", text) and "no requests 100.0 %" in text, text
        blocks = re.search(r"(\d+) used, (\d+) cached, (\d+) free", text)
        assert (blocks[1], blocks[2]) == ("0", "0") and int(blocks[3]) > 100, text
        with Terminal("top", "--url", server.url, "--api-key", "a-key-of-the-test") as terminal:
            assert terminal.read("KV blocks.*free").startswith("\x1b[?1049h\x1b[?25l")
            terminal.read("KV blocks.*free")
            terminal.type("\x03")
            assert terminal.wait() == 0
            assert terminal.text.endswith("\x1b[?25h\x1b[?1049l"), terminal.text[-200:]
    nobody = subprocess.run([*top, "--once"], capture_output=True, text=True, timeout=30)
    assert nobody.returncode == 1 and server.url in nobody.stderr and "--url" in nobody.stderr, nobody


def main():
    results = [run("terminal", test) for test in [a_chat_remembers, ctrl_c_stops_an_answer_and_ctrl_d_ends, a_server_is_watched]]
    passed = sum(results)
    print(f"{passed} passed, {len(results) - passed} failed")
    sys.exit(0 if all(results) else 1)


main()
