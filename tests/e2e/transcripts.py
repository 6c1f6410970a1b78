"""End to end: what official clients are told, in every combination of what changes an answer's shape, against kept
transcripts.

    python3 tests/e2e/transcripts.py BINARY [--rewrite]

The device is the simulator, whose tokens are the same on every machine; calls in the formats of several templates come
from a tiny random model on the CPU, for the simulator knows no template but its own. Each client has a file of JSON lines in
tests/golden: one line a request, named by what was asked. Where a line differs, both are shown; with --rewrite they are
written anew, to be read in the diff before they are kept.

A stream is told by choice: pieces of several choices come in any order. What all chunks have in common is there once
(`chunks`); then come each choice's deltas, where a text stands for {"content": text}, and [0, text] for more of the
arguments of call 0.
"""

import difflib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import typing

import anthropic
import openai
import openai.types
import pydantic

from run import Server, run

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MOST_SHOWN = 3
SHORT, LONG, SEVERAL_CALLS = 3, 100, 300
# Texts are of these letters, for the simulator takes any token, and what ends them is among them, or half of a city.
LETTERS = "aeioulnrst"
STOPS = ["nt", "re", "Os"]
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}
WEATHER = {"name": "weather", "description": "The weather in a city."}
TIME = {"name": "time", "description": "The time."}
FORMS = {"text": {"type": "text"}, "json_object": {"type": "json_object"},
         "json_schema": {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": CITY}}}
# What a template is known by, of formats whose calls are no JSON between a pair of marks each.
FORMATS = {"qwen-coder": "<tool_call><function=name><parameter=key>", "glm": "<tool_call>name<arg_key>",
           "seed": "<seed:tool_call><function=name><parameter=key>", "minimax": '<minimax:tool_call><invoke name="name">',
           "nemotron": "<TOOLCALL>[", "apriel": "<tool_calls>[", "lfm": "<|tool_call_start|>[", "python": "[func_name1(",
           "hermes": "<tool_call>"}
# Of the tiny tokenizers: one has a call's mark in its place, so that a model that knows nothing may begin one.
RESERVED = "<|reserved_0|>"
STREAMS = {"whole": {}, "stream": {"stream": True},
           "stream with usage": {"stream": True, "stream_options": {"include_usage": True}}}


def product(*axes):
    """Of axes, each {word: fields}: (the words, the fields) of every combination."""
    for combination in itertools.product(*(axis.items() for axis in axes)):
        words = ", ".join(word for word, _ in combination if word)
        yield words, {name: value for _, fields in combination for name, value in fields.items()}


def chat_cases(letters_alone):
    choose = {name: {"tool_choice": name} for name in ["none", "auto", "required"]}
    choose["named"] = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    choose["required parallel"] = {"tool_choice": "required", "parallel_tool_calls": True}
    tools = [{"type": "function", "function": {**WEATHER, "parameters": CITY, "strict": True}}, {"type": "function", "function": TIME}]
    same = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "tools": tools,
            "parallel_tool_calls": False, "temperature": 1, "seed": 5, "model": "smollm2"}
    for tool_choice, fields in choose.items():
        # What is forced to be a call has no other form.
        forms = FORMS if tool_choice in ("none", "auto") else {"text": FORMS["text"]}
        long = SEVERAL_CALLS if tool_choice == "required parallel" else LONG
        for words, more in product(STREAMS, {form: {"response_format": value} for form, value in forms.items()},
                                   {f"n {n}": {"n": n} for n in (1, 2)}, {"": {}, "stop": {"stop": STOPS}},
                                   {f"{most} tokens": {"max_tokens": most} for most in (SHORT, long)}):
            is_text = tool_choice in ("none", "auto") and more["response_format"]["type"] == "text"
            yield f"chat, tools {tool_choice}, {words}", {**same, **fields, **more, **(letters_alone if is_text else {})}


def completion_cases(letters_alone):
    same = {"prompt": "One two three", "temperature": 1, "seed": 5, "model": "smollm2"}
    for words, more in product(STREAMS, {f"n {n}": {"n": n} for n in (1, 2)}, {"": {}, "stop": {"stop": STOPS}}, {"": {}, "echo": {"echo": True}},
                               {f"{most} tokens": {"max_tokens": most} for most in (SHORT, LONG)}):
        yield f"completion, {words}", {**same, **more, **letters_alone}


def response_cases(letters_alone):
    choose = {name: {"tool_choice": name} for name in ["none", "auto", "required"]}
    choose["named"] = {"tool_choice": {"type": "function", "name": "weather"}}
    tools = [{"type": "function", **WEATHER, "parameters": CITY, "strict": True}]
    same = {"input": "What is the weather in Oslo?", "tools": tools, "parallel_tool_calls": False, "temperature": 0, "store": False,
            "model": "smollm2"}
    streams = {"whole": {}, "stream": {"stream": True}}
    for words, more in product({f"tools {name}": fields for name, fields in choose.items()}, streams,
                               {f"{most} tokens": {"max_output_tokens": most} for most in (16, LONG)}):
        is_text = more["tool_choice"] in ("none", "auto")
        yield f"response, {words}", {**same, **more, **(letters_alone if is_text else {})}
    schema = {"format": {"type": "json_schema", "name": "place", "strict": True, "schema": CITY}}
    for words, more in product(streams):
        yield f"response, json_schema, {words}", {**same, **more, "tools": [], "text": schema, "max_output_tokens": LONG}


def message_cases(letters_alone):
    choose = {name: {"tool_choice": {"type": name}} for name in ["none", "auto", "any"]}
    choose["tool"] = {"tool_choice": {"type": "tool", "name": "weather"}}
    tools = [{**WEATHER, "input_schema": CITY}]
    same = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "tools": tools, "model": "smollm2"}
    for words, more in product({f"tools {name}": fields for name, fields in choose.items()}, {"whole": {}, "stream": {"stream": True}},
                               {"": {}, "stop": {"stop_sequences": STOPS}},
                               {f"{most} tokens": {"max_tokens": most} for most in (SHORT, LONG)}):
        is_text = more["tool_choice"]["type"] in ("none", "auto")
        yield f"message, {words}", {**same, **more, **(letters_alone if is_text else {})}


