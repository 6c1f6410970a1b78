//! Processes that try strangers' grammars: this program again, under a hidden command. Invariant: one of them takes
//! bounded memory and a lower priority than what serves, leaves no core file, and ends with the server.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use fullbore_engine::grammar::sandbox::{self, Sandbox};
use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit};

/// The hidden command.
const COMMAND: &str = "try-grammars";

/// Of a process, vocabulary and stack included: the address space that it writes to.
const MAX_BYTES: u64 = 640 << 20;
/// A third of the share of who serves.
const NICE: i32 = 5;

/// Processes for one model.
pub fn sandbox() -> Sandbox {
    Sandbox::new(|| {
        let mut command = Command::new(program());
        // What is typed into the server's terminal is for the server.
        command.arg(COMMAND).process_group(0);
        command
    })
}

/// This program, also where its file was replaced since.
fn program() -> PathBuf {
    match cfg!(target_os = "linux") {
        true => PathBuf::from("/proc/self/exe"),
        false => std::env::current_exe().unwrap_or_default(),
    }
}

/// The command: tries what its standard input says.
pub fn serve() -> io::Result<()> {
    limit(Resource::Data, MAX_BYTES)?;
    limit(Resource::Core, 0)?;
    setpriority_process(None, NICE)?;
    sandbox::serve(io::stdin().lock(), io::stdout())
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    // Nobody may raise what is lower already.
    let most = Some(getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most)));
    Ok(setrlimit(resource, Rlimit { current: most, maximum: most })?)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{self, Args};

    #[test]
    fn the_command_is_known() {
        let args = Args::try_parse_from(["fullbore", COMMAND]).expect("a command");
        assert!(matches!(args.command, args::Command::TryGrammars));
    }
}
