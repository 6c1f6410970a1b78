//! `fullbore bench http` at a small size, so that it never rots: what it counts, and nothing that a clock says.

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command};
use fullbore::bench::measure_http;

#[test]
fn the_bench_over_http_gets_every_token_and_measures_everything() {
    let words = "fullbore bench http --streams 8 --tokens 30 --rates 400 --seconds 1 --idle 20 --clients 5 \
        --prompt-tokens 3000 --decoders 2";
    let args = Args::try_parse_from(words.split_whitespace()).expect("its own words");
    let Command::Bench { command: BenchCommand::Http(args) } = args.command else { panic!("bench http is that") };
    let report = measure_http(&args).expect("a report");
    assert_eq!(report["rate"]["tokens"], 8 * 30);
    // A step gives 8 tokens, so that 50 make a second.
    assert_eq!(report["delay"][0]["tokens"], 8 * 50);
    let names: Vec<_> = report["delay"][0]["cpu"]["us_per_token"].as_object().expect("threads").keys().collect();
    assert!(["client", "engine", "http"].iter().all(|name| names.iter().any(|found| found == name)), "{names:?}");
    for percentile in [
        &report["delay"][0]["added_ms"]["p99"],
        &report["long_prompts"]["gap_ms"]["before"]["p99"],
        &report["long_prompts"]["gap_ms"]["sink"]["p99"],
        &report["long_prompts"]["health_ms"]["before"]["p99"],
    ] {
        assert!(percentile.as_f64().is_some_and(|ms| ms > 0.0), "{report}");
    }
    let cores = &report["long_prompts"]["cores"];
    assert!(cores["sink"]["sink"].as_f64() > Some(0.0) && cores["during"]["engine"].as_f64() > Some(0.0), "{cores}");
    assert_eq!((&report["idle_streams"]["streams"], &report["long_prompts"]["clients"]), (&20.into(), &5.into()));
}
