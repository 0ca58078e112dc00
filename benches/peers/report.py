#!/usr/bin/env python3
"""Makes docs/benchmarks.md and its plots from what run.py kept.

Usage: benches/peers/report.py [--anew PEER,...] [RAW ...]   (without a file: the docs/raw/peers-*.jsonl that was written last)

Of several files all runs count, but of the peers `--anew`, which were used otherwise in the earlier ones, only the last.
"""
import argparse
import copy
import json
import pathlib
import statistics
import sys

from plots import bars, curves

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "docs/benchmarks.md"
PLOTS = ROOT / "docs/plots"
US = "doorbell"
BARE = "bare-ring"
NODE = ["node-net", "node-json", "node-clone"]
ABOUT = {
    "doorbell": "this library: one session, calls in its slots",
    "node-net": "Node.js, `net` over a unix socket, binary frames",
    "node-json": "Node.js, `child_process.fork`, JSON with base64 bodies",
    "node-clone": "Node.js, `child_process.fork`, `serialization: 'advanced'`",
    "unix-socket": "blocking unix stream socket in Rust, epoll for many connections; polling: non-blocking reads",
    "tokio": "tokio over a unix stream socket, one thread",
    "tokio-uring": "tokio-uring over a unix stream socket",
    "iceoryx2": "iceoryx2 request-response; sleeping: woken by its events",
    "ipc-channel": "ipc-channel, a pair of channels a connection",
    "grpc": "gRPC (tonic) over a unix socket, unary calls",
    "shmipc": "shmipc, a stream for each call in flight",
    "aeron": "Aeron over its IPC channel, its driver in a process of its own; sleeping: 50 µs naps",
}
FAIRNESS = """
- Every peer is a server and a client in two processes. Both do the same work: the server answers with every word of the
  request XOR a constant, the client makes every request of a nonce of its own and checks every word of every answer. A run
  with one wrong answer does not count.
- One clock (CLOCK_MONOTONIC), one way of timing, from before a request is made until its answer has been checked. With one
  call in flight each is timed, with several one in sixteen.
- Fresh processes for every run; peers take turns (A B C A B C ...); the tables have medians of all rounds, and in brackets
  the lowest and the highest; what comes before the window does not count.
- Each peer is used as somebody would who knows it: everything that has come on a socket is answered in one write, iceoryx2
  and Aeron write into loaned or claimed memory, Aeron's terms are touched
  beforehand and as small as what is in flight allows, its driver looks every 20 µs where others poll, gRPC and shmipc have a stream
  for each call in flight. Bodies that come in parts, as doorbell's of 1 MiB do, are made and checked part by part.
- Warm runs poll on both sides where the peer can; cold runs sleep on both sides. Where a peer can do both, both are run, and
  its better one counts, for doorbell by the same rule.
- Cold calls come a millisecond after the last one. They are run with server and client on two cores, both on one core, and
  wherever the scheduler puts them; each peer's best placement counts.
- All Rust peers are built alike (optimised, thin LTO, one codegen unit).
- Memory is what the server costs: the resident set of its processes (Aeron's driver is one) and every page shared with them
  that exists and is not in that resident set. Kernel memory, such as sockets and their buffers, is not in it, and has a
  column of its own: by how much the kernel's memory grew with server and client, roughly.
"""


BARE_RULE = """- The bare ring is one ring each way and slots, nothing else, with the same work and checks, measured in turn with the peers by `doorbell
  bench`: what this way of passing bytes can do on these cores.
"""


def where_cores_were(runs):
    """How the runs of a machine whose cores move are told apart."""
    if not runs.state:
        return ""
    here, there = runs.counts[runs.state], runs.counts[FAR if runs.state == NEAR else NEAR]
    return (
        f"- The host moves the two cores of a virtual machine: a call of 64 B on the bare ring takes {runs.nearest} ns while they are\n"
        "  near each other and more than 1.6 times that while they are far apart. It is asked before and after each run. Figures and\n"
        f"  plots are of the {here} timed runs during which they were {runs.state}; {there} were made in the other state, whose ratios the goals\n"
        f"  show, too, and {runs.counts[BETWEEN]} while it changed. Where a peer has no run in a state, all of its runs count. Cores that moved\n"
        "  and came back within a run are not noticed, and the rarer state has few runs: its ratios are rough.\n"
    )


