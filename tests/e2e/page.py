"""End to end: the page, in a headless Chromium, on the running binary.

    python3 tests/e2e/page.py BINARY [FOLDER]

Needs what run.py needs, and Chromium (scripts/e2e.sh sees to all). With a folder, screenshots are left there.
"""

import functools
import json
import os
import random
import sys
import threading
import time

from browser import Browser
from run import Server, run, until

FOLDER = sys.argv[2] if len(sys.argv) > 2 else None
ANSWER = "article.assistant:last-of-type"
IDLE = "document.querySelector('#send').textContent === 'Send'"


def open_page(browser, server, view="chat", **size):
    tab = browser.tab(f"{server.url}/#{view}", **size)
    tab.until("document.querySelector('#model').textContent.includes('tokens of context')")
    return tab


def fresh(browser, server, **values):
    """A tab without a conversation, with these settings."""
    tab = open_page(browser, server)
    settings = json.dumps({"temperature": "0", "max_completion_tokens": "24", **values})
    tab.evaluate(f"localStorage.clear(), localStorage.setItem('fullbore.settings', {json.dumps(settings)})")
    tab.go("about:blank")
    tab.go(f"{server.url}/#chat")
    tab.until("document.querySelector('#model').textContent.includes('tokens of context')")
    return tab


def send(tab, text):
    tab.evaluate("document.querySelector('#prompt').focus()")
    tab.type(text)
    tab.press("Enter")


def said(tab):
    """All messages as (role, text), once nothing is being answered."""
    tab.until(IDLE)
    return tab.evaluate("[...document.querySelectorAll('article')].map(a => [a.className, a.querySelector('.body').innerText])")


def a_message_is_answered_as_it_comes(browser, server):
    tab = fresh(browser, server, max_completion_tokens="60")
    tab.evaluate("document.querySelector('#prompt').focus()")
    tab.type("Name three")
    tab.press("Enter", shift=True)
    tab.type("primary colours.")
    assert tab.evaluate("document.querySelector('#prompt').value") == "Name three\nprimary colours."
    tab.press("Enter")
    part = tab.until(f"document.querySelector('{ANSWER}[aria-busy] .body')?.innerText")
    [[role, asked], [_, whole]] = said(tab)
    assert (role, asked) == ("user", "Name three\nprimary colours.") and whole.startswith(part[:3]) and len(whole) > len(part), (part, whole)
    note = tab.text(f"{ANSWER} .note")
    ask = {"messages": [{"role": "user", "content": asked}], "temperature": 0, "max_tokens": 60}
    plain = json.loads(server.post("/v1/chat/completions", ask)[1])
    tokens = f"{plain['usage']['completion_tokens']} tokens"
    assert note.startswith(tokens) and "tokens/s" in note and "first after" in note, note
    assert "of 1,024 tokens of context" in tab.text("#context"), tab.text("#context")
    assert tokens in tab.text("#said")
    kept = tab.evaluate("JSON.parse(localStorage['fullbore.conversation']).messages[1].content")
    assert kept == plain["choices"][0]["message"]["content"], (kept, plain)
    tab.reload()
    tab.until("document.querySelectorAll('article').length === 2")
    assert said(tab)[1][1] == whole
    assert not tab.complaints(), tab.complaints()


def an_answer_is_stopped(browser, server):
    tab = fresh(browser, server, max_completion_tokens="900")
    for stop in [lambda: tab.press("Escape"), lambda: tab.click("#send")]:
        send(tab, "Count from one to a thousand.")
        tab.until(f"document.querySelector('{ANSWER}[aria-busy] .body')?.innerText")
        assert server.gauge("fullbore_requests_running") == 1
        stop()
        until("the sequence to end", lambda: server.gauge("fullbore_requests_running") == 0)
        tab.until(IDLE)
        assert "stopped" in tab.text(f"{ANSWER} .note"), tab.text(f"{ANSWER} .note")
    assert [role for role, _ in said(tab)] == ["user", "assistant"] * 2


def messages_are_edited_and_asked_again(browser, server):
    tab = fresh(browser, server, max_completion_tokens="8")
    send(tab, "Name a colour.")
    first = said(tab)
    send(tab, "And another.")
    second = said(tab)
    assert len(second) == 4 and second[:2] == first
    tab.click(f"{ANSWER} .actions button")
    assert said(tab) == second, "the same question has another answer"
    # The last of one's own messages, by keyboard alone; Esc leaves it as it is.
    tab.evaluate("document.querySelector('#prompt').focus()")
    for key, text in [("Escape", "And another."), ("Enter", "And a third.")]:
        tab.press("ArrowUp")
        tab.until("document.activeElement.closest('article') !== null")
        tab.evaluate("document.activeElement.select()")
        tab.type("And a third.")
        tab.press(key)
        assert [text for role, text in said(tab) if role == "user"] == ["Name a colour.", text]
    # The first by its button: what came after it is gone.
    tab.click("article.user .actions button")
    tab.evaluate("document.activeElement.select()")
    tab.type("Name an animal.")
    tab.press("Enter")
    assert [role for role, _ in said(tab)] == ["user", "assistant"] and said(tab)[0][1] == "Name an animal."
    tab.click("#clear")
    assert said(tab) == [] and "Say something" in tab.text("#hint")


