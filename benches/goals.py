#!/usr/bin/env python3
"""Measures the transport's goals: each several times, interleaved, medians of ratios to the floor of the same run.

Usage: benches/goals.py [--runs N] [--seconds S] [--raw FILE] [--only TEXT] [--gate | --record]
(build with `cargo build --release` first)
Prints a Markdown table; raw reports of `doorbell bench --json`, one a line, go to FILE. Exit status 1: a goal was missed.

--gate asks whether the code has become slower: not whether goals are met, but whether the best run of any ratio is worse
than the one that --record kept in benches/gate.json, by more than a quarter. A shared machine makes runs worse and never
better, so the best of several moves least.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
GATE = ROOT / "benches/gate.json"
# By how much the best run may be worse than the recorded one.
TOLERANCE = 1.25
DOORBELL = ROOT / "target/x86_64-unknown-linux-gnu/release/doorbell"

# name, arguments, [(label, ratio of a report, goal, whether at most)]
P50 = ("p50 / floor", lambda r: r["p50_ns"] / r["floor_p50_ns"], 1.2, True)
P99 = ("p99 / floor p99", lambda r: r["p99_ns"] / r["floor_p99_ns"], 2.0, True)


def rate(goal):
    return ("throughput / floor", lambda r: r["per_second"] / r["floor_per_second"], goal, False)


def syscalls():
    return ("system calls of the server per request", lambda r: r["server_syscalls"] / r["requests"], 0.01, True)


GOALS = [
    ("64 B, one in flight", "--size 64", [P50, P99]),
    ("1 KiB, one in flight", "--size 1024", [P50, P99]),
    ("4 KiB, one in flight", "--size 4096", [P50, P99]),
    ("64 B, 64 in flight", "--size 64 --in-flight 64", [rate(0.7), syscalls()]),
    ("1 KiB, 64 in flight", "--size 1024 --in-flight 64", [rate(0.7), syscalls()]),
    ("1 KiB, 1000 connections, 1 session", "--size 1024 --connections 1000", [rate(0.7), syscalls()]),
    ("1 KiB, 1000 connections, 1000 sessions", "--size 1024 --connections 1000 --sessions 1000", [rate(0.4), syscalls()]),
]


def bench(arguments, seconds):
    command = [DOORBELL, "bench", "--json", "--seconds", str(seconds), *arguments.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--raw", type=pathlib.Path)
    parser.add_argument("--only", default="", help="goals whose name holds this text")
    gate = parser.add_mutually_exclusive_group()
    gate.add_argument("--gate", action="store_true", help="fail where a ratio's best run is worse than the recorded one")
    gate.add_argument("--record", action="store_true", help="keep each ratio's best run in benches/gate.json")
    options = parser.parse_args()
    goals_asked = [goal for goal in GOALS if options.only in goal[0]]
    reports = {name: [] for name, _, _ in goals_asked}
    raw = options.raw.open("w") if options.raw else None
    for run in range(options.runs):
        for name, arguments, _ in goals_asked:
            print(f"run {run + 1} of {options.runs}: {name}", file=sys.stderr)
            report = bench(arguments, options.seconds)
            reports[name].append(report)
            if raw:
                print(json.dumps({"goal": name, "run": run + 1, **report}), file=raw, flush=True)
    print("| what | measured | doorbell | floor | median of ratios (all runs) | goal | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    missed = 0
    best = {}
    for name, _, goals in goals_asked:
        runs = reports[name]
        median = lambda key: statistics.median(r[key] for r in runs)
        for label, ratio, goal, at_most in goals:
            ratios = sorted(ratio(r) for r in runs)
            middle = statistics.median(ratios)
            best[f"{name}: {label}"] = ratios[0] if at_most else 1 / ratios[-1]
            met = middle <= goal if at_most else middle >= goal
            missed += not met
            if label.startswith("p50"):
                ours, floor = f"{median('p50_ns'):.0f} ns", f"{median('floor_p50_ns'):.0f} ns"
            elif label.startswith("p99"):
                ours, floor = f"{median('p99_ns'):.0f} ns", f"{median('floor_p99_ns'):.0f} ns"
            elif label.startswith("throughput"):
                ours, floor = f"{median('per_second') / 1e6:.2f} M/s", f"{median('floor_per_second') / 1e6:.2f} M/s"
            else:
                ours, floor = f"{median('server_syscalls'):.0f} in {median('requests') / 1e6:.1f} M", "–"
            spread = ", ".join(f"{r:.2g}" if r < 0.01 else f"{r:.2f}" for r in ratios)
            sign = "≤" if at_most else "≥"
            middle = f"{middle:.2g}" if middle < 0.01 else f"{middle:.2f}"
            print(f"| {name} | {label} | {ours} | {floor} | **{middle}** ({spread}) | {sign} {goal} | {'met' if met else 'missed'} |")
    if options.record:
        GATE.write_text(json.dumps({name: float(f"{value:.3g}") for name, value in best.items()}, indent=2) + "\n")
    if options.gate:
        sys.exit(judge(best, json.loads(GATE.read_text())))
    sys.exit(1 if missed else 0)


def judge(best, recorded):
    """Compares the best runs with the recorded ones, all as ratios of which less is better; returns the exit status."""
    worse = 0
    print("\n| best of all runs, less is better | now | recorded | |\n| --- | --- | --- | --- |")
    for name, now in best.items():
        then = recorded.get(name)
        if then is None:
            sys.exit(f"{name}: not in {GATE.name}, record it with --record")
        # A system call more in millions is no change.
        is_worse = now > max(then * TOLERANCE, 1e-5)
        worse += is_worse
        print(f"| {name} | {now:.3g} | {then:.3g} | {'**worse**' if is_worse else 'no worse'} |")
    return 1 if worse else 0


if __name__ == "__main__":
    main()
