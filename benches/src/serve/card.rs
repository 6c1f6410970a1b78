//! What a server says of itself: the model it serves, its version, and the bounds it was started with.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::endpoint::{Endpoint, EndpointError, Failure};

#[derive(Clone, Debug)]
pub struct Card {
    pub model: String,
    /// It is this program's.
    pub is_fullbore: bool,
    /// Of weights.
    pub dtype: Option<String>,
    /// Of a request.
    pub max_model_len: Option<u64>,
    /// As it names itself, with its build where it tells one.
    pub version: Option<String>,
    /// Flags and bounds, as far as it tells them.
    pub limits: BTreeMap<String, Value>,
}

impl Card {
    /// Of the model `wanted` where there are several.
    pub async fn of(endpoint: &Endpoint, wanted: Option<&str>, patience: Duration) -> Result<Card, EndpointError> {
        let failed = |failure| EndpointError::Failed { url: endpoint.url.clone(), failure };
        let (server, body) = endpoint.get("/v1/models", patience).await.map_err(failed)?;
        let list: Value = serde_json::from_slice(&body)
            .map_err(|error| failed(Failure::Unreadable(format!("/v1/models is not JSON: {error}"))))?;
        let cards = list["data"].as_array().map_or(&[][..], Vec::as_slice);
        let name = |card: &Value| card["id"].as_str().unwrap_or_default().to_owned();
        let found = match wanted {
            Some(wanted) => cards.iter().find(|card| name(card) == wanted),
            None => cards.first().filter(|_| cards.len() == 1),
        };
        let fields = found.ok_or_else(|| {
            let names: Vec<String> = cards.iter().map(name).collect();
            let models = if names.is_empty() { "no model".to_owned() } else { names.join(", ") };
            EndpointError::Models { url: endpoint.url.clone(), models }
        })?;
        let owner = fields["owned_by"].as_str().unwrap_or_default().to_owned();
        let is_fullbore = owner == "fullbore";
        let (build, mut limits) = if is_fullbore { Default::default() } else { asked(endpoint, patience).await };
        let server = server.or_else(|| (!owner.is_empty()).then_some(owner));
        let version: Vec<String> = server.into_iter().chain(build).collect();
        let scalars = fields.as_object().into_iter().flatten();
        limits.extend(scalars.filter(|(_, of)| of.is_number() || of.is_boolean()).map(|(k, v)| (k.clone(), v.clone())));
        Ok(Card {
            model: name(fields),
            is_fullbore,
            dtype: fields["dtype"].as_str().or(fields["meta"]["ftype"].as_str()).map(str::to_owned),
            max_model_len: fields["max_model_len"].as_u64().or(fields["meta"]["n_ctx"].as_u64()),
            version: (!version.is_empty()).then(|| version.join(" ")),
            limits,
        })
    }
}

/// Its build and its bounds, where it has a page for them: vLLM's `/version`, llama.cpp's `/props`.
async fn asked(endpoint: &Endpoint, patience: Duration) -> (Option<String>, BTreeMap<String, Value>) {
    let page = async |path: &str| {
        let (_, body) = endpoint.get(path, patience).await.ok()?;
        serde_json::from_slice::<Value>(&body).ok()
    };
    if let Some(version) = page("/version").await.and_then(|page| page["version"].as_str().map(str::to_owned)) {
        return (Some(version), BTreeMap::new());
    }
    let Some(props) = page("/props").await else { return Default::default() };
    let fields = [
        ("total_slots", props["total_slots"].clone()),
        ("n_ctx_per_slot", props["default_generation_settings"]["n_ctx"].clone()),
    ];
    let limits = fields.into_iter().filter(|(_, value)| value.is_number());
    let build = props["build_info"].as_str().map(str::to_owned);
    (build, limits.map(|(name, value)| (name.to_owned(), value)).collect())
}