def settings_are_sent(browser, server):
    tab = fresh(browser, server)
    tab.call("Network.enable")
    tab.click("#settings summary")
    for selector, text in [("#system", "Answer in one word."), ("[data-setting=top_k]", "5"), ("[data-setting=seed]", "7")]:
        tab.evaluate(f"document.querySelector('{selector}').focus()")
        tab.type(text)
    send(tab, "Name a colour.")
    said(tab)
    posts = [event["params"]["request"]["postData"] for event in browser.events
             if event["method"] == "Network.requestWillBeSent" and event["params"]["request"]["method"] == "POST"]
    body = json.loads(posts[-1])
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}, body
    assert (body["top_k"], body["seed"], body["temperature"], body["max_completion_tokens"]) == (5, 7, 0, 24), body
    tab.reload()
    tab.until("document.querySelector('#system')?.value === 'Answer in one word.'")


MARKDOWN = """# Title
Some **bold**, *slanted*, `code`, ~~gone~~ and snake_case_words.
A [link](https://example.org/a) and https://example.org/b.

- one
  - inner
- two

3. three
4. four

```python
def f(x):
    return x < 2 and "<b>"
```

> quoted

| a | b |
|---|---|
| 1 | 2 |
"""
HOSTILE = """<img src=x onerror="document.title='taken'"><script>document.title='taken'</script>
[click](javascript:document.title='taken') ![x](https://example.org/x.png) <a href="javascript:1">a</a>
[data](data:text/html,<script>1</script>) [odd](JaVaScRiPt:alert(1)) **<svg onload=alert(1)>**

```<img src=x onerror=alert(1)>
</code><img src=x onerror=alert(1)>
"""


def render(tab, text):
    """What the page makes of an answer, as it shows it."""
    conversation = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": text}]}
    tab.evaluate(f"localStorage.setItem('fullbore.conversation', {json.dumps(json.dumps(conversation))})")
    tab.reload()
    tab.until("document.querySelectorAll('article').length === 2")
    return tab.evaluate(f"document.querySelector('{ANSWER} .body').innerHTML")


def markdown_is_rendered(browser, server):
    tab = fresh(browser, server)
    html = render(tab, MARKDOWN)
    for part in ["<h1>Title</h1>", "<strong>bold</strong>", "<em>slanted</em>", "<code>code</code>", "<del>gone</del>", "snake_case_words",
                 'href="https://example.org/a"', '>https://example.org/b</a>.', "<li>one<ul><li>inner</li></ul></li>", '<ol start="3">',
                 "<pre><code>def f(x):\n    return x &lt; 2 and \"&lt;b&gt;\"</code></pre>", "<span>python</span>",
                 "<blockquote><p>quoted</p></blockquote>", "<th>a</th>", "<td>2</td>"]:
        assert part in html, (part, html)
    # The same in pieces, as it streams, and at once.
    script = """(async (text) => {
        const { renderMarkdown } = await import("./page/markdown.js");
        const grown = document.createElement("div");
        for (let end = 0; end <= text.length; end += 1) renderMarkdown(grown, text.slice(0, end));
        return grown.innerHTML;
    })"""
    assert tab.evaluate(f"{script}({json.dumps(MARKDOWN)})") == html


def hostile_text_stays_text(browser, server):
    tab = fresh(browser, server)
    title = tab.evaluate("document.title")
    render(tab, HOSTILE)
    count = "document.querySelectorAll('article :is(img, script, svg, iframe, object, [onerror], [onload])').length"
    assert tab.evaluate(count) == 0 and tab.evaluate("document.title") == title
    links = tab.evaluate("[...document.querySelectorAll('article a')].map(a => a.href)")
    assert links == ["https://example.org/x.png"], links
    assert "onerror" in tab.text(ANSWER) and "javascript:document.title" in tab.text(ANSWER)
    assert not tab.complaints(), tab.complaints()
    # What makes a careless parser slow: each takes a moment.
    for text in ["*a " * 30000, "[" * 60000, "`" * 30001 + " " + "`a" * 20000, "> " * 20000 + "x", "- " * 20000, "|" * 40000 + "\n|-" * 20000,
                 "_" * 50000, " " * 60000 + "|\n---" + " " * 60000 + "x", "[a](" * 20000, "**a *b " * 10000, "https://" * 10000]:
        took = tab.evaluate(f"""(async (text) => {{
            const {{ renderMarkdown }} = await import("./page/markdown.js");
            const start = performance.now();
            renderMarkdown(document.createElement("div"), text);
            return performance.now() - start;
        }})({json.dumps(text)})""")
        assert took < 2000, f"{took} ms for {text[:20]!r}..."


