//! Result files as one page: HTML that needs nothing else, or Markdown.
//!
//! Invariant: every number on it is in a result file, and what is missing or doubtful is said, not left out. Nothing
//! here measures.

use names::Names;
use view::{Named, View};

mod figures;
mod html;
mod markdown;
mod missing;
mod names;
mod plot;
mod view;

/// One file with its plots and its styles, light or dark as its reader has it. `unread` are sentences about files that
/// could not be read.
pub fn html(results: &[Named], unread: &[String]) -> String {
    let names = Names::of(results);
    let (figures, without) = figures::figures(results, &names);
    html::page(&View::of(results, &names).also_missing(unread.to_vec()).also_missing(without), &figures)
}

/// The same tables.
pub fn markdown(results: &[Named], unread: &[String]) -> String {
    markdown::page(&View::of(results, &Names::of(results)).also_missing(unread.to_vec()))
}

impl View {
    fn also_missing(mut self, sentences: Vec<String>) -> View {
        self.missing.extend(sentences);
        self
    }
}

#[cfg(test)]
mod tests {
    use crate::result::{BenchResult, Device, Measurement, ModelFile, Run, Target};

    use super::*;

    fn target(name: &str, adapter: Option<&str>) -> Target {
        let device = adapter.map(|adapter| Device {
            id: "vulkan:0".to_owned(),
            name: adapter.to_owned(),
            driver: "a driver 1.0".to_owned(),
            tier: "base".to_owned(),
            arithmetic: "f32".to_owned(),
            memory_bytes: None,
        });
        let memory_bytes = device.iter().map(|_| ("weights".to_owned(), 100 << 20)).collect();
        let (name, model) = (name.to_owned(), Some("a-model".to_owned()));
        Target { name, model, device, memory_bytes, ..Target::default() }
    }

    fn measurement(target: &str, concurrency: f64, rate: f64) -> Measurement {
        let run = |times: f64| {
            let metrics = [
                ("output_tokens_per_s", rate * times),
                ("tpot_p50_ms", 5.0 * concurrency),
                ("device_computing_s", 3.0),
                ("device_slots_s", 1.0),
            ];
            Run { metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into(), ..Run::default() }
        };
        Measurement {
            target: target.to_owned(),
            at: [("concurrency".to_owned(), concurrency)].into(),
            runs: [0.9, 1.0, 1.1].map(run).into(),
            ..Measurement::default()
        }
    }

    fn results() -> Vec<Named> {
        let mut result = BenchResult::begin("sweep", 1, None);
        result.targets = vec![target("own", Some("An <odd> GPU")), target("a peer", None)];
        (result.targets[1].version, result.targets[1].about) =
            (Some("b12345".to_owned()), Some("by hand, --slots 2".to_owned()));
        result.measurements = [1.0, 2.0]
            .into_iter()
            .flat_map(|clients| [measurement("own", clients, 40.0 * clients), measurement("a peer", clients, 20.0)])
            .collect();
        result.software.build = "release".to_owned();
        result.finish();
        vec![("a.json".to_owned(), result)]
    }

