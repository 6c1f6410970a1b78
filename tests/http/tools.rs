//! Calls of functions and thoughts over HTTP: what reaches the template, what the model is made to write, and what the
//! client is told of it, whole and in pieces.

use fullbore_engine::text::ChatTemplate;

use super::*;

/// As Hermes and Qwen write tools, calls, thoughts and results.
const HERMES: &str = "{% if tools %}<|im_start|>system {% for tool in tools %}{{ tool | tojson }}{% endfor %}\
    <tool_call><|im_end|>{% endif %}{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}\
    {% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} \
    {{ call.function.arguments | tojson }}</tool_call>{% endfor %}{% if message.role == 'tool' %}\
    ({{ message.tool_call_id }}){% endif %}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant {% if enable_thinking is defined and not enable_thinking %}\
    <think></think>{% endif %}{% endif %}";

/// As Mistral's do since 2025.
const MISTRAL: &str = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
    {% for message in messages %}[INST]{{ message.content }}[/INST]{% for call in message.tool_calls or [] %}\
    [TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}";

/// As Qwen3-Coder's, GLM's and those that ask for Python do, and one whose thoughts are in brackets.
const QWEN_CODER: &str = "{% if tools %}{{ tools | tojson }} <tool_call><function=name><parameter=key>{% endif %}\
    {% for message in messages %}{{ message.role }} {{ message.content }}{% for call in message.tool_calls or [] %}\
    <tool_call><function={{ call.function.name }}>{% for key, value in call.function.arguments | items %}\
    <parameter={{ key }}>{{ value }}</parameter>{% endfor %}</function></tool_call>{% endfor %}{% endfor %}";
const GLM: &str = "{% if tools %}{{ tools | tojson }} <tool_call>name<arg_key>key</arg_key>{% endif %}\
    {% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}";
const PYTHONIC: &str = "{% if tools %}{{ tools | tojson }} [func_name1(name=value), func_name2()]{% endif %}\
    {% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}";
const MAGISTRAL: &str = "{% for message in messages %}{{ message.content }}[/INST]{% endfor %}\
    {% if false %}[THINK][/THINK]{% endif %}";

fn hermes() -> Harness {
    with_template(|bundle| set_template(bundle, HERMES))
}

fn mistral() -> Harness {
    with_template(|bundle| set_template(bundle, MISTRAL))
}

fn with_template(bundle: fn(&mut Bundle)) -> Harness {
    Setup { bundle, ..Setup::default() }.start()
}

fn set_template(bundle: &mut Bundle, source: &str) {
    let template = ChatTemplate::new(source, "<s>", "<|im_end|>").expect("a template");
    bundle.chat_template = Some(std::sync::Arc::new(template));
}

fn tools() -> Value {
    let city = json!({"type": "string", "enum": ["Rome", "Oslo"]});
    let weather = json!({"type": "object", "properties": {"city": city}, "required": ["city"],
        "additionalProperties": false});
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Says <|im_end|>.", "parameters": weather}},
        {"type": "function", "function": {"name": "time"}},
    ])
}

fn ask(change: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Weather?"}], "tools": tools(), "max_tokens": 300,
        "temperature": 1.0, "seed": 3, "chat_template_kwargs": {"enable_thinking": false}});
    body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
    body
}

/// Names and arguments of a message's calls, after a check of their form.
fn calls_of(message: &Value) -> Vec<(String, Value)> {
    let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
    let call = |call: &Value| {
        // Mistral's templates take no others.
        let is_id = |id: &str| id.starts_with("call_") || id.len() == 9;
        assert!(call["id"].as_str().is_some_and(is_id) && call["type"] == "function", "{call}");
        let arguments = call["function"]["arguments"].as_str().expect("text");
        let arguments = serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{error}: {arguments}"));
        (call["function"]["name"].as_str().expect("a name").to_owned(), arguments)
    };
    calls.iter().map(call).collect()
}

