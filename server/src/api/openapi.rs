//! `/openapi.json`: our own API as OpenAPI 3.1. Invariant: it has every route and every field that a parser asks for,
//! and nothing else; ranges are the parsers' own constants. The tests below hold it to that.

use serde_json::{Map, Value, json};

mod bodies;
mod messages;

use crate::version::VERSION;
use bodies::{any_object, bool, list, object, string};

/// All of it.
pub fn document() -> Value {
    let mut paths = Map::new();
    for (path, summary, answer) in GETS {
        let mut get = operation(summary, None, answer, &[]);
        if let Some((_, parameters)) = QUERIES.iter().find(|(known, _)| known == path) {
            get["parameters"] = parameters.iter().map(|&(name, kind, what)| parameter(name, kind, what)).collect();
        }
        if path.ends_with("{model}") {
            let model = json!({"name": "model", "in": "path", "required": true, "schema": {"type": "string"}});
            get["parameters"] = json!([model]);
        }
        paths.insert((*path).to_owned(), json!({"get": get}));
        if *path == "/ping" {
            paths[*path]["post"] = paths[*path]["get"].clone();
        }
    }
    for Post { path, summary, body, answer, streams } in posts() {
        let example = example(path);
        let content = json!({"required": true, "content": {"application/json": {"schema": body, "example": example}}});
        let kinds: &[&str] = if streams { &["text/event-stream"] } else { &[] };
        paths.insert(path.to_owned(), json!({"post": operation(summary, Some(content), answer, kinds)}));
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Fullbore", "version": VERSION, "description": DESCRIPTION},
        "paths": paths,
        "components": {"schemas": messages::schemas(), "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }},
        // A key is wanted only where the server has any.
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    })
}

const DESCRIPTION: &str = "Fields that nobody knows are ignored; fields that are known elsewhere and would change the \
    answer are refused by name, with status 400. Ranges that depend on the model are checked when it is asked.";

struct Post {
    path: &'static str,
    summary: &'static str,
    body: Value,
    answer: &'static str,
    streams: bool,
}

/// Path, what it is, and its answer among `components`; of `text` and `empty` there is no schema.
const GETS: &[(&str, &str, &str)] = &[
    ("/health", "Whether it can serve", "Health"),
    ("/health/live", "Whether the process lives", "Health"),
    ("/health/ready", "Whether it can serve", "Health"),
    ("/load", "How many requests run or wait", "Object"),
    ("/metrics", "Prometheus' text format", "text"),
    ("/openapi.json", "This document", "Object"),
    ("/ping", "Whether it can serve", "Health"),
    ("/tokenizer_info", "Special tokens and the chat template", "Object"),
    ("/v1/limits", "Where the device's time went, and what holds it back", "Object"),
    ("/v1/live", "What engines were at in the last minutes, second by second", "Object"),
    ("/v1/loads", "What each device of a model is at", "Object"),
    ("/v1/models", "The models that there are", "Models"),
    ("/v1/models/{model}", "One of them", "Object"),
    ("/version", "Of this server", "Object"),
];