def letters_alone(server):
    """A field that clients do not know, and send all the same."""
    told = server.post("/tokenize", {"prompt": LETTERS, "add_special_tokens": False})[1]
    return {"allowed_token_ids": json.loads(told)["tokens"]}


def openai_cases(server):
    kinds = [("chat", chat_cases), ("completions", completion_cases), ("responses", response_cases)]
    letters = letters_alone(server)
    return [{"name": name, "endpoint": endpoint, "body": body} for endpoint, cases in kinds for name, body in cases(letters)]


def for_python(body, **extra):
    """What its functions take by name, and what they do not know."""
    own = {name: value for name, value in body.items() if name != "allowed_token_ids"}
    return {**own, "extra_body": {**{name: value for name, value in body.items() if name not in own}, **extra}}


class OfAllChunks(dict):
    """Fields that every chunk of a stream has alike."""

    def take(self, chunk):
        for name, value in chunk.items():
            assert self.setdefault(name, value) == value, (name, value, self)
        assert self.keys() == chunk.keys(), (chunk, self)


def plain(value):
    """Without what is another each time, after a look at its form."""
    if isinstance(value, dict):
        for name in ("created", "created_at"):
            if name in value:
                assert abs(value[name] - time.time()) < 300, value
                value = {**value, name: 0}
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"^(chatcmpl-|cmpl-|call_|toolu_|resp_|msg_|fc_|rs_)[0-9a-f]{16,24}$", r"\1*", value)
    return value


def short_delta(choice):
    """A choice's chunk, as short as it can be told."""
    # A completion's text is told as a chat's.
    delta = choice.pop("delta") if "delta" in choice else {"content": choice.pop("text")}
    assert choice.pop("logprobs", None) is None, choice
    if choice["finish_reason"] is not None:
        return {**delta, **choice}
    match delta:
        case {"content": str(text), **rest} if not rest:
            return text
        case {"tool_calls": [{"index": int(index), "function": {"arguments": str(more), **name}, **begin}], **rest} if not (name or begin or rest):
            return [index, more]
    return delta


