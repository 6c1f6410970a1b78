//! The rules of the tree, read off the tree. Needs nothing. A message names the place and what to do instead.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a source file, and of a function, at most.
const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_COLUMNS: usize = 120;

struct Source {
    path: String,
    text: String,
}

impl Source {
    fn is_test(&self) -> bool {
        self.path.starts_with("tests/")
    }

    /// Everything before the tests at the end of the file.
    fn product(&self) -> &str {
        self.text.split("#[cfg(test)]\nmod ").next().unwrap_or_default()
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(extension: &str) -> Vec<Source> {
    fn walk(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder of the tree").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root(), extension, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "no .{extension} file found");
    let relative = |path: &Path| path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
    paths
        .into_iter()
        .map(|path| Source { path: relative(&path), text: fs::read_to_string(&path).expect("UTF-8 source") })
        .collect()
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "{} places to mend:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn files_open_with_their_purpose() {
    let missing = |source: &Source| !source.text.starts_with("//!");
    let problems: Vec<_> = sources("rs")
        .iter()
        .filter(|source| missing(source))
        .map(|source| {
            format!("{}: open it with `//!`: what it is, its invariant, what it refuses to know", source.path)
        })
        .collect();
    report(&problems);
}

#[test]
fn files_functions_and_lines_fit() {
    let mut problems = Vec::new();
    // Pages of results are written by a bench.
    let is_ours = |source: &Source| !source.path.starts_with("benches/results/");
    for source in ["rs", "wgsl", "js", "css", "html"].into_iter().flat_map(sources).filter(is_ours) {
        let num_lines = source.text.lines().count();
        if num_lines > MAX_FILE_LINES && !source.is_test() {
            problems.push(format!("{}: {num_lines} lines; split it by noun", source.path));
        }
        for (index, line) in source.text.lines().enumerate() {
            if line.chars().count() > MAX_COLUMNS {
                problems.push(format!("{}:{}: over {MAX_COLUMNS} columns; break it", source.path, index + 1));
            }
        }
        if !source.is_test() && source.path.ends_with(".rs") {
            for (line, length) in long_functions(source.product()) {
                problems.push(format!("{}:{line}: a function of {length} lines; split it by purpose", source.path));
            }
        }
    }
    report(&problems);
}

/// Functions over the limit, by the indentation that rustfmt gives their closing brace.
fn long_functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let words: Vec<&str> = trimmed.split_whitespace().take(4).collect();
        if !words.contains(&"fn") || trimmed.starts_with("//") || trimmed.ends_with(';') {
            continue;
        }
        let closing = format!("{}}}", &line[..line.len() - trimmed.len()]);
        if let Some(length) = lines[start..].iter().position(|line| *line == closing)
            && length + 1 > MAX_FUNCTION_LINES
        {
            found.push((start + 1, length + 1));
        }
    }
    found
}

#[test]
fn nothing_is_left_open() {
    let banned = [
        ("TODO", "finish it, or say it in the README's list of what is not done"),
        ("FIXME", "fix it, or assert the wrong behaviour in a test"),
        ("#[ignore", "run it, or delete it"),
        ("dbg!(", "use tracing"),
        ("todo!(", "build it"),
        ("unimplemented!(", "build it"),
    ];
    let mut problems = Vec::new();
    for source in sources("rs").iter().chain(&sources("wgsl")).filter(|source| source.path != "tests/tidy.rs") {
        for (index, line) in source.text.lines().enumerate() {
            for (word, instead) in banned.iter().filter(|(word, _)| line.contains(word)) {
                problems.push(format!("{}:{}: `{word}`: {instead}", source.path, index + 1));
            }
        }
    }
    report(&problems);
}

#[test]
fn towers_do_not_see_each_other() {
    let compute = ["crate::op", "crate::model", "crate::backend", "crate::recording", "std::thread", "Instant"];
    let plan = ["crate::scheduler", "crate::memory", "crate::sequence", "crate::engine"];
    let rules: [(&str, &[&str]); 14] = [
        ("engine/src/scheduler.rs", &compute),
        ("engine/src/scheduler/", &compute),
        ("engine/src/memory/", &compute),
        ("engine/src/sequence.rs", &compute),
        ("engine/src/cost", &["crate::model", "crate::backend", "crate::recording", "std::thread", "Instant"]),
        ("engine/src/backend/", &plan),
        ("engine/src/backend/", &["crate::request"]),
        ("engine/src/op.rs", &["crate::model", "crate::backend"]),
        ("engine/src/model/llama.rs", &plan),
        ("engine/src/sampling.rs", &["crate::sequence", "crate::memory", "crate::engine"]),
        ("engine/src/", &["tokio::", "warp::"]),
        ("shaders/", &["wgpu::"]),
        ("server/", &["wgpu::", "naga::"]),
        ("benches/", &["wgpu::", "naga::"]),
    ];
    let mut problems = Vec::new();
    for source in sources("rs") {
        for (folder, words) in rules.iter().filter(|(folder, _)| source.path.starts_with(folder)) {
            for word in words.iter().filter(|word| source.product().contains(*word)) {
                problems.push(format!("{}: mentions `{word}`; {folder} must not know it", source.path));
            }
        }
        if source.product().contains("wgpu::")
            && source.path.starts_with("engine/")
            && !source.path.starts_with("engine/src/backend/wgpu/")
        {
            let name = source.product().replace("backend::wgpu::", "");
            if name.contains("wgpu::") {
                problems.push(format!("{}: wgpu belongs under engine/src/backend/wgpu/", source.path));
            }
        }
    }
    report(&problems);
}

#[test]
fn unsafe_code_stays_in_its_places() {
    let places = [
        "cuda-kernels/gpu.rs",
        "cuda-kernels/host.rs",
        "engine/src/backend/cpu/avx2.rs",
        "engine/src/backend/cpu/avx2/x86.rs",
        "engine/src/backend/wgpu/arithmetic.rs",
        "engine/src/backend/wgpu/pipeline_cache.rs",
        "engine/src/backend/wgpu/pipelines.rs",
        "tests/tidy.rs",
    ];
    let problems: Vec<_> = sources("rs")
        .iter()
        .filter(|source| source.text.contains("allow(unsafe_code"))
        .filter(|source| !places.contains(&source.path.as_str()))
        .map(|source| format!("{}: `unsafe` has its places: {places:?}", source.path))
        .collect();
    report(&problems);
}

#[test]
fn every_op_has_one_name_everywhere() {
    let ops = fs::read_to_string(root().join("engine/src/op.rs")).expect("op.rs");
    let list = ops.split("pub enum Op {").nth(1).and_then(|rest| rest.split('}').next()).expect("enum Op");
    let mut problems = Vec::new();
    for variant in list.lines().filter_map(|line| line.trim().split('(').next()).filter(|name| !name.is_empty()) {
        let name = snake_case(variant);
        for path in [format!("engine/src/backend/cpu/{name}.rs"), format!("shaders/{name}.wgsl")] {
            if !root().join(&path).exists() {
                problems.push(format!("Op::{variant}: {path} is missing"));
            }
        }
    }
    report(&problems);
}

fn snake_case(name: &str) -> String {
    let mut out = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(letter.to_lowercase());
    }
    out
}