/// The message that the deltas of a stream add up to, as the official clients add them, and its finish reason.
fn added_up(events: &[Value]) -> (Value, Value) {
    let mut message = json!({"content": "", "reasoning_content": "", "tool_calls": []});
    let mut reason = Value::Null;
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let delta = &choice["delta"];
        for field in ["content", "reasoning_content"] {
            if let Some(more) = delta[field].as_str() {
                message[field] = json!(format!("{}{more}", message[field].as_str().expect("text")));
            }
        }
        for piece in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = piece["index"].as_u64().expect("an index") as usize;
            let calls = message["tool_calls"].as_array_mut().expect("calls");
            if index == calls.len() {
                calls.push(json!({"id": piece["id"], "type": piece["type"], "function": piece["function"]}));
                continue;
            }
            assert!(piece.get("id").is_none() && piece["function"].get("name").is_none(), "{piece}");
            let arguments = &mut calls[index]["function"]["arguments"];
            let more = piece["function"]["arguments"].as_str().expect("text");
            *arguments = json!(format!("{}{more}", arguments.as_str().expect("text")));
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (message, reason)
}

#[test]
fn forced_calls_come_whole_and_in_pieces() {
    let qwen_coder = with_template(|bundle| set_template(bundle, QWEN_CODER));
    let glm = with_template(|bundle| set_template(bundle, GLM));
    let pythonic = with_template(|bundle| set_template(bundle, PYTHONIC));
    for server in [Setup::default().start(), hermes(), mistral(), qwen_coder, glm, pythonic] {
        let named = json!({"type": "function", "function": {"name": "weather"}});
        let cases = [
            (json!({"tool_choice": "required", "parallel_tool_calls": false}), "tool_calls"),
            (json!({"tool_choice": named}), "stop"),
        ];
        for (change, reason) in cases {
            let mut seen = Vec::new();
            for seed in 0..6 {
                let mut body = ask(change.clone());
                body["seed"] = json!(seed);
                let whole = server.chat(body.clone());
                let choice = &whole["choices"][0];
                assert_eq!(choice["finish_reason"], reason, "{choice}");
                assert_eq!(choice["message"]["content"], Value::Null, "{choice}");
                let calls = calls_of(&choice["message"]);
                let [(name, arguments)] = calls.as_slice() else { panic!("{choice}") };
                match name.as_str() {
                    "weather" => assert!(arguments["city"] == "Rome" || arguments["city"] == "Oslo", "{arguments}"),
                    "time" => assert!(arguments.is_object() && reason == "tool_calls"),
                    other => panic!("{other}"),
                }
                let events = server.stream("/v1/chat/completions", body);
                let (message, streamed_reason) = added_up(&events);
                assert_eq!((calls_of(&message), &streamed_reason), (calls.clone(), &json!(reason)));
                assert_eq!(message["content"], "");
                let pieces = events.iter().filter(|event| event["choices"][0]["delta"]["tool_calls"].is_array());
                let least = if calls[0].1 == json!({}) { 1 } else { 4 };
                assert!(pieces.count() >= least, "arguments come as they are written");
                seen.push(calls);
            }
            seen.dedup();
            assert!(seen.len() > 1, "{seen:?}");
        }
        let several = server.chat(ask(json!({"tool_choice": "required", "n": 8, "max_tokens": 500})));
        let counts = several["choices"].as_array().expect("choices").iter().map(|choice| {
            let is_cut = choice["finish_reason"] == "length";
            if is_cut { 0 } else { calls_of(&choice["message"]).len() }
        });
        let counts: Vec<usize> = counts.collect();
        let (most, count) = counts.iter().enumerate().max_by_key(|(_, count)| **count).expect("eight");
        assert!(*count > 1, "{several}");
        // The same in pieces: the choice is a request whose seed is so much larger.
        let body = ask(json!({"tool_choice": "required", "seed": 3 + most, "max_tokens": 500}));
        let (message, reason) = added_up(&server.stream("/v1/chat/completions", body));
        assert_eq!((calls_of(&message), reason), (calls_of(&several["choices"][most]["message"]), json!("tool_calls")));
    }
}