def stream_of_choices(chunks):
    """What a stream of chats or completions tells; and that the rest is as it must be."""
    of_all, choices, usage = OfAllChunks(), {}, None
    ids = {chunk["id"] for chunk in chunks}
    assert len(ids) == 1, ids
    for place, chunk in enumerate(plain(chunks)):
        mine = chunk.pop("choices")
        if not mine:
            assert place + 1 == len(chunks), "usage comes last of all"
            usage = chunk.pop("usage")
            continue
        [choice] = mine
        of_all.take(chunk)
        told = choices.setdefault(choice.pop("index"), [])
        assert not told or not (isinstance(told[-1], dict) and "finish_reason" in told[-1]), "a chunk after the last"
        told.append(short_delta(choice))
    assert all("finish_reason" in told[-1] for told in choices.values()), choices
    answer = {"chunks": of_all, "choices": [choices[index] for index in sorted(choices)]}
    return {**answer, "usage": usage} if usage else answer


def stream_of_events(events):
    """What a stream of responses or messages tells: each event's kind and what is its own; a whole response is told
    once, by the last."""
    told = []
    for place, event in enumerate(events):
        number = event.pop("sequence_number", place)
        assert number == place, (number, place)
    for event in plain(events):
        kind = event.pop("type")
        if kind in ("response.created", "response.in_progress"):
            event = {"status": event["response"]["status"]}
        delta = event.get("delta")
        told.append([kind, delta] if isinstance(delta, str) else [kind, event] if event else [kind])
    return {"events": told}


def transcript(name, body, answers):
    if not body.get("stream"):
        [answer] = answers
        return {"asked": name, **plain(answer)}
    is_choices = "choices" in answers[0]
    return {"asked": name, **(stream_of_choices(answers) if is_choices else stream_of_events(answers))}


def strictly(model):
    """What a client's object was made from; the official type takes it, which the client itself does not check."""
    told = model.model_dump(mode="json", exclude_unset=True, by_alias=True)
    # Of a completion's chunk there is no type of its own: a whole one's must have a reason.
    if not (isinstance(model, openai.types.Completion) and any(choice.finish_reason is None for choice in model.choices)):
        pydantic.TypeAdapter(type(model)).validate_python(told)
    return told


def openai_python(server):
    create = {"chat": server.client.chat.completions.create, "completions": server.client.completions.create,
              "responses": server.client.responses.create}
    for case in openai_cases(server):
        answer = create[case["endpoint"]](**for_python(case["body"]))
        answers = [strictly(part) for part in (answer if case["body"].get("stream") else [answer])]
        yield transcript(case["name"], case["body"], answers)


