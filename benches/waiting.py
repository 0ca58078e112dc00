#!/usr/bin/env python3
"""Measures what the wait policies cost, and plots it: latency against think time, server CPU against rate, goals.

Usage: benches/waiting.py [--runs N] [--seconds S] [--only TEXT] [--plot-only] [--write]
       (build with `cargo build --release` first)

Every configuration is measured once a round, round after round, so that a slow phase of the machine meets all of
them; figures are medians over the rounds, and a ratio is one of the same round. Raw reports of `doorbell bench --json`
go to docs/raw/waiting.jsonl, one a line: --only measures the configurations whose name holds TEXT again and keeps the
rest, --plot-only measures nothing. Plots go to docs/plots/, tables to stdout and, with --write, into docs/waiting.md.
Exit status 1: a goal was missed or a run failed.
"""
import argparse
import datetime
import html
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
DOORBELL = TARGET / "x86_64-unknown-linux-gnu/release/doorbell"
RAW = ROOT / "docs/raw/waiting.jsonl"
PLOTS = ROOT / "docs/plots"
PAGE = ROOT / "docs/waiting.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"

THINK_US = [0, 10, 100, 1000, 10_000]
RATES = [1_000, 10_000, 50_000, 100_000, 200_000]

HANDOFF = ("handoff", "--policy handoff --placement unpinned")
SPIN = ("spin", "--policy spin --placement apart")
BLOCK = ("block", "--policy block --placement apart")
UDS_APART = ("unix socket, apart", "--peer uds --policy block --placement apart")
UDS_SAME = ("unix socket, same core", "--peer uds --policy block --placement same")
UDS_UNPINNED = ("unix socket, unpinned", "--peer uds --policy block --placement unpinned")
UDS_SPIN = ("unix socket, spin", "--peer uds --policy spin --placement apart")
LATENCY_SERIES = [HANDOFF, SPIN, BLOCK, UDS_SAME, UDS_UNPINNED, UDS_APART]
RATE_SERIES = [HANDOFF, SPIN, BLOCK, UDS_APART, UDS_SPIN]


class Configuration:
    """One thing to measure: a name, arguments of `doorbell bench`, and the window it needs, seconds."""

    def __init__(self, name, arguments, seconds=None, at_least=0.0):
        self.name = name
        self.arguments = arguments
        self.fixed = seconds
        self.at_least = at_least

    def seconds(self, asked):
        return self.fixed if self.fixed is not None else max(asked, self.at_least)


def think(series, think_us):
    return f"latency, {series[0]}, {think_us} µs"


def rate(series, per_second):
    return f"rate, {series[0]}, {per_second}/s"


HOGS = "goals, cold call beside busy processes"
IDLE_ONE = "goals, 1000 idle connections of 1 session"
IDLE_MANY = "goals, 1000 idle sessions"
PROBE = "goals, probe beside bulk"
BULK = "goals, bulk without a probe"
FLOOR = "goals, floor of the probe"
BUSY = "goals, core of a busy reactor"


def configurations():
    found = []
    for think_us in THINK_US:
        for series in LATENCY_SERIES:
            # A p99 wants some hundred calls.
            found.append(
                Configuration(
                    think(series, think_us),
                    f"{series[1]} --size 1024 --think-us {think_us}",
                    at_least=300 * think_us / 1e6,
                )
            )
    for per_second in RATES:
        for series in RATE_SERIES:
            # Enough calls in flight that a request which is due need not wait for one to come back.
            arguments = f"{series[1]} --size 1024 --in-flight 64 --rate {per_second}"
            found.append(Configuration(rate(series, per_second), arguments))
    bulk = "--policy spin --placement apart --connections 999 --size 4096"
    found += [
        Configuration(HOGS, f"{HANDOFF[1]} --size 1024 --think-us 1000 --hogs"),
        Configuration(IDLE_ONE, "--idle --policy handoff --connections 1000", seconds=10),
        Configuration(IDLE_MANY, "--idle --policy handoff --connections 1000 --sessions 1000", seconds=10),
        Configuration(PROBE, f"{bulk} --probe 1024"),
        Configuration(BULK, bulk),
        Configuration(FLOOR, "--peer floor --size 1024"),
        Configuration(BUSY, "--policy spin --placement same --size 1024"),
    ]
    return found