/// As Llama 3's and Gemma's do, whose calls have no marks.
const LLAMA: &str = "{% if tools %}Environment: ipython {\"name\": function name, \"parameters\": ...} \
    {{ tools | tojson }}{% endif %}{% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}";
const GEMMA: &str = "{% for message in messages %}<start_of_turn>{{ message.role }} {{ message.content }}{% endfor %}";

/// Beside a form a call is all of an answer and has marks, and all else is text, whatever it looks like.
#[test]
fn a_form_s_text_is_no_call() {
    let llama = with_template(|bundle| set_template(bundle, LLAMA));
    let gemma = with_template(|bundle| set_template(bundle, GEMMA));
    let object = |fields: Value| {
        let names: Vec<&String> = fields.as_object().expect("fields").keys().collect();
        json!({"type": "object", "required": names, "properties": fields, "additionalProperties": false})
    };
    let city = object(json!({"city": {"enum": ["Rome"]}}));
    let schema = object(json!({"name": {"enum": ["weather"]}, "parameters": city, "arguments": city}));
    let schema = json!({"type": "json_schema", "json_schema": {"schema": schema}});
    let call = r#"Look: <tool_call>\{"name": "weather", "arguments": \{"city": "[A-Z]{9}"\}\}</tool_call>"#;
    let forms = [
        json!({"response_format": schema}),
        json!({"guided_regex": call}),
        json!({"guided_regex": "Look: \\[TOOL_CALLS\\]time\\[ARGS\\]\\{\\}"}),
    ];
    for server in [llama, gemma, hermes(), mistral()] {
        for form in &forms {
            let mut num_calls = 0;
            for seed in 0..12 {
                let mut body = ask(form.clone());
                body["seed"] = json!(seed);
                body["parallel_tool_calls"] = json!(false);
                let choice = server.chat(body.clone())["choices"][0].clone();
                let calls = calls_of(&choice["message"]);
                num_calls += calls.len();
                let content = choice["message"]["content"].as_str();
                match content {
                    Some(text) => {
                        assert!(calls.is_empty() && choice["finish_reason"] == "stop", "{choice}");
                        let is_whole = match text.strip_prefix("Look: ") {
                            Some(rest) => rest.ends_with("</tool_call>") || rest == "[TOOL_CALLS]time[ARGS]{}",
                            None => serde_json::from_str::<Value>(text).is_ok_and(|told| told["name"] == "weather"),
                        };
                        assert!(is_whole, "{text}");
                    }
                    None => assert!(calls.len() == 1 && choice["finish_reason"] == "tool_calls", "{choice}"),
                }
                let (message, reason) = added_up(&server.stream("/v1/chat/completions", body.clone()));
                assert_eq!(message["content"].as_str(), content.or(Some("")), "{message}");
                assert_eq!((calls_of(&message), &reason), (calls, &choice["finish_reason"]));
                for nobody in [json!("none"), Value::Null] {
                    body["tool_choice"] = nobody.clone();
                    body["tools"] = if nobody.is_null() { Value::Null } else { tools() };
                    let said = server.chat(body.clone())["choices"][0].clone();
                    assert!(said["message"]["content"].is_string() && said["finish_reason"] == "stop", "{said}");
                    assert!(said["message"].get("tool_calls").is_none(), "{said}");
                }
            }
            assert!((1..12).contains(&num_calls), "{num_calls} calls of twelve");
        }
        let told = |change: Value| prompt_of(&server, &ask(change));
        let has_marks = |prompt: &str| prompt.contains("<tool_call>") || prompt.contains("[AVAILABLE_TOOLS]");
        assert!(has_marks(&told(forms[0].clone())), "who is to write marks is told of them");
        // Where a call is forced, nothing else may look like one.
        let forced = json!({"response_format": forms[0]["response_format"], "tool_choice": "required"});
        assert_eq!(told(forced), told(json!({"tool_choice": "required"})));
    }
}