#[test]
fn every_module_is_reachable() {
    let all = sources("rs");
    let mut problems = Vec::new();
    for source in all.iter().filter(|source| source.path.contains("/src/") || source.path.starts_with("tests/")) {
        let path = Path::new(&source.path);
        let stem = path.file_stem().expect("a name").to_string_lossy();
        if ["lib", "main"].contains(&&*stem) || source.path.contains("/bin/") {
            continue;
        }
        let (name, folder) = match &*stem {
            "mod" => {
                let folder = path.parent().expect("a folder");
                (folder.file_name().expect("a name").to_string_lossy().into_owned(), folder.parent().expect("src"))
            }
            _ => (stem.into_owned(), path.parent().expect("a folder")),
        };
        let parents = ["mod.rs", "lib.rs", "main.rs"].map(|file| folder.join(file)).into_iter();
        let declares = |parent: &Path| {
            all.iter().any(|other| {
                Path::new(&other.path) == parent
                    && other.text.lines().any(|line| line.trim().ends_with(&format!("mod {name};")))
            })
        };
        if !parents.chain([folder.with_extension("rs")]).any(|parent| declares(&parent)) {
            problems.push(format!("{}: no `mod {name};` reaches it; declare it or delete it", source.path));
        }
    }
    report(&problems);
}

/// Rows of the table in docs/security.md: what is tried, what stops it, and the tests that hold it.
fn attacks() -> Vec<[String; 3]> {
    let page = fs::read_to_string(root().join("docs/security.md")).expect("a page");
    let table = page.split("| attack |").nth(1).expect("the table");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells = |row: &str| -> [String; 3] {
        let cells: Vec<String> = row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect();
        cells.try_into().unwrap_or_else(|cells| panic!("three cells: {cells:?}"))
    };
    rows.map(cells).collect()
}

/// The module that a source file is, below its crate.
fn module(path: &str) -> String {
    let crates = ["tests/", "server/src/", "engine/src/"];
    let below = crates.iter().find_map(|folder| path.strip_prefix(folder)).unwrap_or(path);
    below.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::")
}

#[test]
fn every_attack_has_a_limit_and_a_test_that_there_is() {
    let all = sources("rs");
    let makefile = fs::read_to_string(root().join("Makefile")).expect("a Makefile");
    // A file, and what it has of modules and functions behind that.
    let is_test = |name: &str| {
        let words: Vec<&str> = name.split("::").collect();
        (1..=words.len()).any(|length| {
            let (path, rest) = words.split_at(length);
            let path = path.join("::");
            let is_of = |own: &str| own == path || own.ends_with(&format!("::{path}"));
            all.iter().filter(|source| is_of(&module(&source.path))).any(|source| {
                let has = |word: &&str| {
                    [format!("fn {word}()"), format!("mod {word} {{")].iter().any(|part| source.text.contains(part))
                };
                source.text.contains("test]\n") && rest.iter().all(has)
            })
        })
    };
    let mut problems = Vec::new();
    for [attack, limit, tests] in attacks() {
        if limit.is_empty() {
            problems.push(format!("{attack}: say what stops it"));
        }
        let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        let files: Vec<String> = named.iter().filter_map(|name| fs::read_to_string(root().join(name)).ok()).collect();
        let there = |name: &str| match name.split_once(' ') {
            Some(("make", target)) => makefile.contains(&format!("\n{target}:")),
            Some(("fullbore", _)) => true,
            _ if root().join(name).is_file() => true,
            _ => is_test(name) || files.iter().any(|file| file.contains(name)),
        };
        problems.extend(named.iter().filter(|name| !there(name)).map(|name| format!("{attack}: no test {name}")));
        if named.is_empty() {
            problems.push(format!("{attack}: name its test"));
        }
    }
    report(&problems);
}
