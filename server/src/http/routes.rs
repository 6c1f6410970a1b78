//! The table of routes. Invariant: every answer, also to what no route takes, has the shape of its path's dialect.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use bytes::Buf;
use futures_util::Stream;
use futures_util::future::{Either, select};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;
use tower_service::Service;
use warp::Filter;
use warp::http::header::CONTENT_TYPE;
use warp::http::{self, HeaderMap, Request};
use warp::path::{FullPath, Tail};
use warp::reject::Rejection;
use warp::reply::{Reply, Response};

use super::accept::Protocol;
use super::access::{Access, Client};
use super::bodies::Body;
use super::error::{self, ApiError, Unrouted, json_response};
use super::request_id::AnswerId;
use super::stream::{self, Prepared};
use super::{App, health, metrics, page};
use crate::api::json::JsonRoom;
use crate::api::limits::LimitsQuery;
use crate::api::live::LiveQuery;
use crate::api::texts::{self, TextEndpoint};
use crate::api::worker::{self, WorkerQuery};
use crate::api::{self, Endpoint, ServedModel};

pub fn routes(app: Arc<App>) -> impl Filter<Extract = (impl Reply,), Error = Infallible> + Clone + Send + 'static {
    let with_app = warp::any().map(move || app.clone());
    let page = warp::path::end().and(warp::get()).map(page::page);
    let file = warp::path!("page" / String).and(warp::get()).and_then(page_file);
    let live = warp::path!("health" / "live").and(warp::get()).map(health::live);
    let healthy = warp::path!("health").and(warp::get()).and(with_app.clone());
    let healthy = healthy.map(|app: Arc<App>| health::ready(&app));
    let ready = warp::path!("health" / "ready").and(warp::get()).and(with_app.clone());
    let ready = ready.map(|app: Arc<App>| health::ready(&app));
    let metrics = warp::path!("metrics").and(warp::get()).and(with_app.clone());
    let metrics = metrics.map(|app: Arc<App>| metrics::metrics(&app));
    let models = warp::path!("v1" / "models").and(warp::get()).and(with_app.clone());
    let models = models.map(|app: Arc<App>| answer_get(served(&app).map(api::models::list)));
    let card = warp::path!("v1" / "models" / ..).and(warp::path::tail()).and(warp::get()).and(with_app.clone());
    let card = card.and_then(model_card);
    let limits = warp::path!("v1" / "limits").and(warp::get()).and(with_app.clone());
    let limits = limits.and(warp::query()).map(|app: Arc<App>, query: LimitsQuery| {
        answer_get(seen_models(&app, query.model.as_deref()).map(api::limits::reports))
    });
    let openapi = warp::path!("openapi.json").and(warp::get()).map(|| json_response(&api::openapi::document()));
    let seen = warp::path!("v1" / "live").and(warp::get()).and(with_app.clone()).and(warp::query());
    let seen = seen.map(|app: Arc<App>, query: LiveQuery| {
        let models = seen_models(&app, query.model.as_deref());
        answer_get(models.map(|models| json!(api::live::report(models, &query))))
    });
    let completions = warp::path!("v1" / "completions").map(|| Endpoint::Completions);
    let chat = warp::path!("v1" / "chat" / "completions").map(|| Endpoint::Chat);
    let texts = texts(with_app.clone());
    let worker = worker(with_app.clone());
    let responses = warp::path!("v1" / "responses").map(|| Endpoint::Responses);
    let messages = warp::path!("v1" / "messages").map(|| Endpoint::Messages);
    let embeddings = warp::path!("v1" / "embeddings").map(|| Endpoint::Embeddings);
    let generate = completions.or(chat).unify().or(responses).unify().or(messages).unify().or(embeddings).unify();
    let generate = generate
        .and(warp::post())
        .and(with_app)
        .and(warp::path::full())
        .and(warp::ext::get())
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .then(generate_reply);
    let health = live.or(ready).unify().or(healthy).unify();
    let api = models
        .or(card)
        .unify()
        .or(limits)
        .unify()
        .or(seen)
        .unify()
        .or(openapi)
        .unify()
        .or(generate)
        .unify()
        .or(texts)
        .unify()
        .or(worker)
        .unify();
    let rest = page.or(file).unify().or(health).unify().or(metrics).unify();
    api.or(rest).unify().recover(error::recover).unify()
}

/// What `warp` has no name for.
pub trait HasBody {
    type Body;
}

impl<B> HasBody for http::Response<B> {
    type Body = B;
}

/// Routes, as a port has them.
#[derive(Clone)]
pub struct Routes<S>(pub S);

