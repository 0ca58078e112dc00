#!/usr/bin/env python3
"""Measures the goals of long bodies and of memory: each several times, in turn, medians, ratios to the floor of the same run.

Usage: benches/bodies.py [--runs N] [--seconds S] [--raw FILE] [--only TEXT]   (build with `cargo build --release` first)
Prints a Markdown table; raw reports of `doorbell bench --json`, one a line, go to FILE
(docs/raw/DATE-bodies.jsonl unless told otherwise). Exit status 1: a goal was missed.
"""
import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys

from goals import DOORBELL, ROOT, bench

MIB = 1 << 20
LIMIT = 3 * MIB


def us(value):
    return f"{value / 1e3:.1f} µs" if value < 10_000_000 else f"{value / 1e6:.2f} ms"


def mib(value):
    return f"{value / MIB:.3f} MiB"


def times(value):
    return f"{value:.2f}"


def count(value):
    return f"{value:.1f}"


def key(name):
    return lambda report: report[name]


# label, its value in a report, how it is written, goal (at most; None: only reported)
def p50(goal):
    return ("p50", key("p50_ns"), us, goal)


FLOOR_P50 = ("floor p50", key("floor_p50_ns"), us, None)
RATIO = ("p50 / floor", lambda r: r["p50_ns"] / r["floor_p50_ns"], times, None)
THROUGHPUT = ("throughput / floor", lambda r: r["per_second"] / r["floor_per_second"], times, None)
PEAK = ("footprint, highest", key("footprint_bytes"), mib, LIMIT)
AFTER = ("footprint 1 s after", key("footprint_after_bytes"), mib, LIMIT)
FRAMES = ("answer frames per request", lambda r: r["frames"] / max(r["requests"], 1), count, None)
PROBE = ("probe p99 / alone", lambda r: r["probe_p99_ns"] / r["probe_alone_p99_ns"], times, 3)
PROBE_P99 = ("probe p99", key("probe_p99_ns"), us, None)
PROBE_ALONE = ("probe p99 alone", key("probe_alone_p99_ns"), us, None)
CONNECT = ("last session connected", lambda r: r["connect_last_ms"] * 1e6, us, None)


def grown(sessions):
    """The budget of so many sessions: 10 KiB more for each beyond the hundredth."""
    limit = LIMIT + max(0, sessions - 100) * (10 << 10)
    return ("footprint, highest", key("footprint_bytes"), mib, limit)


BODY = [FLOOR_P50, RATIO, THROUGHPUT, FRAMES, PEAK, AFTER]
GOALS = [
    ("1 MiB alone", "--size 1048576", [p50(150_000), *BODY]),
    ("10 MiB alone", "--size 10485760", [p50(1_600_000), *BODY]),
    ("1 MiB, 4 connections at once", "--size 1048576 --connections 4", [p50(None), *BODY]),
    ("10 MiB, 4 connections at once", "--size 10485760 --connections 4", [p50(None), *BODY]),
    ("1 MiB, unix socket", "--peer uds --size 1048576", [p50(None), RATIO]),
    (
        "1 KiB probe beside 100 connections of 1 MiB",
        "--size 1048576 --connections 100 --probe 1024",
        [PROBE, PROBE_P99, PROBE_ALONE, p50(None), THROUGHPUT, FRAMES, PEAK, AFTER],
    ),
    ("1000 connections, 1 process, 1 KiB", "--size 1024 --connections 1000", [PEAK, AFTER]),
    (
        "100 sessions of 100 processes, 1 KiB",
        "--size 1024 --connections 100 --sessions 100 --processes 100",
        [PEAK, AFTER],
    ),
    (
        "1000 sessions, 1 KiB",
        "--size 1024 --connections 1000 --sessions 1000",
        [grown(1000), CONNECT],
    ),
]
# Measured as soon as the command knows the option.
STORM = ("1000 sessions beside 500 half-open ones", "--connections 1000 --sessions 1000 --half-open 500 --connect-only", [CONNECT])


def goals():
    known = subprocess.run([DOORBELL, "bench", "--help"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return GOALS + [STORM] if "--half-open" in known else GOALS


def rows(name, wanted, reports):
    """Rows of the table, and how many goals were missed."""
    missed = 0
    lines = []
    for label, value, write, goal in wanted:
        values = sorted(value(report) for report in reports)
        middle = statistics.median(values)
        verdict = "" if goal is None else "met" if middle <= goal else "missed"
        missed += verdict == "missed"
        spread = ", ".join(map(write, values))
        limit = "" if goal is None else f"≤ {write(goal)}"
        lines.append(f"| {name} | {label} | **{write(middle)}** | {spread} | {limit} | {verdict} |")
    return lines, missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--raw", type=pathlib.Path, default=ROOT / f"docs/raw/{datetime.date.today()}-bodies.jsonl")
    parser.add_argument("--only", default="", help="goals whose name holds this text")
    options = parser.parse_args()
    if not DOORBELL.exists():
        sys.exit("the command is not built: cargo build --release")
    asked = [goal for goal in goals() if options.only in goal[0]]
    if not asked:
        sys.exit(f"no goal's name holds `{options.only}`")
    reports = {name: [] for name, _, _ in asked}
    with options.raw.open("w") as raw:
        for run in range(options.runs):
            for name, arguments, _ in asked:
                print(f"run {run + 1} of {options.runs}: {name}", file=sys.stderr)
                report = bench(arguments, options.seconds)
                reports[name].append(report)
                print(json.dumps({"goal": name, "run": run + 1, **report}), file=raw, flush=True)
    print("| what | figure | median | all runs | goal | |")
    print("| --- | --- | --- | --- | --- | --- |")
    missed = 0
    for name, _, wanted in asked:
        lines, here = rows(name, wanted, reports[name])
        print("\n".join(lines))
        missed += here
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