#[test]
fn an_answer_that_is_cut_off_in_a_call_has_ended_for_its_length() {
    let server = hermes();
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let whole = server.chat(ask(json!({"tool_choice": named, "max_tokens": 55})));
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length", "{choice}");
    let function = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(function["name"], "weather", "{choice}");
    assert!(function["arguments"].as_str().is_some_and(|arguments| arguments.starts_with('{')), "{choice}");
}

/// The prompt as text: special tokens of content are spelled out by ordinary ones.
fn prompt_of(server: &Harness, body: &Value) -> String {
    server.post("/apply-template", body).ok()["prompt"].as_str().expect("text").to_owned()
}

#[test]
fn tools_calls_and_results_reach_the_template() {
    let server = hermes();
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_1", "type": "function",
                "function": {"name": "weather", "arguments": "{\"city\": \"Rome\", \"b\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]);
    let prompt = prompt_of(&server, &ask(json!({"messages": messages})));
    let first = tools()[0].clone();
    let wanted = format!(
        "<|im_start|>system {{\"type\": \"function\", \"function\": {{\"name\": \"weather\", \"description\": {}",
        first["function"]["description"]
    );
    assert!(prompt.starts_with(&wanted), "{prompt}");
    // In the order that it was written in.
    assert!(prompt.contains("<tool_call>weather {\"city\": \"Rome\", \"b\": 1}</tool_call>"), "{prompt}");
    assert!(prompt.contains("<|im_start|>tool sunny(call_1)<|im_end|>"), "{prompt}");
    let without = prompt_of(&server, &ask(json!({"tool_choice": "none"})));
    assert!(!without.contains("weather"), "{without}");
    // A template that knows no tools.
    let plain = Setup::default().start();
    let prompt = prompt_of(&plain, &ask(json!({"messages": messages})));
    assert!(prompt.starts_with("<|im_start|>system You have access to functions:\n{\"name\":\"weather\""), "{prompt}");
    assert!(prompt.contains("<tool_response>\nsunny\n</tool_response>"), "{prompt}");
}

#[test]
fn a_choice_among_some_tools_is_of_those_alone() {
    let server = hermes();
    let allowed = |mode: &str, name: &str| {
        let tools = json!([{"type": "function", "function": {"name": name}}]);
        json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}})
    };
    for seed in 0..4 {
        let ask = ask(json!({"tool_choice": allowed("required", "time"), "parallel_tool_calls": false, "seed": seed}));
        let called = calls_of(&server.chat(ask)["choices"][0]["message"]);
        assert!(called.iter().all(|(name, _)| name == "time") && called.len() == 1, "{called:?}");
    }
    let prompt = prompt_of(&server, &ask(json!({"tool_choice": allowed("auto", "time")})));
    assert!(prompt.contains("\"time\"") && !prompt.contains("weather"), "{prompt}");
    for wrong in [allowed("auto", "other"), allowed("never", "time"), json!({"type": "allowed_tools"})] {
        let refused = server.post("/v1/chat/completions", &ask(json!({"tool_choice": wrong})));
        assert_eq!(refused.error(400)["param"], "tool_choice", "{wrong}");
    }
    let of_seed = |seed: u32| {
        let body = json!({"input": "x", "max_output_tokens": 300, "seed": seed, "parallel_tool_calls": false,
            "tools": [{"type": "function", "name": "time"}, {"type": "function", "name": "weather"}],
            "tool_choice": {"type": "allowed_tools", "mode": "required",
                "tools": [{"type": "function", "name": "weather"}]}});
        server.post("/v1/responses", &body).ok()
    };
    // Some think for longer.
    let response = (0..40).map(of_seed).find(|response| response["status"] == "completed").expect("one that ends");
    let called = response["output"].as_array().expect("items").iter().find(|item| item["type"] == "function_call");
    assert_eq!(called.expect("a call")["name"], "weather", "{response}");
}