impl<S> Protocol for Routes<S>
where
    S: Service<Request<Incoming>, Response = Response, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    type Body = <Response as HasBody>::Body;

    const IS_HTTP2: bool = false;

    fn screen(&self, access: &Access, request: &Request<Incoming>) -> Option<Response> {
        let refused = || access.check_host(request).err().map(|error| error.response(request.uri().path()));
        access.preflight(request).or_else(refused)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response {
        let anthropic_path = Some(request.uri().path()).filter(|path| error::is_anthropic(path)).map(str::to_owned);
        let Ok(mut response) = self.0.clone().call(request).await;
        match (response.extensions_mut().remove(), anthropic_path) {
            (Some(Unrouted(error)), Some(path)) => error.response(&path),
            _ => response,
        }
    }

    fn refusal(&self, error: &ApiError, path: &str) -> Response {
        error.response(path)
    }
}

/// The models, unless none of them serves.
fn served(app: &App) -> Result<&[Arc<ServedModel>], ApiError> {
    let models = app.open_models()?;
    match models.iter().any(|model| model.check_serving().is_ok()) {
        true => Ok(models),
        false => models[0].check_serving().map(|()| models),
    }
}

/// The name may have slashes, as they are or escaped.
async fn model_card(name: Tail, app: Arc<App>) -> Result<Response, Rejection> {
    let name = percent_decode_str(name.as_str()).decode_utf8().map_err(|_| warp::reject::not_found())?;
    let model = served(&app).and_then(|_| app.known_model(Some(&name)));
    Ok(answer_get(model.map(|model| api::models::card(model))))
}

/// The model of this name, or all, whatever they are at.
fn seen_models<'a>(app: &'a App, asked: Option<&str>) -> Result<&'a [Arc<ServedModel>], ApiError> {
    match asked {
        Some(_) => app.known_model(asked).map(std::slice::from_ref),
        None => app.known_models(),
    }
}

fn answer_get(answer: Result<Value, ApiError>) -> Response {
    answer.map_or_else(|error| error.response(""), |value| json_response(&value))
}

async fn page_file(name: String) -> Result<Response, Rejection> {
    page::file(&name).ok_or_else(warp::reject::not_found)
}

/// What needs a model's tokenizer and none of its steps.
fn texts(
    with_app: impl Filter<Extract = (Arc<App>,), Error = Infallible> + Clone + Send + 'static,
) -> impl Filter<Extract = (Response,), Error = Rejection> + Clone + Send + 'static {
    let tokenize = warp::path!("tokenize").map(|| TextEndpoint::Tokenize);
    let detokenize = warp::path!("detokenize").map(|| TextEndpoint::Detokenize);
    let template = warp::path!("apply-template").map(|| TextEndpoint::ApplyTemplate);
    let count = warp::path!("v1" / "messages" / "count_tokens").map(|| TextEndpoint::CountTokens);
    let prompts = warp::path!("v1" / "completions" / "render").map(|| TextEndpoint::RenderCompletions);
    let chat = warp::path!("v1" / "chat" / "completions" / "render").map(|| TextEndpoint::RenderChat);
    let endpoint = tokenize.or(detokenize).unify().or(template).unify().or(count).unify();
    let endpoint = endpoint.or(prompts).unify().or(chat).unify();
    let endpoint = endpoint.and(warp::post()).and(with_app).and(warp::path::full()).and(warp::ext::get());
    endpoint.and(warp::header::headers_cloned()).and(warp::body::stream()).then(text_reply)
}

/// What routers ask of a worker.
fn worker(
    with_app: impl Filter<Extract = (Arc<App>,), Error = Infallible> + Clone + Send + 'static,
) -> impl Filter<Extract = (Response,), Error = Rejection> + Clone + Send + 'static {
    let ping = warp::path!("ping").and(warp::get().or(warp::post()).unify()).and(with_app.clone());
    let ping = ping.map(|app: Arc<App>| health::ready(&app));
    let version = warp::path!("version").and(warp::get()).map(|| json_response(&worker::version()));
    let load = warp::path!("load").and(warp::get()).and(with_app.clone());
    let load = load.map(|app: Arc<App>| answer_get(app.known_models().map(worker::load)));
    let loads = warp::path!("v1" / "loads").map(|| worker::loads as fn(&ServedModel) -> Value);
    let tokenizer = warp::path!("tokenizer_info").map(|| worker::tokenizer_info as fn(&ServedModel) -> Value);
    let of_model = loads.or(tokenizer).unify().and(warp::get()).and(with_app).and(warp::query());
    let of_model = of_model.map(|answer: fn(&ServedModel) -> Value, app: Arc<App>, query: WorkerQuery| {
        answer_get(app.known_model(query.model.as_deref()).map(|model| answer(model)))
    });
    ping.or(version).unify().or(load).unify().or(of_model).unify()
}