# --- Goals: what is measured of one round, and what it should be.


def ns(value):
    if value < 10_000:
        return f"{value:.0f} ns"
    return f"{value / 1e3:.1f} µs" if value < 10_000_000 else f"{value / 1e6:.1f} ms"


def percent(value):
    return f"{value:.3g} %"


def times(value):
    return f"{value:.3g}"


def count(value):
    return f"{value:.0f}"


def of(name, key):
    return lambda round_: round_[name][key]


def machine_percent(report):
    return report["server_cpu_percent"] / report["machine_cores"]


def wakeups_beyond_sweeps(name):
    """A sweep may or may not be counted as a wakeup. Where there are fewer wakeups than sweeps, none of them is one."""

    def value(round_):
        wakeups, sweeps = round_[name]["server_wakeups"], round_[name]["server_sweeps"]
        return wakeups - sweeps if wakeups >= sweeps else wakeups

    return value


def ratio(ours, theirs):
    return lambda round_: ours(round_) / theirs(round_)


def uds_best(round_):
    return min(round_[think(series, 1000)]["p50_ns"] for series in (UDS_SAME, UDS_UNPINNED, UDS_APART))


COLD = think(HANDOFF, 1000)
OPEN_HANDOFF = rate(HANDOFF, 100_000)
OPEN_SPIN = rate(SPIN, 100_000)
AT_MOST, BELOW, AT_LEAST, EQUAL = "≤", "<", "≥", "="
HOLDS = {
    AT_MOST: lambda value, goal: value <= goal,
    BELOW: lambda value, goal: value < goal,
    AT_LEAST: lambda value, goal: value >= goal,
    EQUAL: lambda value, goal: value == goal,
}

# what, which figure, its value in a round, how it is written, sign, goal (None: only reported)
COLD_CALL = "cold call, handoff, unpinned, 1 KiB, 1 ms between calls"
OPEN_LOOP = "100 k calls/s of 1 KiB, open loop"
BESIDE_BULK = "probe of 1 KiB beside 999 bulk connections of 4 KiB, spin, apart"
GOALS = [
    (COLD_CALL, "p50", of(COLD, "p50_ns"), ns, AT_MOST, 4000),
    (COLD_CALL, "p50 / unix socket, its best placement", ratio(of(COLD, "p50_ns"), uds_best), times, AT_MOST, 0.6),
    (
        COLD_CALL,
        "p50 / unix socket, apart",
        ratio(of(COLD, "p50_ns"), of(think(UDS_APART, 1000), "p50_ns")),
        times,
        AT_MOST,
        0.08,
    ),
    (COLD_CALL, "p99", of(COLD, "p99_ns"), ns, AT_MOST, 25_000),
    (COLD_CALL, "server, of one core", of(COLD, "server_cpu_percent"), percent, BELOW, 1),
    ("the same with a busy process on every core", "p50", of(HOGS, "p50_ns"), ns, AT_MOST, 6000),
    (OPEN_LOOP, "handoff, server, of the machine", lambda r: machine_percent(r[OPEN_HANDOFF]), percent, AT_MOST, 10),
    (OPEN_LOOP, "handoff, p99", of(OPEN_HANDOFF, "p99_ns"), ns, AT_MOST, 100_000),
    (OPEN_LOOP, "spin, p99", of(OPEN_SPIN, "p99_ns"), ns, AT_MOST, 10_000),
    (OPEN_LOOP, "spin, server, of the machine", lambda r: machine_percent(r[OPEN_SPIN]), percent, None, None),
    ("1000 idle connections of 1 session, 10 s", "wakeups beyond sweeps", wakeups_beyond_sweeps(IDLE_ONE), count, EQUAL, 0),
    ("1000 idle connections of 1 session, 10 s", "server, of one core", of(IDLE_ONE, "server_cpu_percent"), percent, BELOW, 0.1),
    ("1000 idle sessions, 10 s", "wakeups beyond sweeps", wakeups_beyond_sweeps(IDLE_MANY), count, EQUAL, 0),
    ("1000 idle sessions, 10 s", "server, of one core", of(IDLE_MANY, "server_cpu_percent"), percent, BELOW, 0.5),
    (BESIDE_BULK, "p99", of(PROBE, "probe_p99_ns"), ns, BELOW, 5000),
    (BESIDE_BULK, "p99.9", of(PROBE, "probe_p999_ns"), ns, BELOW, 10_000),
    (BESIDE_BULK, "max", of(PROBE, "probe_max_ns"), ns, None, None),
    (BESIDE_BULK, "floor, one call of 1 KiB in flight: max", of(FLOOR, "floor_max_ns"), ns, None, None),
    (BESIDE_BULK, "floor of the bulk load itself: max", of(PROBE, "floor_max_ns"), ns, None, None),
    (
        BESIDE_BULK,
        "bulk throughput / the same without a probe",
        ratio(of(PROBE, "per_second"), of(BULK, "per_second")),
        times,
        AT_LEAST,
        0.8,
    ),
    ("client on the core of a busy reactor, spin, 1 KiB", "p99", of(BUSY, "p99_ns"), ns, AT_MOST, 100_000),
]


