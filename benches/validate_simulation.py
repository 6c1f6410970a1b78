"""Prediction beside reality: three workloads on the simulated device and on the real one, as ratios.

The profile is measured first, by `fullbore bench profile`, on shapes of its own. Then each workload is played against
the real engine in real time (`fullbore bench trace`) and against the simulator (`fullbore simulate`). Rates follow
from the profile: what the simulator takes for capacity is loaded to a share, so that each run takes about --seconds.
Both start with the profile's prices, as a server does that has run before; the real one goes on learning.
Other work on the machine is in the measurements and in no profile: each run waits for a quiet moment, notes which share
of the processors others had meanwhile, and is repeated, --attempts in all, while that is over 5 %; the quietest counts.
Prints a table and, with --out, writes a result file as JSON. Ends with status 1 if a ratio is beyond --tolerance.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

METRICS = [
    ("output tokens/s", lambda report: report["output_tokens_per_s"], True),
    ("p50 between tokens", lambda report: report["itl_ms"]["p50"], True),
    ("p99 between tokens", lambda report: report["itl_ms"]["p99"], True),
    ("p50 first token", lambda report: report["ttft_ms"]["p50"], False),
    ("p99 first token", lambda report: report["ttft_ms"]["p99"], False),
]


def call(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def busy_seconds():
    """Of all processors since the start of the machine; None where there is no /proc."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others_share(run):
    """What `run` gives, and the share of the processors that was not its own."""
    usage = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    own, busy, start = usage(), busy_seconds(), time.monotonic()
    result = run()
    if busy is None:
        return result, 0.0
    foreign = (busy_seconds() - busy) - (usage() - own)
    return result, max(0.0, foreign / (time.monotonic() - start) / os.cpu_count())


QUIET = 0.05


def quietest(args, run):
    """The least disturbed of some runs, with the share of others."""
    best = None
    for _ in range(args.attempts):
        deadline = time.monotonic() + args.patience
        while others_share(lambda: time.sleep(2))[1] > QUIET and time.monotonic() < deadline:
            pass
        result, share = others_share(run)
        print(f"  others had {share:.0%} of the processors", file=sys.stderr)
        if best is None or share < best[1]:
            best = (result, share)
        if best[1] <= QUIET:
            break
    return best


def simulate(args, words):
    return call([args.binary, "simulate", "--profile", args.profile, *words])


def play(args, words):
    return call([args.binary, "bench", "trace", "--model", args.model, "--device", args.device, *args.limits,
                 "--device-profile", args.profile, *words])


def profile(args):
    """What is written is what was measured last, so it is kept beside what it says of itself."""
    fit = call([args.binary, "bench", "profile", "--model", args.model, "--device", args.device, *args.limits,
                "--seconds", str(args.profile_seconds), "--output", args.profile])
    with open(args.profile) as file:
        return fit, file.read()


def workloads(args):
    """Name and command-line words of each, loaded to a share of the capacity that the simulator predicts."""

    def requests_a_second(words):
        report = simulate(args, [*words, "--arrivals", "at-once", "--limit", "200"])
        return report["num_completed"] / report["duration_s"]

    for path in args.trace:
        capacity = requests_a_second(["--trace", path])
        limit = max(8, round(0.7 * capacity * args.seconds))
        words = ["--trace", path, "--limit", str(limit)]
        # The pace at which these arrivals take as long as wanted.
        slow, fast = 0.001, 1000.0
        for _ in range(24):
            pace = (slow * fast) ** 0.5
            if simulate(args, [*words, "--speedup", f"{pace:.5f}"])["duration_s"] > args.seconds:
                slow = pace
            else:
                fast = pace
        yield os.path.basename(path), [*words, "--speedup", f"{fast:.5f}"]
    generated = [
        ("Poisson, log-normal lengths", 0.7, "lognormal:160:80:0.8", "poisson"),
        ("bursts of 8, uniform lengths", 0.6, "uniform:32-384:16-96", "burst"),
        ("all at once, long prompts", 1.0, "uniform:256-768:24-64", "at-once"),
    ]
    for name, load, lengths, kind in generated[: max(0, 3 - len(args.trace))]:
        rate = load * requests_a_second(["--lengths", lengths])
        arrivals = {"poisson": f"poisson:{rate:.4f}", "burst": f"burst:8:{8 / rate:.3f}", "at-once": "at-once"}[kind]
        limit = max(8, round(rate * args.seconds))
        yield name, ["--lengths", lengths, "--arrivals", arrivals, "--limit", str(limit), "--seed", "7"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/fullbore")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", default="target/validate-device.json", help="written first, unless --keep-profile")
    parser.add_argument("--keep-profile", action="store_true")
    parser.add_argument("--profile-seconds", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=90, help="of each workload, about")
    parser.add_argument("--trace", action="append", default=[], help="a trace file in place of a generated workload")
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet moment")
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--out")
    args = parser.parse_args()
    args.limits = ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "2048",
                   "--kv-memory", "512MiB"]
    fit = share = None
    if not args.keep_profile:
        print("measuring the device", file=sys.stderr)
        (fit, text), share = quietest(args, lambda: profile(args))
        with open(args.profile, "w") as file:
            file.write(text)
    rows, beyond = [], 0
    for name, words in workloads(args):
        print(f"playing: {name}", file=sys.stderr)
        real, others = quietest(args, lambda: play(args, words))
        simulated = simulate(args, words)
        assert real["num_completed"] == simulated["num_completed"] > 0, (real, simulated)
        ratios = {metric: take(simulated) / max(take(real), 1e-9) for metric, take, _ in METRICS}
        beyond += sum(abs(ratios[metric] - 1) > args.tolerance for metric, _, counts in METRICS if counts)
        rows.append({"workload": name, "words": words, "others_share": others, "ratios": ratios, "real": real,
                     "simulated": simulated})
    print(f"\n{'prediction / reality':32}" + "".join(f"{metric:>20}" for metric, _, _ in METRICS))
    for row in rows:
        print(f"{row['workload']:32}" + "".join(f"{row['ratios'][metric]:20.2f}" for metric, _, _ in METRICS))
    if args.out:
        with open(args.profile) as file:
            device = json.load(file)["device"]
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True)
        result = {"when": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "machine": device["name"],
                  "driver": device["driver"], "system": platform.platform(), "model": args.model,
                  "command": "scripts/validate-simulation.sh", "limits": args.limits, "fit": fit,
                  "fit_others_share": share, "rows": rows}
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    if beyond:
        sys.exit(f"{beyond} of {3 * len(rows)} ratios are off by more than {args.tolerance:.0%}; was the machine quiet?")


main()