    #[test]
    fn the_page_says_what_was_measured_and_what_was_not() {
        let page = html(&results(), &[]);
        for part in [
            "An &lt;odd&gt; GPU",
            "a peer",
            "Throughput against latency",
            "Where the device&#39;s time went",
            "concurrency 1 (the knee)",
            "Other vendors",
            "Not measured on An &lt;odd&gt; GPU: batch 1",
            "Each number is a ratio",
            "b12345; by hand, --slots 2",
            "There is no op: no share of the roofline",
            "One device alone",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(!page.contains("<odd>") && !page.contains("NaN"), "{page}");
        assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script src"), "{page}");
        // 80 to 20, run by run.
        assert!(page.contains("<td class=\"number\">4"), "{page}");
    }

    #[test]
    fn what_is_not_valid_is_not_shown_as_if_it_were() {
        let mut results = results();
        results[0].1.invalid.push("the target died".to_owned());
        results[0].1.finish();
        let page = html(&results, &[]);
        assert!(page.contains("a.json is not valid: the target died") && page.contains("<td>no</td>"), "{page}");
        // Neither in the cards, nor drawn, nor counted as measured.
        for part in ["<article>", "<figure>"] {
            assert!(!page.contains(part), "{part} in {page}");
        }
        assert!(page.contains("the knee (`bench sweep`)"), "{page}");
        let text = markdown(&results, &[]);
        assert!(text.contains("a.json is not valid: the target died") && text.contains("| no |"), "{text}");
    }

    #[test]
    fn more_causes_than_colours_share_the_last() {
        let mut results = results();
        for run in results[0].1.measurements.iter_mut().flat_map(|measurement| &mut measurement.runs) {
            for nth in 0..9 {
                run.metric(&format!("device_cause_{nth}_s"), 0.1);
            }
        }
        results[0].1.finish();
        let page = html(&results, &[]);
        assert!(page.contains("other (cause ") && !page.contains("class=\"c8\""), "{page}");
    }

    #[test]
    fn a_client_that_may_have_been_the_limit_is_told_of() {
        for (share, is_told) in [(0.49, false), (0.55, true)] {
            let mut results = results();
            for (nth, run) in results[0].1.measurements[0].runs.iter_mut().enumerate() {
                run.metric("client_core_share", if nth == 1 { share } else { 0.1 });
            }
            results[0].1.finish();
            for page in [html(&results, &[]), markdown(&results, &[])] {
                let sentence = "a.json: its one thread was busy for up to 55 % of the time (concurrency 1)";
                assert_eq!(page.contains(sentence), is_told, "{page}");
                assert!(page.contains("client, of a core") && page.contains("0.1"), "{page}");
            }
        }
    }

    #[test]
    fn what_is_not_known_of_a_result_is_told() {
        let lacks = |change: &dyn Fn(&mut BenchResult)| {
            let mut results = results();
            let result = &mut results[0].1;
            result.machine.cpu_mhz = Some(3000.0);
            result.software.commit = Some("c0ffee".to_owned());
            change(result);
            result.finish();
            let page = markdown(&results, &[]);
            let sentences = page.lines().filter_map(|line| line.strip_prefix("- Not known: "));
            sentences.map(str::to_owned).collect::<Vec<_>>()
        };
        let know_all = |result: &mut BenchResult| {
            let sha256 = Some("ab12".to_owned());
            let file = ModelFile { name: "a.gguf".to_owned(), size_bytes: 1234, sha256 };
            result.targets[0].model_files = vec![file];
            result.targets[0].device.as_mut().expect("it has one").name = "llvmpipe".to_owned();
            for run in result.measurements.iter_mut().flat_map(|measurement| &mut measurement.runs) {
                run.output_hash = Some("0123".to_owned());
                run.metric("cached_share", 0.0);
                run.metric("client_core_share", 0.1);
            }
        };
        assert_eq!(lacks(&know_all), [""; 0]);
        let all = [
            "a hash of output tokens, by which two results can be held to each other (a.json).",
            "the share of prompts that came from a cache (a.json).",
            "how much of a core the client took (a.json).",
            "the model's file with its sha256 (a.json: An &lt;odd> GPU).",
            "the device's own clock, which is read nowhere (a.json).",
        ];
        assert_eq!(lacks(&|_| {}), all);
        // Whatever makes no answers has no hash of them, nor a model.
        assert_eq!(lacks(&|result| result.bench = "ops".to_owned()), all[4..]);
        let kinds = [("startup", [0, 3, 4].to_vec()), ("latency", vec![0, 1, 3, 4]), ("doctor", vec![0, 1, 3, 4])];
        for (bench, lacking) in kinds {
            let lacking: Vec<_> = lacking.into_iter().map(|nth| all[nth]).collect();
            assert_eq!(lacks(&|result| result.bench = bench.to_owned()), lacking, "{bench}");
        }
        let one_lacks = |result: &mut BenchResult| {
            know_all(result);
            result.measurements[1].runs[2].output_hash = None;
            result.targets[0].model_files[0].sha256 = None;
            (result.machine.cpu_mhz, result.software.commit) = (None, None);
        };
        let some = [
            "a hash of output tokens, by which two results can be held to each other (a.json: a peer).",
            "the model's file with its sha256 (a.json: llvmpipe).",
            "the processor's clock (a.json).",
            "the commit of the program (a.json).",
        ];
        assert_eq!(lacks(&one_lacks), some);
        let mut results = results();
        know_all(&mut results[0].1);
        assert!(html(&results, &[]).contains("a.gguf, 1,234 bytes, sha256 ab12"));
    }

    #[test]
    fn no_results_make_a_page_that_says_so() {
        assert!(html(&[], &[]).contains("There is no sweep"));
    }
}