/// Name, type, and what it is.
type Parameter = (&'static str, &'static str, &'static str);

/// What may follow the `?` of these paths.
const QUERIES: &[(&str, &[Parameter])] = &[
    ("/tokenizer_info", &[MODEL]),
    ("/v1/limits", &[MODEL]),
    ("/v1/loads", &[MODEL]),
    ("/v1/live", &[MODEL, ("after", "integer", "Frames that ended later alone, in Unix milliseconds")]),
];
const MODEL: Parameter = ("model", "string", "This model alone");

fn parameter(name: &str, kind: &str, description: &str) -> Value {
    let mut schema = json!({"type": kind});
    if kind == "integer" {
        schema["minimum"] = 0.into();
    }
    json!({"name": name, "in": "query", "description": description, "schema": schema})
}

fn posts() -> Vec<Post> {
    let post = |path, summary, body, answer, streams| Post { path, summary, body, answer, streams };
    vec![
        post("/v1/completions", "Goes on with prompts", bodies::completions(), "Completion", true),
        post("/v1/chat/completions", "Answers a chat", bodies::chat(), "ChatCompletion", true),
        post("/v1/responses", "OpenAI's responses, stateless", bodies::responses(), "Response", true),
        post("/v1/messages", "Anthropic's messages", bodies::messages(), "Message", true),
        post(
            "/v1/messages/count_tokens",
            "Tokens that a message's prompt has",
            bodies::count_tokens(),
            "InputTokens",
            false,
        ),
        post("/v1/embeddings", "Vectors of texts", bodies::embeddings(), "Embeddings", false),
        post(
            "/v1/completions/render",
            "Prompts as the model reads them",
            bodies::render_completions(),
            "Rendered",
            false,
        ),
        post(
            "/v1/chat/completions/render",
            "A chat as the model reads it, and how it would be sampled",
            bodies::chat(),
            "RenderedChat",
            false,
        ),
        post("/tokenize", "A text or a chat as token ids", bodies::tokenize(), "Tokens", false),
        post("/detokenize", "Token ids as text", bodies::detokenize(), "Prompt", false),
        post("/apply-template", "A chat as the model reads it", bodies::apply_template(), "Prompt", false),
    ]
}

/// A body that is answered.
fn example(path: &str) -> Value {
    let chat = json!([{"role": "user", "content": "Name three primary colours."}]);
    match path {
        "/v1/completions" | "/v1/completions/render" => json!({"prompt": "Once upon a time", "max_tokens": 16}),
        "/v1/chat/completions" | "/v1/chat/completions/render" | "/v1/messages" => {
            json!({"messages": chat, "max_tokens": 16})
        }
        "/v1/responses" => json!({"input": "Name three primary colours.", "max_output_tokens": 16}),
        "/v1/embeddings" => json!({"input": ["Once upon a time", "There was a king"]}),
        "/detokenize" => json!({"tokens": [1, 2]}),
        "/tokenize" => json!({"prompt": "Once upon a time"}),
        _ => json!({"messages": chat}),
    }
}

fn operation(summary: &str, body: Option<Value>, answer: &str, streams: &[&str]) -> Value {
    let mut content = Map::new();
    match answer {
        "text" => content.insert("text/plain".to_owned(), json!({"schema": {"type": "string"}})),
        name => content.insert("application/json".to_owned(), json!({"schema": reference(name)})),
    };
    for kind in streams {
        // There is no word yet for what one event is: a schema would be of all the stream.
        content.insert((*kind).to_owned(), json!({}));
    }
    let error = json!({"description": "An error, in the shape of the path's dialect.",
        "content": {"application/json": {"schema": reference("Error")}}});
    let mut operation = json!({
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": content}, "default": error},
    });
    if let Some(body) = body {
        operation["requestBody"] = body;
    }
    operation
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;
    use fullbore_engine::request::Pooling;

    use super::super::fields::asked;
    use super::super::texts::{self, TextEndpoint};
    use super::super::{Endpoint, ServedModel, model_asked, prepare};
    use super::*;
    use crate::http::access::Client;
    use crate::start::Plan;

    fn served() -> ServedModel {
        let bundle = Bundle { pooling: Some(Pooling::Last), ..Bundle::simulated() };
        let config = EngineConfig { max_model_len: 1024, num_blocks: 256, ..EngineConfig::default() };
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        Plan::of("sim", bundle, backend, config, 0).load().expect("the simulator loads")
    }

    /// Names of a schema and of the objects within it that are read field by field.
    fn properties(schema: &Value, names: &mut BTreeSet<String>) {
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            names.insert(name.clone());
            properties(schema, names);
        }
    }

    /// Bodies that have the parsers look at all they know, beside the example.
    fn bodies_of(path: &str) -> Vec<Value> {
        let mut whole = example(path);
        let more = json!({"stream_options": {}, "structured_outputs": {}, "response_format": {"type": "json_object"},
            "metadata": {}, "thinking": {"type": "disabled"}, "output_config": {"format": {"type": "json_schema",
                "schema": {"type": "object"}}}, "reasoning": {}, "chat_template_kwargs": {},
            "text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}});
        let fields = whole.as_object_mut().expect("an object");
        fields.extend(more.as_object().expect("an object").clone());
        let (mut schema, mut choice, mut older) = (whole.clone(), whole.clone(), whole.clone());
        schema["response_format"] = json!({"type": "json_schema", "json_schema": {"schema": {"type": "object"}}});
        choice["tool_choice"] = json!({"type": "auto"});
        older.as_object_mut().expect("an object").remove("output_config");
        older["output_format"] = json!({"type": "json_schema", "schema": {"type": "object"}});
        vec![whole, schema, choice, older]
    }

    #[test]
    fn fields_are_those_that_the_parsers_ask_for() {
        let model = served();
        for Post { path, body, .. } in posts() {
            let parse = |body: &Value| match path {
                _ if model_asked(body)?.is_some_and(|asked| asked != model.name) => panic!("{path}: another model's"),
                "/v1/completions" => prepare(Endpoint::Completions, &model, &Client::default(), body).map(drop),
                "/v1/chat/completions" => prepare(Endpoint::Chat, &model, &Client::default(), body).map(drop),
                "/v1/responses" => prepare(Endpoint::Responses, &model, &Client::default(), body).map(drop),
                "/v1/embeddings" => prepare(Endpoint::Embeddings, &model, &Client::default(), body).map(drop),
                "/v1/messages" => prepare(Endpoint::Messages, &model, &Client::default(), body).map(drop),
                "/v1/messages/count_tokens" => texts::answer(TextEndpoint::CountTokens, &model, body).map(drop),
                "/v1/completions/render" => texts::answer(TextEndpoint::RenderCompletions, &model, body).map(drop),
                "/v1/chat/completions/render" => texts::answer(TextEndpoint::RenderChat, &model, body).map(drop),
                "/tokenize" => texts::answer(TextEndpoint::Tokenize, &model, body).map(drop),
                "/detokenize" => texts::answer(TextEndpoint::Detokenize, &model, body).map(drop),
                "/apply-template" => texts::answer(TextEndpoint::ApplyTemplate, &model, body).map(drop),
                other => panic!("{other} has no parser here"),
            };
            parse(&example(path)).unwrap_or_else(|error| panic!("{path}: {error:?}"));
            asked::clear();
            bodies_of(path).iter().for_each(|body| drop(parse(body)));
            if path == "/tokenize" {
                bodies_of("/apply-template").iter().for_each(|body| drop(parse(body)));
                let _ = parse(&json!({"content": "x"}));
            }
            let mut told = BTreeSet::new();
            properties(&body, &mut told);
            assert_eq!(told, asked::names(), "{path}: told and asked for");
        }
        model.end();
    }

    #[test]
    fn paths_are_those_of_the_routes() {
        let routes = include_str!("../http/routes.rs").split("path!(").skip(1);
        let path = |rest: &str| {
            let parts = rest.split(')').next().unwrap_or_default().split('"').skip(1).step_by(2);
            parts.fold(String::new(), |path, part| format!("{path}/{part}"))
        };
        let routes: BTreeSet<String> = routes.map(path).filter(|path| !is_asset(path)).collect();
        let document = document();
        let told: BTreeSet<String> =
            document["paths"].as_object().expect("paths").keys().map(|path| path.replace("/{model}", "")).collect();
        assert_eq!(told, routes);
    }

    /// Of the page.
    fn is_asset(path: &str) -> bool {
        path.starts_with("/page")
    }
}
