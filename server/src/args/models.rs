//! The models that a server has: `--model`, once for each. Invariant: what holds for all of them and what one says of
//! itself become the same words, read by the same parsers as any command's.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args as ClapArgs, Command, Error, FromArgMatches};
use fullbore_engine::request::Pooling;

use super::EngineArgs;
use super::parse::parse_pooling;

/// At least one, in the order of the command line.
#[derive(Clone, Debug)]
pub struct ModelsArgs(pub Vec<ServedArgs>);

/// One of them.
#[derive(Clone, Debug)]
pub struct ServedArgs {
    /// What clients call it [default: the name it was asked for by].
    pub name: Option<String>,
    pub engine: EngineArgs,
    pub pooling: Option<Pooling>,
    /// Whether its `--memory-fraction` is for it alone; otherwise that is shared by all models of the device.
    pub has_own_fraction: bool,
}

impl ServedArgs {
    /// A model alone, under the name that it was asked for by.
    pub fn new(engine: EngineArgs) -> ServedArgs {
        ServedArgs { name: None, engine, pooling: None, has_own_fraction: false }
    }
}

#[derive(ClapArgs)]
struct Flags {
    #[command(flatten)]
    engine: EngineArgs,
    /// The model's name in the API, where there is one model [default: the name it was asked for by].
    #[arg(long)]
    served_model_name: Option<String>,
    /// last or mean: how hidden states become an embedding, for a model whose files do not say it.
    #[arg(long, value_parser = parse_pooling)]
    pooling: Option<Pooling>,
}

const MODEL: &str = "model";
const NAME: &str = "served_model_name";
const MODEL_HELP: &str = "smollm2, gemma3-270m, a Hugging Face repository (owner/name or owner/name:file), or a path; \
    once for each model to serve. NAME=MODEL names it, and NAME=MODEL,FLAG=VALUE,... gives it flags of an engine of \
    its own, such as chat=a.gguf,device=cpu,kv-memory=2GiB";
/// Each says how large a KV cache is, so that one of a model's own replaces what holds for all.
const SIZES: [&str; 3] = ["kv_blocks", "kv_memory", "memory_fraction"];

impl ClapArgs for ModelsArgs {
    fn augment_args(command: Command) -> Command {
        let append = |arg: clap::Arg| arg.action(ArgAction::Append).value_name("[NAME=]MODEL").help(MODEL_HELP);
        Flags::augment_args(command).mut_arg(MODEL, append)
    }

    fn augment_args_for_update(command: Command) -> Command {
        ModelsArgs::augment_args(command)
    }
}

impl FromArgMatches for ModelsArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<ModelsArgs, Error> {
        let specs: Vec<&String> = matches.get_many(MODEL).into_iter().flatten().collect();
        let is_alone = specs.len() == 1;
        let given = given(matches);
        let names = given.iter().any(|flag| flag.id == NAME);
        if names && !(is_alone && name_of(specs[0]).is_none()) {
            let sentence = "--served-model-name is for one model; name each of several by --model NAME=MODEL\n";
            return Err(Error::raw(ErrorKind::ArgumentConflict, sentence));
        }
        specs.into_iter().map(|spec| served(spec, &given)).collect::<Result<_, _>>().map(ModelsArgs)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = ModelsArgs::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A flag as the command line has it.
struct Given {
    id: String,
    words: Vec<OsString>,
}

fn flags() -> Command {
    Flags::augment_args(Command::new("model")).no_binary_name(true)
}

/// What holds for all models, `--model` apart.
fn given(matches: &ArgMatches) -> Vec<Given> {
    let flags = flags();
    let ids = flags.get_arguments().filter(|flag| flag.get_id() != MODEL);
    let ids = ids.filter(|flag| matches.value_source(flag.get_id().as_str()) == Some(ValueSource::CommandLine));
    let words = |flag: &clap::Arg| {
        let name = OsString::from(format!("--{}", flag.get_long().unwrap_or_default()));
        let values = matches.get_raw(flag.get_id().as_str()).into_iter().flatten().map(OsString::from);
        let values: Vec<OsString> = if flag.get_action().takes_values() { values.collect() } else { Vec::new() };
        std::iter::once(name).chain(values).collect()
    };
    ids.map(|flag| Given { id: flag.get_id().to_string(), words: words(flag) }).collect()
}

/// What is before the first `=`, unless that is part of a path.
fn name_of(spec: &str) -> Option<&str> {
    let (name, _) = spec.split_once('=')?;
    (!name.is_empty() && !name.contains(['/', '\\', ','])).then_some(name)
}

/// `MODEL`, `NAME=MODEL` or `NAME=MODEL,FLAG=VALUE,...`.
fn served(spec: &str, given: &[Given]) -> Result<ServedArgs, Error> {
    let name = name_of(spec);
    let rest = name.map_or(spec, |name| &spec[name.len() + 1..]);
    // Without a name it is all a path.
    let (model, own) = rest.split_once(',').filter(|_| name.is_some()).unwrap_or((rest, ""));
    let own: Vec<&str> = own.split(',').filter(|flag| !flag.is_empty()).collect();
    let refuse = |sentence: &str| {
        let sentence = sentence.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Error::raw(ErrorKind::ValueValidation, format!("--model {spec}: {sentence}\n"))
    };
    let flags = flags();
    let mut own_ids = Vec::new();
    for flag in &own {
        let long = flag.split('=').next().unwrap_or_default();
        let known = flags.get_arguments().find(|known| known.get_long() == Some(long));
        let id = known.map(|known| known.get_id().to_string()).filter(|id| id != MODEL && id != NAME);
        own_ids.push(id.ok_or_else(|| refuse(&format!("{long} is no flag of an engine; serve --help lists them")))?);
    }
    let has_own_size = SIZES.iter().any(|size| own_ids.iter().any(|id| id == size));
    let replaced = |id: &str| own_ids.iter().any(|own| own == id) || has_own_size && SIZES.contains(&id);
    let common = given.iter().filter(|flag| !replaced(&flag.id)).flat_map(|flag| flag.words.iter().cloned());
    let own = own.iter().map(|flag| OsString::from(format!("--{flag}")));
    let words = common.chain(own).chain(["--model".into(), model.into()]);
    let read = flags.try_get_matches_from(words).and_then(|matches| Flags::from_arg_matches(&matches));
    let Flags { engine, served_model_name, pooling } = read.map_err(|error| refuse(&error.to_string()))?;
    let name = name.map(str::to_owned).or(served_model_name);
    let has_own_fraction = own_ids.iter().any(|id| id == "memory_fraction");
    Ok(ServedArgs { name, engine, pooling, has_own_fraction })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Args, Command};
    use super::*;