# --- Measuring.


def bench(configuration, asked):
    """One report; `None` if the run failed, which has been said on stderr."""
    seconds = configuration.seconds(asked)
    command = [DOORBELL, "bench", "--json", "--seconds", f"{seconds:g}", *configuration.arguments.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(f"doorbell {' '.join(command[1:])}: exit status {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def read_raw():
    if not RAW.exists():
        return []
    return [json.loads(line) for line in RAW.read_text().splitlines() if line.strip()]


def measure(options):
    """Measures what was asked for, writes the raw file anew with it; returns whether every run went well."""
    asked = [c for c in configurations() if options.only in c.name]
    if not asked:
        sys.exit(f"no configuration's name holds `{options.only}`")
    if not DOORBELL.exists():
        sys.exit("the command is not built: cargo build --release")
    again = {c.name for c in asked}
    known = {c.name for c in configurations()}
    kept = [line for line in read_raw() if line["name"] in known - again]
    well = True
    RAW.parent.mkdir(parents=True, exist_ok=True)
    with RAW.open("w") as raw:
        for line in kept:
            print(json.dumps(line, ensure_ascii=False), file=raw, flush=True)
        for run in range(options.runs):
            for i, configuration in enumerate(asked):
                progress = f"run {run + 1} of {options.runs}, {i + 1} of {len(asked)}: {configuration.name}"
                print(progress, file=sys.stderr)
                report = bench(configuration, options.seconds)
                if report is None:
                    well = False
                    continue
                date = datetime.date.today().isoformat()
                line = {"name": configuration.name, "run": run + 1, "date": date, **report}
                print(json.dumps(line, ensure_ascii=False), file=raw, flush=True)
    return well


class Measured:
    """All reports, by round and by name."""

    def __init__(self, lines):
        self.lines = lines
        self.rounds = {}
        for line in lines:
            self.rounds.setdefault(line["run"], {})[line["name"]] = line

    def values(self, value):
        """The value of each round that has what it takes."""
        found = []
        for run in sorted(self.rounds):
            try:
                found.append(value(self.rounds[run]))
            except (KeyError, TypeError, ZeroDivisionError):
                continue  # Not measured in this round, or null.
        return found

    def median(self, value):
        values = self.values(value)
        return statistics.median(values) if values else None


# --- Tables.


def goals_table(measured):
    rows = ["| what | figure | median (all runs) | goal | |", "| --- | --- | --- | --- | --- |"]
    missed = 0
    for what, figure, value, write, sign, goal in GOALS:
        values = sorted(measured.values(value))
        if not values:
            rows.append(f"| {what} | {figure} | – | {f'{sign} {write(goal)}' if sign else ''} | not measured |")
            continue
        middle = statistics.median(values)
        verdict = ""
        if sign:
            met = HOLDS[sign](middle, goal)
            missed += not met
            verdict = "met" if met else "missed"
        spread = ", ".join(write(v) for v in values)
        wanted = f"{sign} {write(goal)}" if sign else "reported"
        rows.append(f"| {what} | {figure} | **{write(middle)}** ({spread}) | {wanted} | {verdict} |")
    return rows, missed


def cell(measured, name, keys):
    parts = []
    for value, write in keys:
        middle = measured.median(lambda round_, value=value: value(round_[name]))
        parts.append("–" if middle is None else write(middle))
    return " / ".join(parts)


def think_label(think_us):
    return "0" if think_us == 0 else f"{think_us} µs" if think_us < 1000 else f"{think_us // 1000} ms"


def rate_label(per_second):
    return f"{per_second // 1000} k/s"


def latency_table(measured):
    rows = ["| p50 / p99, 1 KiB, time between calls: | " + " | ".join(map(think_label, THINK_US)) + " |"]
    rows.append("| --- |" + " --- |" * len(THINK_US))
    keys = [(lambda r: r["p50_ns"], ns), (lambda r: r["p99_ns"], ns)]
    for series in LATENCY_SERIES:
        cells = [cell(measured, think(series, think_us), keys) for think_us in THINK_US]
        rows.append(f"| {series[0]} | " + " | ".join(cells) + " |")
    return rows


def rate_table(measured):
    rows = ["| p99 / server CPU of the machine, 1 KiB | " + " | ".join(map(rate_label, RATES)) + " |"]
    rows.append("| --- |" + " --- |" * len(RATES))
    keys = [(lambda r: r["p99_ns"], ns), (machine_percent, percent)]
    for series in RATE_SERIES:
        cells = []
        for per_second in RATES:
            name = rate(series, per_second)
            text = cell(measured, name, keys)
            reached = measured.median(of(name, "per_second"))
            if reached is not None and reached < 0.95 * per_second:
                text += f" (only {reached / 1000:.3g} k/s)"
            cells.append(text)
        rows.append(f"| {series[0]} | " + " | ".join(cells) + " |")
    return rows


def fragment(measured):
    """The tables as Markdown, and how many goals were missed."""
    goals, missed = goals_table(measured)
    dates = sorted({line["date"] for line in measured.lines})
    cores = max((line["machine_cores"] for line in measured.lines), default=0)
    windows = sorted({line["seconds"] for line in measured.lines})
    said = "nothing measured yet"
    if measured.lines:
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        span = f"{windows[0]:g}" if len(windows) == 1 else f"{windows[0]:g} to {windows[-1]:g}"
        said = f"{when}, {cores} cores, medians of {max(measured.rounds)} runs, windows of {span} s"
    parts = [[f"Measured: {said}."], goals, latency_table(measured), rate_table(measured)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n", missed


def write_into_page(text):
    page = PAGE.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        sys.exit(f"{PAGE.name} has no block between {BEGIN} and {END}")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


# --- Plots.

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 184, 54, 58
LABEL_GAP = 16
CLASSES = {
    HANDOFF[0]: "handoff",
    SPIN[0]: "spin",
    BLOCK[0]: "block",
    UDS_SAME[0]: "uds dash-short",
    UDS_UNPINNED[0]: "uds dash-dot",
    UDS_APART[0]: "uds dash-long",
    UDS_SPIN[0]: "uds dash-short",
}
LIGHT = {"ink": "#1f2328", "soft": "#59636e", "faint": "#d8dee4"}
LIGHT |= {"handoff": "#0a62c4", "spin": "#c2410c", "block": "#7c3aad", "uds": "#6e7781"}
DARK = {"ink": "#e6edf3", "soft": "#9aa4ae", "faint": "#30363d"}
DARK |= {"handoff": "#58a6ff", "spin": "#ff9b57", "block": "#c997f5", "uds": "#9aa4ae"}
SHAPES = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
  .title { font-size: 15px; font-weight: 600; }
  .label { font-weight: 600; }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
  .handoff .line { stroke-width: 3.5; }
  .range { stroke-width: 1.5; opacity: 0.45; }
  .lead { opacity: 0.5; }
  .dash-short .line { stroke-dasharray: 3 4; }
  .dash-long .line { stroke-dasharray: 9 4; }
  .dash-dot .line { stroke-dasharray: 9 3 2 3; }
"""


def colours(palette):
    """Rules without custom properties, which not every renderer knows."""
    rules = [f"text {{ fill: {palette['ink']}; }}", f".soft {{ fill: {palette['soft']}; }}"]
    rules += [f".axis {{ stroke: {palette['soft']}; }}", f".grid {{ stroke: {palette['faint']}; }}"]
    for name in ("handoff", "spin", "block", "uds"):
        rules.append(f".{name} .line, .{name} .range, .{name} .lead {{ stroke: {palette[name]}; }}")
        rules.append(f".{name} .dot, .{name} .label {{ fill: {palette[name]}; }}")
    return "".join(f"  {rule}\n" for rule in rules)


STYLE = f"{SHAPES}{colours(LIGHT)}  @media (prefers-color-scheme: dark) {{\n{colours(DARK)}  }}\n"


class Axis:
    """Positions of a logarithmic axis. Zero, which has none, stands a decade before the first other value."""

    def __init__(self, low, high, start, end):
        self.low, self.high, self.start, self.end = math.log10(low), math.log10(high), start, end

    def at(self, value):
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def decades(values):
    low = 10 ** math.floor(math.log10(min(values)))
    high = 10 ** math.ceil(math.log10(max(values)))
    return low, high if high > low else low * 10


def spread_labels(ends):
    """Moves labels apart that would overlap, as little as keeps their order and the plot's height."""
    ends = sorted(ends)
    places = [y for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    if places:
        places[-1] = min(places[-1], HEIGHT - BOTTOM + 4)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - LABEL_GAP)
    return [(place, y, name) for place, (y, name) in zip(places, ends)]


def plot(title, x_title, series, x_ticks, y_label):
    """One SVG. `series`: name -> [(x, lowest, median, highest)]; `x_ticks`: x -> label, 0 allowed as the first."""
    values = [v for points in series.values() for _, *three in points for v in three if v > 0]
    if not values:
        return None
    smallest = min(x for x in x_ticks if x > 0)
    zero = smallest / 10
    xs = [x if x > 0 else zero for x in x_ticks]
    x_axis = Axis(min(xs), max(xs), LEFT + 14, WIDTH - RIGHT - 8)
    low, high = decades(values)
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP)
    x_at = lambda x: x_axis.at(x if x > 0 else zero)
    y_at = lambda y: y_axis.at(max(y, low))

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="24">{html.escape(title)}</text>',
    ]
    right = WIDTH - RIGHT
    decade = low
    while decade <= high * 1.001:
        y = y_axis.at(decade)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{y_label(decade)}</text>')
        decade *= 10
    bottom = HEIGHT - BOTTOM
    out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for x, label in x_ticks.items():
        at = x_at(x)
        out.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        out.append(f'<text class="soft" text-anchor="middle" x="{at:.1f}" y="{bottom + 20}">{label}</text>')
    if 0 in x_ticks:
        # The axis is broken between 0 and the rest.
        middle = (x_at(0) + x_at(smallest)) / 2
        for shift in (-3, 3):
            x = middle + shift
            out.append(f'<line class="axis" x1="{x - 3:.1f}" x2="{x + 3:.1f}" y1="{bottom + 5}" y2="{bottom - 5}"/>')
    out.append(
        f'<text class="soft" text-anchor="middle" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 14}">{html.escape(x_title)}</text>'
    )

    ends = []
    # The thick line of the default is drawn last, above the others.
    for name in reversed([name for name in series if series[name]]):
        points = series[name]
        out.append(f'<g class="{CLASSES[name]}">')
        for x, least, _, most in points:
            if most > least:
                at = x_at(x)
                out.append(
                    f'<line class="range" x1="{at:.1f}" x2="{at:.1f}" y1="{y_at(least):.1f}" y2="{y_at(most):.1f}"/>'
                )
        path = " ".join(f"{x_at(x):.1f},{y_at(middle):.1f}" for x, _, middle, _ in points)
        out.append(f'<polyline class="line" points="{path}"/>')
        for x, _, middle, _ in points:
            out.append(f'<circle class="dot" cx="{x_at(x):.1f}" cy="{y_at(middle):.1f}" r="3.2"/>')
        out.append("</g>")
        ends.append((y_at(points[-1][2]), name))
    for place, y, name in spread_labels(ends):
        last = x_at(series[name][-1][0])
        out.append(f'<g class="{CLASSES[name]}">')
        out.append(f'<line class="lead" x1="{last + 5:.1f}" x2="{right + 10}" y1="{y:.1f}" y2="{place:.1f}"/>')
        out.append(f'<text class="label" x="{right + 14}" y="{place + 4:.1f}">{html.escape(name)}</text>')
        out.append("</g>")
    out.append("</svg>\n")
    return "\n".join(out)


def curves(measured, all_series, xs, name, value):
    found = {}
    for series in all_series:
        points = []
        for x in xs:
            values = measured.values(lambda round_, x=x: value(round_[name(series, x)]))
            if values:
                points.append((x, min(values), statistics.median(values), max(values)))
        found[series[0]] = points
    return found


def time_label(value):
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} ns"