def openai_javascript(server):
    script = os.path.join(os.environ["FULLBORE_NODE"], "transcripts.mjs")
    cases = openai_cases(server)
    done = subprocess.run(["node", script, server.url], input=json.dumps(cases), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        yield transcript(case["name"], case["body"], json.loads(line))


def anthropic_python(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    for name, body in message_cases(letters_alone(server)):
        answer = client.messages.create(**for_python(body, temperature=0))
        answers = [strictly(part) for part in (answer if body.get("stream") else [answer])]
        yield transcript(name, body, answers)


class Forecast(pydantic.BaseModel):
    """A function's arguments, of every kind that a random model comes to an end of."""

    city: typing.Literal["Rome", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)
    hourly: bool
    unit: typing.Literal["C", "F"] | None
    hours: list[typing.Literal[6, 18]] = pydantic.Field(max_length=2)


def with_formats(folder):
    """Arguments of a server of a tiny model whose template is another each time."""
    tiny = GOLDEN / "tiny" / "qwen3"
    for name, mark in FORMATS.items():
        model = pathlib.Path(folder, name)
        shutil.copytree(tiny, model)
        config = json.loads((tiny / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
        told = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{# " + mark + " #}"
        (model / "chat_template.jinja").write_text(told + (tiny / "chat_template.jinja").read_text())
        if name == "hermes":
            (model / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text().replace(RESERVED, "<tool_call>"))
        yield from ("--model", f"{name}={model},max-model-len=2048,kv-memory=8MiB")


def openai_formats(server):
    """Calls of every format, forced, and the model's own where their mark is a token: the client's own reader takes their
    arguments, whole and streamed."""
    tool = openai.pydantic_function_tool(Forecast, name="forecast")
    tokens = json.loads((GOLDEN / "tiny" / "qwen3" / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    for name in FORMATS:
        body = {"model": name, "messages": [{"role": "user", "content": "How will it be in Oslo?"}], "tools": [tool],
                "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 5, "max_tokens": 400}
        if name == "hermes":
            # It begins a call as soon as it may, and ends as soon as it may where it may not.
            body |= {"tool_choice": "auto", "logit_bias": {str(ids[RESERVED]): 100, str(ids["<|im_end|>"]): 50}}
        whole = server.client.chat.completions.create(**body)
        yield transcript(f"{name}, whole", body, [strictly(whole)])
        chunks = server.client.chat.completions.create(**body, stream=True)
        yield transcript(f"{name}, stream", {**body, "stream": True}, [strictly(chunk) for chunk in chunks])
        with server.client.chat.completions.stream(**body) as stream:
            streamed = stream.get_final_completion()
        [expected] = whole.choices[0].message.tool_calls
        for completion in [server.client.chat.completions.parse(**body), streamed]:
            [call] = completion.choices[0].message.tool_calls
            forecast = call.function.parsed_arguments
            assert isinstance(forecast, Forecast), completion
            assert forecast.model_dump() == json.loads(expected.function.arguments), (forecast, expected)


def added_up(answer):
    """What a stream of choices adds up to: (text, calls, reason) of each."""
    for told in answer["choices"]:
        text, calls, reason = "", [], None
        for delta in told:
            match delta:
                case str():
                    text += delta
                case [index, more]:
                    calls[index]["arguments"] += more
                case _:
                    text += delta.get("content") or ""
                    for call in delta.get("tool_calls", []):
                        if "id" in call:
                            calls.append({"id": call["id"], **call["function"]})
                        else:
                            calls[call["index"]]["arguments"] += call["function"]["arguments"]
                    reason = delta.get("finish_reason")
        yield text, calls, reason


def whole_choices(answer):
    for choice in answer["choices"]:
        message = choice.get("message") or {"content": choice.get("text")}
        calls = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls") or []]
        yield message["content"] or "", calls, choice["finish_reason"]


def check_sums(lines):
    """A stream adds up to the whole answer, with the same usage, and usage is told only where it was asked for."""
    whole = {line["asked"]: line for line in lines if "choices" in line and "chunks" not in line}
    for line in lines:
        if "chunks" not in line:
            continue
        wants_usage = "stream with usage" in line["asked"]
        same = whole[line["asked"].replace("stream with usage" if wants_usage else "stream", "whole", 1)]
        assert list(added_up(line)) == list(whole_choices(same)), (line, same)
        assert line.get("usage") == (same["usage"] if wants_usage else None), (line, same)


def difference(expected, got):
    text = lambda line: json.dumps(line, indent=1, ensure_ascii=False).splitlines()
    return "\n".join(difflib.unified_diff(text(expected), text(got), "kept", "now", lineterm=""))


def check(client, server):
    lines = list(client(server))
    assert len({line["asked"] for line in lines}) == len(lines), "two of one name"
    check_sums(lines)
    path = GOLDEN / f"{client.__name__.replace('_', '-')}.jsonl"
    if "--rewrite" in sys.argv:
        path.write_text("".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines))
    kept = {line["asked"]: line for line in map(json.loads, path.read_text().splitlines())}
    now = {line["asked"]: line for line in lines}
    assert kept.keys() == now.keys(), f"{path.name} has other requests: {sorted(kept.keys() ^ now.keys())}"
    differing = [name for name in now if kept[name] != now[name]]
    shown = "\n\n".join(f"{name}:\n{difference(kept[name], now[name])}" for name in differing[:MOST_SHOWN])
    assert not differing, (f"{len(differing)} of {len(now)} answers are not as {path.name} has them (scripts/e2e.sh --rewrite writes "
                           f"it anew); the first:\n\n{shown}")


def main():
    with Server("sim", "--no-prefix-cache") as server:
        results = [run(client.__name__, check, client, server) for client in [openai_python, openai_javascript, anthropic_python]]
    with tempfile.TemporaryDirectory() as folder, Server("cpu", *with_formats(folder)) as server:
        results.append(run(openai_formats.__name__, check, openai_formats, server))
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(0 if all(results) else 1)


main()