async fn text_reply<S, B>(
    endpoint: TextEndpoint,
    app: Arc<App>,
    path: FullPath,
    client: Client,
    headers: HeaderMap,
    body: S,
) -> Response
where
    S: Stream<Item = Result<B, warp::Error>>,
    B: Buf,
{
    let answered = async {
        let body = app.bodies.read(&app.limits, &client.origin, &headers, None, body).await?;
        check_media_type(&headers)?;
        app.open_models()?;
        let (num_bytes, of_app) = (body.len(), app.clone());
        let answer = move || {
            let body = parse(&body)?;
            texts::answer(endpoint, of_app.serving(api::model_asked(&body)?)?, &body)
        };
        app.work.read(&client.origin, num_bytes, answer).await
    };
    match answered.await {
        Ok(value) => json_response(&value),
        Err(error) => error.response(path.as_str()),
    }
}

async fn generate_reply<S, B>(
    endpoint: Endpoint,
    app: Arc<App>,
    path: FullPath,
    client: Client,
    headers: HeaderMap,
    body: S,
) -> Response
where
    S: Stream<Item = Result<B, warp::Error>>,
    B: Buf,
{
    match generate(endpoint, app, client, headers, body).await {
        Ok(response) => response,
        Err(error) => error.response(path.as_str()),
    }
}

/// What is done before an answer begins.
async fn prepare(
    endpoint: Endpoint,
    app: Arc<App>,
    client: Client,
    trace: Option<HeaderMap>,
    body: Arc<Body>,
) -> Result<Prepared, ApiError> {
    let arrived = Instant::now();
    let (of_client, origin, num_bytes, of_app) = (client.clone(), client.origin.clone(), body.len(), app.clone());
    let prepare = move || {
        let body = parse(&body)?;
        let model = of_app.serving(api::model_asked(&body)?)?.clone();
        let (answer, jobs) = api::prepare(endpoint, &model, &of_client, &body)?;
        Ok((model, answer, jobs))
    };
    let (model, answer, jobs) = app.work.read(&origin, num_bytes, prepare).await?;
    let generation = app.generate(&model, jobs, &client, arrived, trace).await;
    let generation = generation.map_err(|error| error.of_endpoint(endpoint))?;
    Ok(Prepared { model, answer, generation })
}

async fn generate<S, B>(
    endpoint: Endpoint,
    app: Arc<App>,
    client: Client,
    headers: HeaderMap,
    body: S,
) -> Result<Response, ApiError>
where
    S: Stream<Item = Result<B, warp::Error>>,
    B: Buf,
{
    // Whoever would get no place in any case is not read.
    let body = app.bodies.read(&app.limits, &client.origin, &headers, app.full(), body).await?;
    check_media_type(&headers)?;
    app.open_models()?;
    let body = Arc::new(body);
    let traced = app.tracer.is_some().then_some(headers);
    let mut preparing = Box::pin(prepare(endpoint, app.clone(), client, traced, body.clone()));
    let prepared = match timeout(app.limits.keep_alive, &mut preparing).await {
        Ok(prepared) => prepared?,
        // It has waited as long as a stream may be silent.
        Err(_) if endpoint.is_ever_streamed() => {
            let looked = body.clone();
            let asks = std::pin::pin!(app.work.look(move || asks_for_stream(&looked)));
            match select(asks, preparing).await {
                Either::Left((asks, preparing)) => match asks? {
                    true => return Ok(stream::late_response(app.clone(), endpoint, preparing)),
                    false => preparing.await?,
                },
                Either::Right((prepared, _)) => prepared?,
            }
        }
        Err(_) => preparing.await?,
    };
    // What a batch has yet to hand in is as large as its text was, and counts as that.
    let body = (!prepared.generation.is_handed_in()).then_some(body);
    let id = AnswerId(prepared.generation.id().to_owned());
    let mut response = match prepared.answer.is_streamed() {
        true => stream::response(app, prepared),
        false => {
            let Prepared { model, mut answer, generation } = prepared;
            json_response(&api::collect(&mut *answer, &model, generation).await?)
        }
    };
    drop(body);
    response.extensions_mut().insert(id);
    Ok(response)
}

/// What a body says of it that may be wrong in other ways.
fn asks_for_stream(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Asked {
        #[serde(default)]
        stream: bool,
    }
    serde_json::from_slice(body).is_ok_and(|asked: Asked| asked.stream)
}

fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let found = headers.get(CONTENT_TYPE).map(|value| value.to_str().unwrap_or("no text"));
    let essence = found.and_then(|found| found.split(';').next()).unwrap_or_default();
    match essence.trim().eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(ApiError::media_type(found)),
    }
}

fn parse(body: &[u8]) -> Result<Value, ApiError> {
    JsonRoom::default().parse(body).map_err(|error| ApiError::not_json(format!("the request body is {error}")))
}