def number(tab, name):
    return tab.evaluate(f"document.querySelector('[data-number={name}]')?.textContent.replaceAll(',', '')")


def the_live_view_shows_what_the_metrics_say(browser, server):
    tab = open_page(browser, server, "live")
    # Longer than the view takes to show it, however fast the model; it ends when the client leaves.
    with server.client.completions.create(model="smollm2", prompt="One two three", max_tokens=900, stream=True,
                                          extra_body={"ignore_eos": True}) as reply:
        next(iter(reply))
        tab.until("document.querySelector('[data-number=running]')?.textContent === '1 of 16'")
        tab.until("Number(document.querySelector('[data-number=generated]').textContent) > 1")
        assert server.gauge("fullbore_requests_running") == 1
        tab.until("document.querySelector('[data-number=p50]').textContent.endsWith('ms')")
    until("the sequence to end", lambda: server.gauge("fullbore_requests_running") == 0)
    tab.until("document.querySelector('[data-number=running]').textContent === '0 of 16'")
    for state in ["used", "cached", "free"]:
        assert int(number(tab, state)) == server.gauge(f'fullbore_kv_blocks{{model_name="smollm2",state="{state}"}}'), state
    assert int(number(tab, "waiting")) == server.gauge("fullbore_requests_waiting") == 0
    limits = json.loads(server.get("/v1/limits")[1])
    tab.until(f"document.querySelector('.verdict .cause').classList.contains('{limits['limit']}')")
    shares = tab.evaluate("[...document.querySelectorAll('.legend li b')].map(b => parseFloat(b.textContent))")
    assert abs(sum(shares) - 100) < 1, shares
    # A late look sees what was before; pointing at a moment, or walking there by keys, shows its numbers.
    late = open_page(browser, server, "live")
    late.until("document.querySelectorAll('.band.computing')[0]?.getAttribute('d').length > 50")
    assert late.text(".axis") in ("1 min ago\nnow", "2 min ago\nnow", "3 min ago\nnow"), late.text(".axis")
    late.point(".time svg", 0.99)
    late.until("document.querySelector('.card .when').textContent.includes('ago')")
    late.point("header", 0.5)
    late.until("document.querySelector('.card .when').textContent === 'last minute'")
    late.evaluate("document.querySelector('.time svg').focus()")
    late.press("ArrowLeft")
    late.until("document.querySelector('.card .when').textContent.includes('ago')")
    assert not late.complaints(), late.complaints()


def it_is_light_or_dark(browser, server):
    tab = open_page(browser, server)
    tab.evaluate("localStorage.clear()")
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ["light", "dark"]:
        tab.prefer(scheme)
        seen[scheme] = tab.evaluate(ground)
    assert seen["light"] != seen["dark"], seen
    # The system says dark; the button says light, then dark, then what the system says.
    tab.click("#theme")
    assert tab.evaluate(ground) == seen["light"]
    tab.reload()
    tab.until(f"{ground} === '{seen['light']}' && document.querySelector('#theme').textContent === 'Theme: light'")
    tab.click("#theme")
    tab.prefer("light")
    assert tab.evaluate(ground) == seen["dark"]
    tab.click("#theme")
    assert tab.evaluate(ground) == seen["light"]


def a_key_is_asked_for(browser):
    with Server("sim", "--api-key", "a-key-of-the-test") as server:
        tab = browser.tab(f"{server.url}/#live")
        tab.until("!document.querySelector('#key-field').hidden")
        tab.until("document.querySelector('#live-note').textContent.includes('API key')")
        tab.click("#key")
        tab.type("a-key-of-the-test")
        tab.press("Enter")
        tab.until("document.querySelector('#model').textContent.includes('tokens of context')")
        tab.until("document.querySelector('#key-field').hidden && document.querySelector('.verdict') !== null")
        tab.click("#to-chat")
        tab.until("document.activeElement.id === 'prompt'")
        send(tab, "Say something.")
        tab.until(f"document.querySelector('{ANSWER} .note')?.textContent.includes('tokens')")
        tab.press("Escape")
        assert said(tab)[0] == ["user", "Say something."]


