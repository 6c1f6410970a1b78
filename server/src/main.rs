//! The command line: reads arguments, calls the library, and turns an error into one sentence and an exit status.

use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command, LogFormat};
use fullbore::log::{FlushedLog, Log, log_panics};
use fullbore::{bench, device_report, devices, fetch, run, sandbox, serve, simulate, top, tune, verify};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    let talks = matches!(args.command, Command::Serve(_) | Command::Devices | Command::Fetch { .. });
    // Numbers mean little to who does not know which kernels gave them.
    let level = if !talks { "warn,fullbore::tuning=info" } else { "info,wgpu=warn,naga=warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = match Log::to(io::stderr()) {
        Ok(log) => FlushedLog(log),
        Err(error) => {
            eprintln!("fullbore: no thread can be started for the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(log.0.clone());
    match &args.command {
        Command::Serve(args) if args.telemetry.log_format == LogFormat::Json => lines.json().flatten_event(true).init(),
        _ => lines.with_ansi(io::stderr().is_terminal()).init(),
    }
    log_panics();
    match command(args.command, &log.0) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // By the log, for standard error may have nobody who reads it.
            let _ = log.0.clone().write_all(format!("fullbore: {error}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn command(command: Command, log: &Log) -> Result<(), Box<dyn Error>> {
    match command {
        Command::Serve(args) => serve::serve(&args, log)?,
        Command::Run(args) => run::run(&args)?,
        Command::Top(args) => top::top(&args)?,
        Command::Devices => print!("{}", devices::list()?),
        Command::Verify(args) => verify::verify(&args)?,
        Command::Report(args) => device_report::report(&args)?,
        Command::Tune(args) => tune::run(&args)?,
        Command::Fetch { model } => println!("{}", fetch::fetch(&model)?.display()),
        Command::Simulate(args) => simulate::simulate(&args)?,
        Command::TryGrammars => sandbox::serve()?,
        Command::Bench { command: BenchCommand::Offline(args) } => bench::offline(&args)?,
        Command::Bench { command: BenchCommand::Latency(args) } => bench::latency(&args)?,
        Command::Bench { command: BenchCommand::Serve(args) } => bench::serve(&args)?,
        Command::Bench { command: BenchCommand::Sweep(args) } => bench::sweep(&args)?,
        Command::Bench { command: BenchCommand::Startup(args) } => bench::startup(&args)?,
        Command::Bench { command: BenchCommand::Doctor(args) } => bench::doctor(&args)?,
        Command::Bench { command: BenchCommand::Report(args) } => bench::report(&args)?,
        Command::Bench { command: BenchCommand::Schema } => bench::schema(),
        Command::Bench { command: BenchCommand::Profile(args) } => bench::profile(&args)?,
        Command::Bench { command: BenchCommand::Trace(args) } => bench::trace(&args)?,
        Command::Bench { command: BenchCommand::Submit(args) } => bench::submit(&args)?,
        Command::Bench { command: BenchCommand::Ops(args) } => bench::ops(&args)?,
        Command::Bench { command: BenchCommand::Grammar(args) } => bench::grammar(&args)?,
        Command::Bench { command: BenchCommand::Http(args) } => bench::http(&args)?,
    }
    Ok(())
}
