#!/usr/bin/env python3
"""What a server keeps resident, region by region: at rest, with sessions, under load, and after its sessions have gone.

Usage: benches/regions.py [--raw FILE] [DOORBELL ...]   (build with `cargo build --release` first)
For each binary (by default the release build) and situation prints a row of a Markdown table, KiB: the server's
`/proc/PID/smaps` summed up by region. The rows themselves, one JSON object a line, go to FILE.
"""
import argparse
import json
import pathlib
import re
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOORBELL = ROOT / "target/x86_64-unknown-linux-gnu/release/doorbell"
REGIONS = ["code", "constants", "relocated", "data", "heap", "threads", "rings", "stack", "segments"]
HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \d+ *(.*)")

# name, arguments of `doorbell bench`, None for `doorbell serve` without and with sessions that have gone
SITUATIONS = [
    ("serve, nobody has come", None),
    ("serve, 500 sessions have gone", "--connect-only --sessions 500 --connections 500"),
    ("1000 connections of 1 session, 1 KiB, all calling", "--size 1024 --connections 1000"),
    ("100 sessions of 100 processes, 1 KiB, all calling",
     "--size 1024 --connections 100 --sessions 100 --processes 100"),
    ("100 sessions, handoff, two reactors, idle",
     "--size 1024 --connections 100 --sessions 100 --policy handoff --idle"),
    ("1000 sessions, one lane each, idle", "--size 1024 --connections 1000 --sessions 1000 --idle"),
]


def region(executable, permissions, path):
    if path == executable:
        return {"r-xp": "code", "rw-p": "data"}.get(permissions, "constants")
    if path in ("[heap]", "[stack]"):
        return path.strip("[]")
    if "[io_uring]" in path:
        return "rings"
    if path.startswith("/memfd:doorbell-session"):
        return "segments"
    # Arenas and stacks of threads; the data that the linker put behind the executable's own.
    return "threads" if path == "" else "other"


def resident(pid):
    """KiB resident, by region."""
    executable = str(pathlib.Path(f"/proc/{pid}/exe").readlink())
    sums = dict.fromkeys([*REGIONS, "other", "mappings of the executable"], 0)
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := HEAD.fullmatch(line):
            here = region(executable, *head.groups())
            sums["mappings of the executable"] += head[2] == executable
            continue
        name, value = line.split(":", 1)
        if name == "Rss":
            rss = int(value.split()[0])
            sums[here] += rss
        elif name == "Anonymous" and here == "constants" and int(value.split()[0]) > 0:
            # Written to by the dynamic linker before it was made read-only.
            sums["constants"] -= rss
            sums["relocated"] += rss
    return sums


def server_of(bench):
    """The process that serves for a bench: once it is there."""
    while bench.poll() is None:
        children = pathlib.Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
        for child in children:
            command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"doorbell-server" in command:
                return int(child)
        time.sleep(0.02)
    raise SystemExit(f"the bench ended with status {bench.returncode} before its server began")


def serve(binary, arguments, seconds):
    with tempfile.TemporaryDirectory() as directory:
        socket = f"{directory}/s"
        server = subprocess.Popen([binary, "serve", "--socket", socket], stderr=subprocess.DEVNULL)
        try:
            time.sleep(1)
            if arguments:
                command = [binary, "bench", "--socket", socket, *arguments.split()]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                time.sleep(1)
            return resident(server.pid), {}
        finally:
            server.terminate()
            server.wait()


def bench(binary, arguments, seconds):
    command = [binary, "bench", "--json", "--seconds", str(seconds), *arguments.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pid = server_of(process)
    time.sleep(seconds * 0.7)
    sums = resident(pid)
    report = json.loads(process.communicate()[0])
    return sums, {name: value for name, value in report.items() if name.endswith("_bytes")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--raw", type=pathlib.Path)
    parser.add_argument("binaries", nargs="*", type=pathlib.Path, default=[DOORBELL])
    options = parser.parse_args()
    raw = options.raw.open("w") if options.raw else None
    columns = [*REGIONS[:-1], "other", "beside segments", "footprint"]
    print("| situation | binary |", " | ".join(columns), "|")
    print("|", " | ".join(["---"] * (len(columns) + 2)), "|")
    for situation, arguments in SITUATIONS:
        for binary in options.binaries:
            serves = arguments is None or "--connect-only" in arguments
            sums, reported = (serve if serves else bench)(binary, arguments, options.seconds)
            sums["beside segments"] = sum(sums[name] for name in [*REGIONS[:-1], "other"])
            footprint = reported.get("footprint_bytes")
            sums["footprint"] = footprint // 1024 if footprint else sums["beside segments"]
            print(f"| {situation} | {binary.name} |", " | ".join(str(sums[name]) for name in columns), "|", flush=True)
            if raw:
                row = {"situation": situation, "binary": binary.name, "kib": sums, **reported}
                raw.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