def write_plots(measured):
    thinks = {think_us: think_label(think_us) for think_us in THINK_US}
    rates = {per_second: rate_label(per_second) for per_second in RATES}
    between, per_second = "time between calls (1 KiB, one in flight)", "calls per second (1 KiB, open loop)"
    p50, p99 = (lambda r: r["p50_ns"]), (lambda r: r["p99_ns"])
    plots = [
        ("latency-p50", "Median latency of a call", between, LATENCY_SERIES, thinks, think, p50, time_label),
        ("latency-p99", "Latency of a call, 99th percentile", between, LATENCY_SERIES, thinks, think, p99, time_label),
        (
            "rate-cpu",
            "Processor time of the server, of the whole machine",
            per_second,
            RATE_SERIES,
            rates,
            rate,
            machine_percent,
            lambda v: f"{v:g} %",
        ),
        ("rate-p99", "Latency of a call, 99th percentile", per_second, RATE_SERIES, rates, rate, p99, time_label),
    ]
    PLOTS.mkdir(parents=True, exist_ok=True)
    for file, title, x_title, all_series, ticks, name, value, label in plots:
        svg = plot(title, x_title, curves(measured, all_series, ticks, name, value), ticks, label)
        if svg is not None:
            (PLOTS / f"{file}.svg").write_text(svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window where a goal does not fix it (default 2)")
    parser.add_argument("--only", default="", help="measure configurations whose name holds this text: latency, rate, goals, ...")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing, render docs/raw/waiting.jsonl again")
    parser.add_argument("--write", action="store_true", help="replace the measured block in docs/waiting.md")
    options = parser.parse_args()
    well = options.plot_only or measure(options)
    measured = Measured(read_raw())
    text, missed = fragment(measured)
    write_plots(measured)
    if options.write:
        write_into_page(text)
    print(text, end="")
    sys.exit(0 if well and not missed else 1)


if __name__ == "__main__":
    main()
