//! What a server tells of itself.

use clap::{Args as ClapArgs, ValueEnum};

#[derive(Clone, Debug, ClapArgs)]
pub struct TelemetryArgs {
    /// Of the log, on standard error: each finished request is a line.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Send traces to a collector that speaks OTLP over HTTP with JSON, such as http://127.0.0.1:4318.
    #[arg(long, value_name = "URL", value_parser = parse_url)]
    pub otlp_endpoint: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

fn parse_url(text: &str) -> Result<String, String> {
    let url: warp::http::Uri = text.parse().map_err(|error| format!("{text} is no URL: {error}"))?;
    match (url.scheme_str(), url.host()) {
        (Some("http" | "https"), Some(_)) => Ok(text.to_owned()),
        _ => Err(format!("{text} is no URL of a collector; give one such as http://127.0.0.1:4318")),
    }
}