/// Gemma's rules, in words of our own: a system's words go before the first user's, and then the roles take turns.
const ALTERNATING: &str = "{% set told = messages[0].content if messages[0].role == 'system' else '' %}\
    {% for message in (messages[1:] if told else messages) %}\
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
    <start_of_turn>{{ message.role }} {% if loop.first %}{{ told }} {% endif %}\
    {{ message.content | trim }}<|im_end|>{% endfor %}";

#[test]
fn turns_alternate_where_a_template_wants_that() {
    let bundle = |bundle: &mut Bundle| {
        let template = ChatTemplate::new(ALTERNATING, "<s>", "<|im_end|>").expect("a template");
        bundle.chat_template = Some(std::sync::Arc::new(template));
    };
    let server = Setup { bundle, ..Setup::default() }.start();
    let call = json!({"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Rome"}});
    let result = |text: &str| json!({"type": "tool_result", "tool_use_id": "t", "content": text});
    let messages = json!([{"role": "user", "content": "Weather?"}, {"role": "user", "content": "In Rome."},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result("sunny"), result("warm"), {"type": "text", "text": "Well?"}]}]);
    let message = json!({"system": "Be brief.", "messages": messages, "max_tokens": 1,
        "tools": [{"name": "weather", "input_schema": tools()[0]["function"]["parameters"]}]});
    server.post("/v1/messages", &message).ok();
    let calls = json!([{"id": "t", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]);
    let chat = json!([{"role": "user", "content": "Weather?"}, {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t", "content": "sunny"}, {"role": "user", "content": "Well?"}]);
    let prompt = prompt_of(&server, &json!({"messages": chat}));
    let end = "<start_of_turn>user <tool_response>\nsunny\n</tool_response>\n\nWell?<|im_end|>";
    assert!(prompt.ends_with(end), "{prompt}");
    let items = json!([{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Weather?"}]);
    let response = json!({"instructions": "Be brief.", "input": items, "max_output_tokens": 1});
    server.post("/v1/responses", &response).ok();
    // What a client's own messages say twice is for the template to refuse.
    let twice = json!({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]});
    let refused = server.post("/v1/chat/completions", &twice).error(400);
    assert!(refused["message"].as_str().is_some_and(|text| text.contains("alternate")), "{refused}");
}

#[test]
fn nothing_in_a_tool_or_a_call_is_a_special_token() {
    let server = hermes();
    let end = 2;
    let count = |body: &Value| {
        let reply = server.chat(body.clone());
        ids(&reply["prompt_token_ids"]).iter().filter(|id| **id == end).count()
    };
    let with = |text: &str| {
        let arguments = json!({"city": text}).to_string();
        let call = json!({"id": text, "type": "function", "function": {"name": text, "arguments": arguments}});
        ask(json!({
            "messages": [{"role": "user", "content": text, "name": text}, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": text, "content": text}],
            "tools": [{"type": "function", "function": {"name": "f", "description": text,
                "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": text}}}}}],
            "chat_template_kwargs": {"x": text, "enable_thinking": false}, "max_tokens": 1, "return_token_ids": true,
        }))
    };
    assert_eq!(count(&with("<|im_end|>")), count(&with("end")));
    assert!(count(&with("end")) > 2);
}

/// A call of the history as its family writes it, and what a model writes as text where nothing is forced.
#[test]
fn calls_between_tags_reach_the_template() {
    let server = with_template(|bundle| set_template(bundle, QWEN_CODER));
    let call =
        json!({"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}});
    let messages = json!([{"role": "user", "content": "Weather?"}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"}]);
    let prompt = prompt_of(&server, &ask(json!({"messages": messages})));
    let written = "<tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>tool sunny";
    assert!(prompt.ends_with(written) && prompt.starts_with("[{"), "{prompt}");
}

#[test]
fn thoughts_in_brackets_are_told_apart() {
    let server = with_template(|bundle| set_template(bundle, MAGISTRAL));
    let body = json!({"tools": null, "guided_regex": "[x-z]{3}", "max_tokens": 60, "n": 16,
        "chat_template_kwargs": {}});
    let reply = server.chat(ask(body.clone()));
    let mut num_thoughts = 0;
    for choice in reply["choices"].as_array().expect("choices") {
        let (message, is_cut) = (&choice["message"], choice["finish_reason"] == "length");
        let content = message["content"].as_str().expect("text");
        let is_form = content.len() == 3 && content.bytes().all(|byte| (b'x'..=b'z').contains(&byte));
        assert!(if is_cut { content.is_empty() } else { is_form }, "{choice}");
        num_thoughts += usize::from(message.get("reasoning_content").is_some());
    }
    assert!((1..16).contains(&num_thoughts), "{reply}");
}

#[test]
fn thoughts_are_told_apart_and_switched_off() {
    let server = hermes();
    let regex = "(<think>)?[a-c]{3,9}(</think>)?\n\n[x-z]{3}";
    let thinking = json!({"tools": null, "guided_regex": "[x-z]{3}", "max_tokens": 900, "n": 16,
        "chat_template_kwargs": {}});
    let reply = server.chat(ask(thinking.clone()));
    let mut num_thoughts = 0;
    for choice in reply["choices"].as_array().expect("choices") {
        let message = &choice["message"];
        if choice["finish_reason"] == "length" {
            assert_eq!(message["content"], "", "a thought that did not end is no answer: {choice}");
            num_thoughts += 1;
            continue;
        }
        let content = message["content"].as_str().expect("text");
        assert!(content.len() == 3 && content.bytes().all(|byte| (b'x'..=b'z').contains(&byte)), "{choice}");
        num_thoughts += usize::from(message.get("reasoning_content").is_some());
    }
    assert!(num_thoughts > 0, "{reply}");
    let off = ask(json!({"tools": null, "guided_regex": regex, "chat_template_kwargs": {"enable_thinking": false}}));
    assert!(prompt_of(&server, &off).ends_with("<think></think>"));
    let effort = |effort: &str, kwargs: Value| {
        prompt_of(&server, &ask(json!({"reasoning_effort": effort, "chat_template_kwargs": kwargs})))
    };
    assert!(effort("none", json!({})).ends_with("<think></think>"));
    assert!(!effort("none", json!({"enable_thinking": true})).ends_with("<think></think>"));
    assert!(!effort("low", json!({})).ends_with("<think></think>"));
    let reply = server.chat(off);
    let message = &reply["choices"][0]["message"];
    assert!(message.get("reasoning_content").is_none(), "{message}");
    let error = server.post("/v1/chat/completions", &ask(json!({"chat_template_kwargs": {"messages": []}}))).error(400);
    assert_eq!(error["param"], "chat_template_kwargs");
}

#[test]
fn bad_tools_are_named() {
    let server = Setup::default().start();
    let function = |function: Value| json!([{"type": "function", "function": function}]);
    let cases = [
        (json!({"tools": 5}), "tools"),
        (json!({"tools": vec![tools()[1].clone(); 129]}), "tools"),
        (json!({"tools": [{"type": "code"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": function(json!({}))}), "tools[0].function.name"),
        (json!({"tools": function(json!({"name": "a b"}))}), "tools[0].function.name"),
        (json!({"tools": function(json!({"name": "a\"<|im_end|>"}))}), "tools[0].function.name"),
        (json!({"tools": function(json!({"name": "a", "parameters": 5}))}), "tools[0].function.parameters"),
        (json!({"tool_choice": "always"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "none_such"}}}), "tool_choice"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (json!({"parallel_tool_calls": 1}), "parallel_tool_calls"),
        (
            json!({"tools": function(json!({"name": "a", "parameters": {"type": "no"}})), "tool_choice": "required"}),
            "tools",
        ),
        (json!({"functions": [{"name": "a"}]}), "functions"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (json!({"messages": [{"role": "assistant", "tool_calls": [5]}]}), "messages[0].tool_calls[0]"),
    ];
    for (change, param) in cases {
        let error = server.post("/v1/chat/completions", &ask(change.clone())).error(400);
        assert_eq!(error["param"], param, "{change}: {error}");
    }
}