def few_slots(slots):
    """The rule of memory, by what a run says of itself; earlier ones had a slot for each call."""
    if not slots:
        return "- Memory of doorbell is that of a session with a slot for each of the calls in flight.\n"
    return f"- Memory of doorbell is that of a session of {slots} slots; calls that find none wait in the client.\n"


NEAR, FAR, BETWEEN = "near", "far", "between"


def whole_rounds(lines):
    """Rounds that were not broken off: those which have the last run of the first."""
    key = lambda line: (line["experiment"], line["peer"], line["idle"], line["placement"])
    runs = [line for line in lines if "error" not in line]
    last = next((key(line) for line in reversed(runs) if line["round"] == 1), None)
    return sum(key(line) == last for line in runs)


class Runs:
    """What was kept, by what was asked of whom; of the peers `anew`, an experiment's last file alone."""

    def __init__(self, files, anew=()):
        self.heads, self.runs, self.errors = [], {}, {}
        for file in files:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            heads = [line for line in lines if "machine" in line]
            lines = [line for line in lines if "machine" not in line]
            self.heads += [{**head, "made": whole_rounds(lines)} for head in heads]
            again = {(line["experiment"], line["peer"]) for line in lines if line["peer"] in anew}
            self.runs = {key: runs for key, runs in self.runs.items() if key[:2] not in again}
            for (peer, _), names in self.errors.items():
                names -= {name for name, of in again if of == peer}
            for line in lines:
                key = (line["experiment"], line["peer"], line["idle"], line["placement"])
                if "error" in line:
                    self.errors.setdefault((line["peer"], line["error"]), set()).add(line["experiment"])
                else:
                    self.runs.setdefault(key, []).append(line)
        # Runs that do not say where the cores were count only where none does.
        for key, runs in self.runs.items():
            self.runs[key] = [run for run in runs if "cores_ns" in run] or runs
        looks = sorted(ns for runs in self.runs.values() for run in runs for ns in run.get("cores_ns", []))
        # One look in ten may be better than what is usual for cores that are near.
        self.nearest = looks[len(looks) // 10] if looks else 0
        states = [state for runs in self.runs.values() for run in runs if (state := self.state_of(run))]
        self.counts = {state: states.count(state) for state in (NEAR, FAR, BETWEEN)}
        # That of most runs.
        self.state = max((NEAR, FAR), key=lambda state: self.counts[state]) if states else None
        self.is_strict = False

    def state_of(self, run):
        """Where the cores were during a run: close to each other, before it and after it, or not; None if nobody looked."""
        are_far = [ns > 1.6 * self.nearest for ns in run.get("cores_ns", [])]
        if not are_far:
            return None
        return BETWEEN if any(are_far) != all(are_far) else FAR if all(are_far) else NEAR

    def other_state(self):
        """The runs of the other state, and none but those; None if there are none."""
        other = {NEAR: FAR, FAR: NEAR, None: None}[self.state]
        if not other or not self.counts[other]:
            return None
        found = copy.copy(self)
        found.state, found.is_strict = other, True
        return found

    def values(self, experiment, peer, idle, placement, value):
        """Of the runs in this state; of all where nobody looked, or, unless it must not be, there are none in it."""
        runs = self.runs.get((experiment, peer, idle, placement), [])
        of_state = [run for run in runs if self.state_of(run) in (self.state, None)]
        if not of_state and not self.is_strict:
            of_state = runs
        return [found for found in (value(run) for run in of_state) if found]

    def best(self, experiment, peers, value, least=True, ways=None):
        """The best of the peers' ways and placements: median, values, peer, way, placement; None if there is none."""
        found = []
        for (name, peer, idle, placement), _ in self.runs.items():
            if name != experiment or peer not in peers or ways and idle not in ways:
                continue
            values = self.values(name, peer, idle, placement, value)
            if values:
                found.append((statistics.median(values), values, peer, idle, placement))
        return (min if least else max)(found, key=lambda one: one[0], default=None)

    def has_bare(self):
        return any(peer == BARE for _, peer, _, _ in self.runs)

    def peers(self, experiment):
        names = {peer for name, peer, _, _ in self.runs if name == experiment}
        return [peer for peer in ABOUT if peer in names]

    def experiments(self, prefix):
        names = {name for name, _, _, _ in self.runs if name.startswith(prefix)}
        return sorted(names, key=lambda name: int(name[len(prefix):]))


p50 = lambda run: run["p50_ns"]
p90 = lambda run: run["p90_ns"]
p99 = lambda run: run["p99_ns"]
p999 = lambda run: run["p999_ns"]
rate = lambda run: run["per_second"]
memory = lambda run: run.get("footprint_bytes")
resident = lambda run: run.get("rss_bytes")
# Never 0, which would stand for nothing measured.
idle = lambda run: max(run.get("idle_cores", 0), 1e-9)
cpu = lambda run: run["server_cpu_ns"] / run["requests"] if run["requests"] else None
per_cpu = lambda run: run["requests"] / run["server_cpu_ns"] * 1e9 if run["server_cpu_ns"] else None


def ns(value):
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} ns"