def a_model_is_chosen(browser):
    with Server("sim", "--model", "other=smollm2,max-model-len=512") as server:
        tab = fresh(browser, server)
        choose = "((name) => (document.querySelector('#models').value = name, document.querySelector('#models').dispatchEvent(new Event('change'))))"
        options = "[...document.querySelectorAll('#models option')].map(option => option.textContent)"
        assert tab.evaluate(options) == ["smollm2", "other"] and "1,024 tokens of context" in tab.text("#model")
        tab.evaluate(f"{choose}('other')")
        assert "other on" in tab.text("#model") and "512 tokens of context" in tab.text("#model"), tab.text("#model")
        send(tab, "Say something.")
        said(tab)
        assert "of 512 tokens of context" in tab.text("#context"), tab.text("#context")
        generated = lambda model: server.gauge(f'fullbore_tokens_generated_total{{model_name="{model}"}}')
        assert generated("other") > 0 and generated("smollm2") == 0
        # The choice is kept; and the live view has its own, of which all is one.
        tab.reload()
        tab.until("document.querySelector('#model').textContent.startsWith('other on')")
        tab.click("#to-live")
        shown = "[...document.querySelectorAll('.panel')].filter(panel => !panel.hidden).map(panel => panel.querySelector('h2').textContent.split(' ')[0])"
        tab.until(f"({shown}).length === 2")
        assert tab.evaluate(options) == ["all", "smollm2", "other"] and tab.text("#model") == "2 models"
        assert tab.evaluate(shown) == ["smollm2", "other"]
        tab.evaluate(f"{choose}('other')")
        assert tab.evaluate(shown) == ["other"] and "other on" in tab.text("#model")
        tab.click("#to-chat")
        assert tab.evaluate("document.querySelector('#models').value") == "other"
        assert not tab.complaints(), tab.complaints()


def errors_are_told(browser):
    with Server("sim") as server:
        tab = fresh(browser, server)
        send(tab, "word " * 5000)
        tab.until(f"document.querySelector('{ANSWER}.failed .note')?.textContent.includes('context')")
        tab.evaluate("localStorage.clear()")
        gone = server
    send(tab, "x")
    tab.until(f"document.querySelector('{ANSWER}.failed .note')?.textContent.includes('cannot be reached')")
    assert gone.process.returncode == 0


def screenshots(browser, server):
    """For the README: a conversation that the model had, and the live view while ever more clients chat."""
    tab = fresh(browser, server, max_completion_tokens="112")
    tab.call("Emulation.setDeviceMetricsOverride", width=1000, height=640, deviceScaleFactor=2, mobile=False)
    tab.prefer("light")
    send(tab, "Show Python code that prints the numbers from one to ten.")
    tab.until(IDLE, seconds=200)
    tab.screenshot(os.path.join(FOLDER, "page.png"))

    begun = time.monotonic()
    seconds, num_clients = 150, 14

    def client(index):
        """Comes when it is its turn, and talks on; its thoughts take a while."""
        time.sleep(7 * index)
        chance = random.Random(index)
        turn = 0
        while time.monotonic() < begun + seconds:
            turn += 1
            prompt = f"You are talking to customer {index} of a garden shop. " * 6 + f"Question {turn}: what grows well in the shade?"
            server.post("/v1/completions", {"prompt": prompt, "max_tokens": chance.randrange(40, 160), "ignore_eos": True})
            time.sleep(chance.uniform(0, 2))

    clients = [threading.Thread(target=client, args=(index,)) for index in range(num_clients)]
    [one.start() for one in clients]
    live = open_page(browser, server, "live", width=1200, height=850)
    live.call("Emulation.setDeviceMetricsOverride", width=1200, height=850, deviceScaleFactor=2, mobile=False)
    live.prefer("dark")
    time.sleep(seconds - 5)
    live.screenshot(os.path.join(FOLDER, "live.png"))
    [one.join() for one in clients]


ON_CPU = [a_message_is_answered_as_it_comes, an_answer_is_stopped, messages_are_edited_and_asked_again, settings_are_sent,
          markdown_is_rendered, hostile_text_stays_text, the_live_view_shows_what_the_metrics_say, it_is_light_or_dark]


def main():
    with Browser() as browser:
        with Server("cpu") as server:
            tests = [screenshots] if FOLDER else ON_CPU
            results = [run("page", functools.wraps(test)(functools.partial(test, browser)), server) for test in tests]
        if not FOLDER:
            results += [run("page", test, browser) for test in [a_key_is_asked_for, a_model_is_chosen, errors_are_told]]
    passed = sum(results)
    print(f"{passed} passed, {len(results) - passed} failed")
    sys.exit(0 if all(results) else 1)


main()
