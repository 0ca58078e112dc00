#!/usr/bin/env python3
"""What 1000 connections cost: a minimal Node.js unix-socket echo server and doorbell's, measured beside each other (R5.3b).

Usage: benches/node_memory.py [--connections N] [--size BYTES] [--raw FILE]   (build with `cargo build --release` first)
Node.js: one process opens all connections, exchanges one message on each, and the server's resident set is read, the
highest of the run. doorbell: `doorbell bench` with as many connections of one session, of the same size; its footprint is
the resident set plus every shared page that is not in it, the highest of the run. Raw line of JSON to FILE.
Exit status 1: more than 5 %, or a run failed.
"""
import argparse
import datetime
import json
import pathlib
import resource
import socket
import subprocess
import sys
import tempfile

from goals import DOORBELL, bench

ECHO = "require('net').createServer(s => s.pipe(s)).listen({path: process.argv[1], backlog: 4096}, () => console.log('up'))"
GOAL = 0.05


def resident(pid):
    """Bytes resident in a process now."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the server's resident set cannot be read")


def exchange(client, message):
    client.sendall(message)
    left = len(message)
    while left:
        got = client.recv(left)
        if not got or got != message[:len(got)]:
            raise SystemExit("Node.js answered wrongly")
        left -= len(got)
        message = message[len(got):]


def measure_node(connections, size):
    """Resident bytes of the Node.js server: at rest, and the highest with all connections open and used."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/echo.sock"
        server = subprocess.Popen(["node", "-e", ECHO, path], stdout=subprocess.PIPE, text=True)
        clients = []
        try:
            if server.stdout.readline() != "up\n":
                raise SystemExit("Node.js did not start")
            idle = peak = resident(server.pid)
            for _ in range(connections):
                client = socket.socket(socket.AF_UNIX)
                client.connect(path)
                clients.append(client)
            for i, client in enumerate(clients):
                exchange(client, bytes((i + k) % 251 for k in range(size)))
                if i % 50 == 0:
                    peak = max(peak, resident(server.pid))
            return idle, max(peak, resident(server.pid))
        finally:
            for client in clients:
                client.close()
            server.kill()
            server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--raw", type=pathlib.Path)
    options = parser.parse_args()
    if not DOORBELL.exists():
        sys.exit("the command is not built: cargo build --release")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    node_idle, node = measure_node(options.connections, options.size)
    ours = bench(f"--connections {options.connections} --size {options.size}", options.seconds)
    ratio = ours["footprint_bytes"] / node
    version = subprocess.run(["node", "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    line = {
        "date": datetime.date.today().isoformat(),
        "connections": options.connections,
        "size": options.size,
        "node": version,
        "node_idle_bytes": node_idle,
        "node_bytes": node,
        "doorbell_bytes": ours["footprint_bytes"],
        "ratio": ratio,
        "report": ours,
    }
    if options.raw:
        options.raw.write_text(json.dumps(line) + "\n")
    print(f"Node.js {version}: {node / 2**20:.1f} MiB resident ({node_idle / 2**20:.1f} before the first connection)")
    print(f"doorbell: {ours['footprint_bytes'] / 2**20:.2f} MiB footprint")
    print(f"ratio: {ratio * 100:.2f} %, goal: at most {GOAL * 100:.0f} %, {'met' if ratio <= GOAL else 'missed'}")
    sys.exit(0 if ratio <= GOAL else 1)


if __name__ == "__main__":
    main()