    fn models(words: &[&str]) -> Result<Vec<ServedArgs>, String> {
        let words = [&["fullbore", "serve"], words].concat();
        let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Serve(args) = args.command else { panic!("serve is serve") };
        Ok(args.models.0)
    }

    #[test]
    fn a_bare_model_is_what_it_was() {
        for bare in ["smollm2", "owner/name:file.gguf", "/a/b=c,d.gguf", "./x=y.gguf", "a,b.gguf"] {
            let [model] = &models(&["--model", bare]).expect(bare)[..] else { panic!("one") };
            assert_eq!((model.engine.model.model.as_str(), &model.name), (bare, &None));
        }
        let [model] = &models(&["--served-model-name", "mine"]).expect("a name")[..] else { panic!("one") };
        assert_eq!((model.engine.model.model.as_str(), model.name.as_deref()), ("smollm2", Some("mine")));
    }

    #[test]
    fn each_model_has_its_own_flags_beside_those_of_all() {
        let words = ["--model", "a=/x/a.gguf,device=cpu,max-num-seqs=4,no-prefix-cache,pooling=last"];
        let words =
            [&words[..], &["--model", "b=b.gguf,kv-memory=1GiB", "--model", "c=c,memory-fraction=0.2"]].concat();
        let words = [&words[..], &["--device", "sim", "--memory-fraction", "0.9", "--max-num-seqs", "8"]].concat();
        let [a, b, c] = &models(&words).expect("three")[..] else { panic!("three") };
        assert_eq!((a.name.as_deref(), a.engine.model.model.as_str()), (Some("a"), "/x/a.gguf"));
        let own = (a.engine.model.device.name.as_str(), a.engine.max_num_seqs, a.engine.no_prefix_cache, a.pooling);
        assert_eq!(own, ("cpu", 4, true, Some(Pooling::Last)));
        assert_eq!((a.engine.memory_fraction, a.has_own_fraction), (Some(0.9), false));
        assert_eq!((b.engine.model.device.name.as_str(), b.engine.max_num_seqs), ("sim", 8));
        assert_eq!((b.engine.kv_memory, b.engine.memory_fraction), (Some(1 << 30), None));
        assert_eq!((c.engine.memory_fraction, c.has_own_fraction), (Some(0.2), true));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let wrong: [(&[&str], &str); 5] = [
            (&["--model", "a=x,kv-memroy=1GiB"], "kv-memroy is no flag of an engine"),
            (&["--model", "a=x,kv-memory=much"], "write a size as"),
            (&["--model", "a=x,model=y"], "model is no flag of an engine"),
            (&["--model", "a=x", "--model", "b=y", "--served-model-name", "z"], "--model NAME=MODEL"),
            (&["--model", "a=x,kv-memory=1GiB,kv-blocks=4"], "cannot be used with"),
        ];
        for (words, part) in wrong {
            let sentence = models(words).expect_err("refused");
            assert!(sentence.contains(part), "{words:?}: {sentence}");
        }
    }
}