def per_s(value):
    for unit, size in ((" M/s", 1e6), (" k/s", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g} /s"


def mib(value):
    return f"{value / 2**20:.2f} MiB"


def of_a_core(value):
    return f"{value * 100:.2f} %"


def spread(values, write):
    middle = write(statistics.median(values))
    return f"{middle} ({write(min(values))} – {write(max(values))})" if len(values) > 1 else middle


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def ranked(runs, experiment, value, write, more, least=True, ways=None):
    """A table of all peers, the best first, each at its best; `more`: further columns of that run."""
    found = [runs.best(experiment, [peer], value, least, ways) for peer in runs.peers(experiment)]
    found = sorted((one for one in found if one), key=lambda one: one[0], reverse=not least)
    rows = []
    for middle, values, peer, idle, placement in found:
        cells = [f"**{peer}**" if peer == US else peer, {"spin": "polls", "sleep": "sleeps"}[idle], spread(values, write)]
        for _, other, write_other in more:
            others = runs.values(experiment, peer, idle, placement, other)
            cells.append(write_other(statistics.median(others)) if others else "–")
        if experiment == "cold":
            cells.insert(2, {"apart": "two cores", "same": "one core", "unpinned": "anywhere"}[placement])
        rows.append(cells)
    head = ["peer", "waits", "median (range)"] + [name for name, _, _ in more]
    if experiment == "cold":
        head.insert(2, "best placement")
    return table(head, rows) if rows else "Nothing was run.\n"


def goals(runs):
    """Every goal: who, what, ours, theirs, ratio, goal, whether met; None where one side is missing."""
    rows = []

    def versus(whom, peers, what, experiment, value, least, goal, write, ways=None):
        ours = runs.best(experiment, [US], value, least, ways)
        theirs = runs.best(experiment, peers, value, least, ways)
        if not ours or not theirs:
            rows.append((whom, what, "–", "–", "–", goal, None, None))
            return
        by = f" ({theirs[2]})" if len(peers) > 1 else ""
        sign, limit = goal
        ratio = lambda one: (one / theirs[0]) if (sign == "<=") == least else theirs[0] / one
        factor, bare = ratio(ours[0]), runs.best(experiment, [BARE], value, least)
        met = factor >= limit if sign == ">=" else factor <= limit
        rows.append((whom, what, write(ours[0]), write(theirs[0]) + by, factor, goal, met, bare and ratio(bare[0])))

    more, less = (lambda n: (">=", n)), (lambda n: ("<=", n))
    versus("Node.js, best", NODE, "throughput, 64 B, 64 in flight", "flight-64", rate, False, more(30), per_s)
    versus("Node.js, best", NODE, "throughput, 1 KiB, 64 in flight", "flight-1k", rate, False, more(8), per_s)
    versus("Node.js, best", NODE, "throughput, 1000 connections", "connections-1000", rate, False, more(30), per_s)
    versus("Node.js, best", NODE, "cold p50", "cold", p50, True, more(8), ns)
    versus("Node.js, best", NODE, "memory, 1000 connections", "memory-1000", memory, True, less(0.05), mib)
    ice = ["iceoryx2"]
    for size, name in (("64", "64 B"), ("1k", "1 KiB")):
        versus("iceoryx2", ice, f"warm p50, {name}", f"warm-{size}", p50, True, more(3), ns)
        versus("iceoryx2", ice, f"throughput, {name}, 64 in flight", f"flight-{size}", rate, False, more(8), per_s)
    versus("iceoryx2", ice, "throughput, 1000 connections", "connections-1000", rate, False, more(100), per_s)
    versus("iceoryx2", ice, "p50, 1 MiB", "warm-1m", p50, True, more(1), ns)
    for size, name, low, fast in (("64", "64 B", 1, 1.2), ("1k", "1 KiB", 4, 1.5)):
        versus("Aeron", ["aeron"], f"warm p50, {name}", f"warm-{size}", p50, True, more(low), ns)
        versus("Aeron", ["aeron"], f"throughput, {name}, 64 in flight", f"flight-{size}", rate, False, more(fast), per_s)
        versus("shmipc", ["shmipc"], f"warm p50, {name}", f"warm-{size}", p50, True, more(4), ns)
        versus("shmipc", ["shmipc"], f"throughput, {name}, 64 in flight", f"flight-{size}", rate, False, more(6), per_s)
        versus("unix socket", ["unix-socket"], f"warm p50, {name}", f"warm-{size}", p50, True, more(6), ns)
    socket = ["unix-socket"]
    versus("unix socket", socket, "cold p50", "cold", p50, True, less(0.6), ns)
    versus("unix socket", socket, "requests per CPU second of the server, 1 KiB, 64 in flight", "flight-1k", per_cpu, False,
           more(4), per_s)
    versus("unix socket", socket, "throughput, 1000 connections", "connections-1000", rate, False, more(15), per_s)

    others = [peer for peer in ABOUT if peer != US]
    versus("all", others, "memory, 1000 connections", "memory-1000", memory, True, less(1), mib)
    for what, experiment, limit in (("memory, 1000 connections", "memory-1000", 3), ("memory, 1000 sessions", "sessions-1000", 12)):
        ours = runs.best(experiment, [US], memory)
        size = ours[0] / 2**20 if ours else None
        rows.append(("itself", what, mib(ours[0]) if ours else "–", "–", size or "–", ("<= MiB", limit), size and size <= limit, None))
    one, many = (runs.best(name, [US], rate, least=False) for name in ("flight-1k", "connections-1000"))
    growth = one[0] / many[0] if one and many else None
    rows.append(("itself", "cost of a request, 1000 connections by 1 (64 in flight)", per_s(many[0]) if many else "–",
                 per_s(one[0]) if one else "–", growth or "–", ("<", 1.5), growth and growth < 1.5, None))
    return rows


def goals_table(runs):
    def cells(row):
        whom, what, ours, theirs, factor, (sign, limit), met, bare = row
        shown = lambda factor: factor if isinstance(factor, str) else f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"
        number = shown(factor)
        unit = " MiB" if sign.endswith("MiB") else "×"
        sign = {">=": "≥", "<=": "≤", "<= MiB": "≤", "<": "<"}[sign]
        verdict = {True: "met", False: "**short**", None: "not measured"}[met if met is None else bool(met)]
        floor = f"{shown(bare)}×" if bare else ""
        return [whom, what, ours, theirs, number + (unit if number != "–" else ""), f"{sign} {limit}{unit}", verdict, floor]

    rows = [cells(row) for row in goals(runs)]
    head = ["beside", "what", "doorbell", "the other", "ratio", "goal", "", "the bare ring's ratio"]
    if not runs.has_bare():
        head, shown = head[:-1], [row[:-1] for row in rows]
    else:
        shown = [list(row) for row in rows]
    other = runs.other_state()
    if other:
        head.append(f"ratio while the cores were {other.state}")
        for row, there in zip(shown, (cells(row) for row in goals(other))):
            is_known = there[2:4] != row[2:4] and "–" not in there[2:4]
            row.append(f"{there[4]}, {there[6]}" if is_known else "")
    return table(head, shown), rows


LOSSES = [
    ("warm p50, 64 B", "warm-64", p50, True, ns), ("warm p99, 64 B", "warm-64", p99, True, ns),
    ("warm p50, 1 KiB", "warm-1k", p50, True, ns), ("warm p99, 1 KiB", "warm-1k", p99, True, ns),
    ("p50, 1 MiB", "warm-1m", p50, True, ns), ("cold p50", "cold", p50, True, ns), ("cold p99", "cold", p99, True, ns),
    ("throughput, 64 B, 64 in flight", "flight-64", rate, False, per_s),
    ("throughput, 1 KiB, 64 in flight", "flight-1k", rate, False, per_s),
    ("throughput, 1000 connections", "connections-1000", rate, False, per_s),
    ("requests per CPU second of the server, 1 KiB, 64 in flight", "flight-1k", per_cpu, False, per_s),
    ("of a core, idle, 1 connection", "memory-1", idle, True, of_a_core),
    ("memory, 1 connection", "memory-1", memory, True, mib), ("memory, 100 connections", "memory-100", memory, True, mib),
    ("memory, 1000 connections", "memory-1000", memory, True, mib),
]


def losses(runs):
    """Rows in which another peer is better."""
    rows = []
    for what, experiment, value, least, write in LOSSES:
        ours, better = runs.best(experiment, [US], value, least), []
        for peer in runs.peers(experiment):
            theirs = runs.best(experiment, [peer], value, least)
            if peer != US and ours and theirs and (theirs[0] < ours[0]) == least and theirs[0] != ours[0]:
                better.append((theirs[0], peer))
        if better:
            figure, peer = min(better) if least else max(better)
            more = len(better) - 1
            rows.append([what, write(ours[0]), peer + (f" and {more} more" if more else ""), write(figure)])
    return table(["what", "doorbell", "better", "its figure"], rows) if rows else "In no row of these tables.\n"


def draw(runs):
    """Draws the plots; returns the Markdown that shows them."""
    shown = []

    def keep(file, title, svg):
        if svg:
            (PLOTS / f"{file}.svg").write_text(svg)
            shown.append(f"![{title}](plots/{file}.svg)\n")

    quantiles = [("p50", p50), ("p90", p90), ("p99", p99), ("p99.9", p999)]
    for experiment, title in (("warm-64", "Warm call of 64 B"), ("warm-1k", "Warm call of 1 KiB"), ("cold", "Cold call of 1 KiB")):
        rows = []
        for peer in runs.peers(experiment):
            best = runs.best(experiment, [peer], p50)
            if best:
                values = [statistics.median(runs.values(experiment, *best[2:], value) or [0]) for _, value in quantiles]
                rows.append((peer, values))
        keep(f"peers-latency-{experiment}", title,
             bars(f"{title}: latency", sorted(rows, key=lambda row: row[1][0]), [name for name, _ in quantiles], ns, US))

    def rates(names, x):
        lines = {}
        for name in names:
            for peer in runs.peers(name):
                best = runs.best(name, [peer], rate, least=False)
                if best:
                    lines.setdefault(peer, []).append((x(name), best[0], min(best[1]), max(best[1])))
        return lines

    keep("peers-size", "Throughput by size", curves(
        "Requests a second, 16 in flight, by size", rates(runs.experiments("size-"), lambda n: int(n.split("-")[1])), "bytes", per_s, US))
    names = [name for name in ("connections-1", "many-10", "many-100", "connections-1000") if runs.peers(name)]
    keep("peers-connections", "Throughput by connections", curves(
        "Requests a second, one call of 1 KiB in flight on each connection", rates(names, lambda n: int(n.split("-")[1])),
        "connections", per_s, US))
    loads = {}
    for (name, peer, idle, placement), kept in runs.runs.items():
        if idle == "sleep" and placement == "apart" and (name == "cold" or name.startswith(("load-", "connections-1"))):
            share = [run["server_cpu_ns"] / 1e9 / run["elapsed_s"] * 100 for run in kept if run["elapsed_s"] > 0]
            load = statistics.median(run["requests"] / run["elapsed_s"] for run in kept)
            loads.setdefault(peer, []).append((load, statistics.median(share), min(share), max(share)))
    keep("peers-cpu", "CPU by load", curves(
        "CPU of the server, percent of a core, by requests a second (sleeping)", {p: sorted(v) for p, v in loads.items()},
        "requests a second", lambda v: f"{v:.3g} %", US))
    return "\n".join(shown)


def describe(heads):
    head = heads[0]
    machine = head["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["versions"].items()))
    virtual = ", a virtual machine on a shared host, whose slow phases show in the ranges" if machine["hypervisor"] else ""
    commits = ", ".join(dict.fromkeys(head["machine"]["commit"] for head in heads))
    made = lambda head: head["rounds"] if head["made"] == head["rounds"] else f"{head['made']} of {head['rounds']}"
    rounds = " and ".join(f"{made(head)} rounds, windows of {head['seconds']} s" for head in heads)
    return (
        f"{machine['cores']} cores of {machine['cpu']}{virtual}; Linux {machine['kernel']}; {machine['rustc']}; Node.js "
        f"{machine['node']}; {versions}. doorbell at {commits}, {machine['date']}. {rounds}. "
        f"Server on core {machine['server_core']}, client on core {machine['client_core']} unless said "
        "otherwise.\n"
    )


def missing(runs):
    lines = [f"- {name}: cannot be built here: {why}" for head in runs.heads for name, why in head["missing"].items()]
    for (peer, why), experiments in sorted((key, names) for key, names in runs.errors.items() if names):
        lines.append(f"- {peer} in {', '.join(sorted(experiments))}: {' '.join(why.split())[:200]}")
    return "\n".join(lines) + "\n" if lines else "Everything could be built and run.\n"


def main():
    kept = sorted((ROOT / "docs/raw").glob("peers-*.jsonl"), key=lambda file: (file.stat().st_mtime, file.name))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", default="", help="peers, separated by commas")
    parser.add_argument("raw", nargs="*", type=pathlib.Path, help="what run.py kept")
    options = parser.parse_args()
    files, anew = options.raw or kept[-1:], [name for name in options.anew.split(",") if name]
    if not files:
        sys.exit("there is no docs/raw/peers-*.jsonl: benches/peers/run.py makes one")
    runs = Runs(files, anew)
    PLOTS.mkdir(exist_ok=True)
    plots = draw(runs)
    table_of_goals, rows = goals_table(runs)
    met = sum(row[6] == "met" for row in rows)
    latency = [("p90", p90, ns), ("p99", p99, ns), ("p99.9", p999, ns)]
    flow = [("server CPU a request", cpu, ns), ("p50", p50, ns), ("p99", p99, ns)]
    held = [
        ("resident alone", resident, mib),
        ("kernel, both sides, about", lambda run: run.get("kernel_bytes"), mib),
        ("of a core, idle", idle, of_a_core),
    ]
    parts = [
        "# doorbell beside its peers\n",
        "Made by `benches/peers/report.py` from what `benches/peers/run.py` kept "
        f"({', '.join(f'`{file.name}`' for file in files)}"
        + (f"; of {', '.join(anew)} only what the last of them have" if anew else "") + "); not written by hand.\n",
        "## Where and how\n", describe(runs.heads), FAIRNESS.rstrip("\n") + "\n" + few_slots(runs.heads[0].get("memory_slots"))
        + where_cores_were(runs) + (BARE_RULE if runs.has_bare() else ""),
        table(["peer", "what it is"], [[peer, about] for peer, about in ABOUT.items()]),
        f"## Goals: {met} of {len(rows)} met\n", table_of_goals,
        "The cost of a request grows by as much as throughput falls from one connection with 64 calls in flight to 1000 "
        "connections with one each.\n",
        "## Where others are better\n", losses(runs),
        "## What could not be had\n", missing(runs),
        "## Plots\n", plots,
        "## Warm calls, one in flight, on two cores\n",
    ]
    for experiment, name in (("warm-64", "64 B"), ("warm-1k", "1 KiB"), ("warm-1m", "1 MiB")):
        parts += [f"### {name}\n", ranked(runs, experiment, p50, ns, latency)]
    parts += ["## Cold calls, 1 KiB, a millisecond after the last\n", ranked(runs, "cold", p50, ns, latency)]
    for experiment, name in (("flight-64", "64 B, 64 in flight"), ("flight-1k", "1 KiB, 64 in flight"),
                             ("connections-1000", "1 KiB, 1000 connections, one call each")):
        parts += [f"## {name}\n", ranked(runs, experiment, rate, per_s, flow, least=False)]
    for count in (1, 100, 1000):
        parts += [f"## Memory with {count} connection{'s' if count > 1 else ''}\n",
                  ranked(runs, f"memory-{count}", memory, mib, held)]
    OUT.write_text("\n".join(parts))
    print(f"{OUT}: {met} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
