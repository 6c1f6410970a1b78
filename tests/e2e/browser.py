"""A headless Chromium, driven by the DevTools protocol over a pipe: no port, no driver, no package.

    with Browser() as browser:
        tab = browser.tab("http://127.0.0.1:8080/")
        tab.until("document.title !== ''")
"""

import base64
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time

# What scripts/chromium.sh has found or unpacked.
COMMAND = shlex.split(os.environ.get("CHROMIUM", "chromium"))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--no-first-run",
         "--no-default-browser-check", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
         "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe"]
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39}
SHIFT = 8


class Browser:
    def __enter__(self):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
            # The browser reads commands from 3 and writes answers to 4; from where they are copied must be neither.
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
            script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
            command = ["bash", "-c", script, "bash", *COMMAND, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
            self.log = stack.enter_context(open(os.path.join(folder, "log"), "w+"))
            self.process = subprocess.Popen(command, pass_fds=high, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                                            start_new_session=True)
            for end in [theirs_in, theirs_out, *high]:
                os.close(end)
            self.out, self.inbox = stack.enter_context(open(ours_out, "wb", 0)), stack.enter_context(open(ours_in, "rb", 0))
            self.buffer, self.next_id, self.events = b"", 0, []
            stack.callback(self.end)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def end(self):
        """Ends the browser with the processes it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def call(self, method, session=None, **parameters):
        self.next_id += 1
        message = {"id": self.next_id, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.next_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def read(self):
        while b"\0" not in self.buffer:
            part = self.inbox.read(1 << 16)
            if not part:
                self.log.seek(0)
                raise RuntimeError(f"the browser ended:\n{self.log.read()[-3000:]}")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def tab(self, url, width=1200, height=800):
        return Tab(self, url, width, height)


class Tab:
    def __init__(self, browser, url, width, height):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log"]:
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.go(url)

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def go(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def reload(self):
        self.evaluate("window.isStale = true")
        self.call("Page.reload")
        self.until("!window.isStale && document.readyState === 'complete'")

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression, seconds=30):
        """The first value of the expression that is true; what it asks of may come later."""
        deadline = time.monotonic() + seconds
        while True:
            answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
            if "exceptionDetails" not in answer and answer["result"].get("value"):
                return answer["result"]["value"]
            assert time.monotonic() < deadline, f"waited in vain for {expression}; the page says: {self.text('body')[-1500:]}"
            time.sleep(0.02)

    def text(self, selector):
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def click(self, selector):
        """A real click in the middle of the element."""
        place = self.evaluate(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "nearest"}});
            const box = element.getBoundingClientRect();
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()""")
        for kind in ["mousePressed", "mouseReleased"]:
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def point(self, selector, x):
        """Moves the pointer to a share of the element's width."""
        box = self.evaluate(f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({json.dumps(selector)})"
                            ".getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] * x, y=box[1] + box[3] / 2)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, shift=False):
        parts = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": SHIFT if shift else 0}
        if key == "Enter":
            parts["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **parts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{name: part for name, part in parts.items() if name != "text"})

    def prefer(self, scheme):
        """`light` or `dark`, as the system would say."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        picture = self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        with open(path, "wb") as file:
            file.write(base64.b64decode(picture["data"]))

    def complaints(self):
        """Errors of scripts, and what the page's policy has forbidden, so far."""
        self.evaluate("0")
        found = []
        for event in [event for event in self.browser.events if event.get("sessionId") == self.session]:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"].get("exception", {}).get("description", parameters))
            if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"])
        return found
