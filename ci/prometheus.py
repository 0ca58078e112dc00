#!/usr/bin/env python3
"""Has a real Prometheus scrape a real server, and read the alert rules of contrib/ (R4.6). Takes half a minute.

Usage: ci/prometheus.py   (build with `cargo build --release --bin doorbell` first)
Fetches Debian's package of Prometheus into target/ and unpacks it there; nothing is installed. Exit status 1: it saw something else
than what was called.
"""
import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOORBELL = ROOT / "target/x86_64-unknown-linux-gnu/release/doorbell"
PLACE = ROOT / "target/prometheus"
CALLS = 25
# How long anything may take before it is said to hang, seconds.
PATIENCE = 60


def fetch():
    """The program, from the package if it is not there yet."""
    program = PLACE / "usr/bin/prometheus"
    if not program.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "download", "-qq", "prometheus"], cwd=PLACE, check=True, stderr=subprocess.DEVNULL)
        package = next(PLACE.glob("prometheus_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, PLACE], check=True)
    return program


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(what, ask):
    """Asks until there is an answer."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            answer = ask()
            if answer is not None:
                return answer
        except OSError:
            pass  # It does not listen yet.
        time.sleep(0.2)
    sys.exit(f"waited {PATIENCE} s for: {what}")


class Prometheus:
    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path, **arguments):
        with urllib.request.urlopen(f"{self.base}/{path}?{urllib.parse.urlencode(arguments)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, query):
        """The sum of all series of a query, `None` if there is none."""
        result = self.get("query", query=f"sum({query})")["result"]
        return float(result[0]["value"][1]) if result else None


def main():
    program = fetch()
    metrics, port = free_port(), free_port()
    started = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        path = scratch / "doorbell.sock"
        (scratch / "doorbell.toml").write_text(f'[metrics]\nlisten = "127.0.0.1:{metrics}"\n')
        (scratch / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: [{ROOT}/contrib/prometheus/doorbell.rules.yml]\n"
            f"scrape_configs: [{{job_name: doorbell, static_configs: [{{targets: ['127.0.0.1:{metrics}']}}]}}]\n"
        )
        try:
            serve = [DOORBELL, "serve", "--config", scratch / "doorbell.toml", "--socket", path]
            started.append(subprocess.Popen(serve, stderr=subprocess.DEVNULL))
            watch = [program, f"--config.file={scratch}/prometheus.yml", f"--storage.tsdb.path={scratch}/data"]
            watch += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
            started.append(subprocess.Popen(watch))
            prometheus = Prometheus(port)
            eventually("the server's socket", lambda: path.exists() or None)
            eventually("the first scrape", lambda: prometheus.value('up{job="doorbell"} == 1'))
            for _ in range(CALLS):
                subprocess.run([DOORBELL, "call", "--type", "ping", "--socket", path], check=True, stdout=subprocess.DEVNULL)
            pings = 'ipc_latency_seconds_count{type="ping"}'
            seen = lambda: (prometheus.value(pings) or 0) >= CALLS or None
            eventually(f"{CALLS} calls to be seen", seen)
            count = prometheus.value(pings)
            groups = eventually(
                "the alert rules to be evaluated",
                lambda: (groups := prometheus.get("rules")["groups"])
                and all(rule["health"] == "ok" for group in groups for rule in group["rules"])
                and groups
                or None,
            )
            rules = [rule for group in groups for rule in group["rules"]]
            firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
            print(f"{count:.0f} of {CALLS} calls seen, {len(rules)} alert rules evaluated, firing: {', '.join(firing) or 'none'}")
            sys.exit(0 if count == CALLS and not firing else 1)
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait()


if __name__ == "__main__":
    main()
