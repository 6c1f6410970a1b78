#!/usr/bin/env python3
"""Throughput against latency on this machine, measured: one JSON file and one picture.

    python3 benches/curve.py target/release/fullbore --device cpu --json out.json --svg out.svg

Two parts. "batch": N requests at once (prompt 16, output 64), tokens a second against the time between two tokens of one
of them. "profiles": requests that keep coming while others are answered, once for each --profile of the server: what the
answers' gaps and the newcomers' first tokens cost each other. Nothing beyond Python's own library.
"""
import argparse
import json
import platform
import subprocess

BATCHES = [1, 2, 4, 8, 16, 32]
PROFILES = ["latency", "balanced", "throughput"]


def run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(fullbore, device, model, rate, limit):
    engine = ["--device", device, "--model", model]
    batches = []
    for batch in BATCHES:
        sizes = ["--limit", str(batch), "--lengths", "fixed:16:64"]
        result = json.loads(run([fullbore, "bench", "offline", *engine, *sizes]))
        summary = result["measurements"][0]["summary"]
        batches.append({"num_requests": batch, "ms_between_tokens": summary["tpot_mean_ms"]["median"],
                        "output_tokens_per_s": summary["output_tokens_per_s"]["median"]})
        print(batches[-1])
    profiles = []
    for profile in PROFILES:
        workload = ["--arrivals", f"poisson:{rate}", "--lengths", "uniform:200-600:32-96", "--limit", str(limit)]
        report = json.loads(run([fullbore, "bench", "trace", *engine, "--profile", profile, *workload]).splitlines()[-1])
        keep = {name: report[name] for name in ["ttft_ms", "itl_ms", "output_tokens_per_s", "mean_rows"]}
        profiles.append({"profile": profile, **keep})
        print(profiles[-1])
    return {"batch": batches, "profiles": profiles}


def cpu_name():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def ticks(most):
    """Round numbers from 0 to `most`, about six of them."""
    step = next(step for k in range(9) for step in (10**k, 2 * 10**k, 5 * 10**k) if most / step <= 7)
    return range(0, int(most) + 1, step)


def svg(result):
    """Tokens a second over milliseconds between tokens, a point a batch size."""
    width, height, left, bottom = 640, 360, 70, 50
    points = [(p["ms_between_tokens"], p["output_tokens_per_s"], p["num_requests"]) for p in result["batch"]]
    most_x, most_y = 1.1 * max(x for x, *_ in points), 1.15 * max(y for _, y, _ in points)
    at = lambda x, y: (left + x / most_x * (width - left - 20), height - bottom - y / most_y * (height - bottom - 20))
    text = lambda x, y, what, anchor="middle": f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{what}</text>'
    font = 'font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>',
             f'<rect width="{width}" height="{height}" fill="white"/>']
    for value in ticks(most_x):
        parts.append(text(at(value, 0)[0], height - bottom + 18, value))
    for value in ticks(most_y):
        y = at(0, value)[1]
        parts += [f'<path d="M{left} {y:.0f}H{width - 20}" stroke="#ddd"/>', text(left - 8, y + 4, value, "end")]
    path = "M" + "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y, _ in points)
    parts.append(f'<path d="{path}" fill="none" stroke="#2a6fb0" stroke-width="2"/>')
    for x, y, batch in points:
        px, py = at(x, y)
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="#2a6fb0"/>', text(px, py - 10, batch)]
    parts += [text((left + width) / 2, height - 12, "milliseconds between the tokens of one answer"),
              f'<g transform="rotate(-90 18 {height / 2:.0f})">{text(18, height / 2, "tokens a second, all answers")}</g>',
              text(left + 10, 18, f"{result['model']} on {result['device']}; numbers: answers at once", "start"), "</svg>"]
    return "\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fullbore")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rate", default="0.35", help="requests a second of the second part")
    parser.add_argument("--limit", type=int, default=24, help="requests of the second part")
    parser.add_argument("--json", required=True)
    parser.add_argument("--svg", required=True)
    args = parser.parse_args()
    result = {"device": args.device, "model": args.model, "machine": cpu_name(),
              "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
              "command": f"curve.py --device {args.device} --model {args.model} --rate {args.rate} --limit {args.limit}",
              **measure(args.fullbore, args.device, args.model, args.rate, args.limit)}
    with open(args.json, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with open(args.svg, "w") as file:
        file.write(svg(result))


if __name__ == "__main__":
    main()
