"""Official clients of other dialects than chats and completions, against a running server: each function is a test."""

import json
import os
import subprocess

import anthropic
import langchain_core.messages
import langchain_openai
import openai
import pydantic

ASK = [{"role": "user", "content": "Name three primary colours."}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"],
           "additionalProperties": False}


class Colour(pydantic.BaseModel):
    shade: int


def responses_are_as_openai_has_them(server):
    ask = {"model": "smollm2", "input": "Name three primary colours.", "max_output_tokens": 16, "temperature": 0, "store": False}
    # Once before, so that the prefix cache has the prompt for both.
    server.client.responses.create(**ask)
    whole = server.client.responses.create(**ask)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens", whole
    with server.client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-1] == "response.incomplete" and "response.output_text.done" in kinds, kinds
    text = "".join(event.delta for event in server.client.responses.create(**ask, stream=True)
                   if event.type == "response.output_text.delta")
    assert text == whole.output_text, (text, whole)
    ask_logprobs = {**ask, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    told = server.client.responses.create(**ask_logprobs)
    [content] = told.output[0].content
    assert told.top_logprobs == 2 and "".join(token.token for token in content.logprobs) == whole.output_text, told
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.logprob for token in content.logprobs), told
    events = list(server.client.responses.create(**ask_logprobs, stream=True))
    deltas = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    [done] = [event.logprobs for event in events if event.type == "response.output_text.done"]
    assert [token.token for token in deltas] == [token.token for token in content.logprobs], deltas
    assert [token.logprob for token in deltas] == [token.logprob for token in done], done
    for model in [told, *events]:
        pydantic.TypeAdapter(type(model)).validate_python(model.model_dump(mode="json", exclude_unset=True, by_alias=True))
    parsed = server.client.responses.parse(**{**ask, "max_output_tokens": 60}, text_format=Colour)
    assert isinstance(parsed.output_parsed, Colour), parsed
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    called = server.client.responses.create(**{**ask, "max_output_tokens": 120}, tools=[tool], tool_choice="required",
                                            parallel_tool_calls=False)
    call = called.output[0]
    assert called.status == "completed" and json.loads(call.arguments)["city"] in ("Rome", "Oslo"), called
    history = [*ASK, call, {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}]
    assert server.client.responses.create(**{**ask, "input": history}, tools=[tool], tool_choice="none").output_text
    try:
        server.client.responses.create(**ask, previous_response_id=called.id)
        raise AssertionError("what is not kept was taken")
    except openai.BadRequestError as error:
        assert error.param == "previous_response_id", error


def messages_are_as_anthropic_has_them(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    ask = {"model": "smollm2", "messages": ASK, "max_tokens": 16, "system": "Be brief.", "extra_body": {"temperature": 0}}
    client.messages.create(**ask)
    whole = client.messages.create(**ask)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 16, whole
    with client.messages.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert streamed.content[0].text == whole.content[0].text and streamed.stop_reason == whole.stop_reason, streamed
    assert streamed.usage.input_tokens == whole.usage.input_tokens and streamed.usage.output_tokens == 16, streamed
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds
    counted = client.messages.count_tokens(model="smollm2", messages=ASK, system="Be brief.").input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens, (counted, whole)
    tool = {"name": "weather", "description": "The weather in a city.", "input_schema": WEATHER}
    ask = {**ask, "max_tokens": 120, "tools": [tool]}
    for choice in [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]:
        with client.messages.stream(**ask, tool_choice=choice) as stream:
            called = stream.get_final_message()
        [call] = called.content
        assert called.stop_reason == "tool_use" and call.input["city"] in ("Rome", "Oslo"), called
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    history = [*ASK, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    said = client.messages.create(**{**ask, "messages": history, "max_tokens": 8}, tool_choice={"type": "none"})
    assert said.content[0].type == "text", said
    for change, error in [({"model": "nope"}, anthropic.NotFoundError), ({"max_tokens": 1024}, anthropic.BadRequestError)]:
        try:
            client.messages.create(**{**ask, **change})
            raise AssertionError(f"{change} was taken")
        except error as refused:
            assert refused.body["type"] == "error" and refused.body["error"]["message"], refused.body


def langchain_speaks_to_it(server):
    model = langchain_openai.ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="smollm2", max_tokens=16,
                                        temperature=0, max_retries=0)
    whole = model.invoke("Name three primary colours.")
    streamed = list(model.stream("Name three primary colours."))
    assert "".join(part.text for part in streamed) == whole.text, (streamed, whole)
    assert whole.usage_metadata["output_tokens"] == 16, whole
    longer = model.model_copy(update={"max_tokens": 120})
    shaped = longer.with_structured_output(Colour, method="json_schema").invoke("Name a shade, as JSON.")
    assert isinstance(shaped, Colour), shaped
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}}
    called = longer.bind_tools([tool], tool_choice="weather").invoke("The weather in Rome?")
    [call] = called.tool_calls
    assert call["args"]["city"] in ("Rome", "Oslo"), called
    result = langchain_core.messages.ToolMessage("Sunny.", tool_call_id=call["id"])
    assert model.invoke([("user", "The weather in Rome?"), called, result]).text


def embeddings_are_vectors(server):
    texts = ["A cat sat on the mat.", "A cat sat on a mat.", "Interest rates rose again."]
    # This client asks for base64 unless told otherwise.
    short = server.client.embeddings.create(model="smollm2", input=texts)
    plain = server.client.embeddings.create(model="smollm2", input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in plain.data]
    assert [entry.embedding for entry in short.data] == vectors and short.usage == plain.usage, short.usage
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    assert all(abs(dot(vector, vector) - 1) < 1e-5 for vector in vectors)
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]), "nearness says nothing"
    model = langchain_openai.OpenAIEmbeddings(base_url=server.url + "/v1", api_key="none", model="smollm2",
                                              check_embedding_ctx_length=False)
    assert model.embed_documents(texts) == vectors


def javascript_speaks_to_it(server):
    script = os.path.join(os.environ["FULLBORE_NODE"], "openai.mjs")
    done = subprocess.run(["node", script, server.url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done


TESTS = [responses_are_as_openai_has_them, messages_are_as_anthropic_has_them, langchain_speaks_to_it,
         embeddings_are_vectors, javascript_speaks_to_it]
