#!/usr/bin/env python3
"""Measures doorbell beside its peers on this machine and keeps every run: one line of JSON each.

Usage: benches/peers/run.py [--quick] [--rounds N] [--only PEER,...] [--experiments NAME,...] [--out FILE] [--no-build]

Every peer is an echo server and a client in two processes that do the same work: the server answers with every word XOR a
constant, the client makes each request of a nonce of its own and checks every word. All are asked the same questions, in
turn (A B C A B C ...), in several rounds, each time by fresh processes. A run that fails is kept with its reason.

`--quick` takes some 12 minutes, without it the run takes an hour. Build first takes some minutes more. Then: report.py.
What cannot be built or run here is said so, in the raw file and in the report. setup.sh installs what peers need.
"""
import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TRIPLE = "x86_64-unknown-linux-gnu"
# Two directories, since flags differ: the first links statically, as the product does (the root's .cargo/config.toml).
STATIC = ["doorbell", "uds", "tokio", "uring", "ipc"]
DYNAMIC = ["iceoryx", "grpc", "shmipc", "aeron"]
TARGET = {**{name: ROOT / "target/peers-static" for name in STATIC}, **{name: ROOT / "target/peers" for name in DYNAMIC}}

SPIN, SLEEP = "spin", "sleep"
# name: crate or Node.js mode, how it can wait, connections at most
PEERS = {
    "doorbell": dict(crate="doorbell", idle=[SPIN, SLEEP]),
    "node-net": dict(node="net", idle=[SLEEP]),
    "node-json": dict(node="json", idle=[SLEEP]),
    "node-clone": dict(node="advanced", idle=[SLEEP]),
    "unix-socket": dict(crate="uds", idle=[SPIN, SLEEP]),
    "tokio": dict(crate="tokio", idle=[SLEEP]),
    "tokio-uring": dict(crate="uring", idle=[SLEEP]),
    "iceoryx2": dict(crate="iceoryx", idle=[SPIN, SLEEP]),
    "ipc-channel": dict(crate="ipc", idle=[SPIN, SLEEP]),
    "grpc": dict(crate="grpc", idle=[SLEEP]),
    "shmipc": dict(crate="shmipc", idle=[SLEEP]),
    "aeron": dict(crate="aeron", idle=[SPIN, SLEEP], driver=True),
    # No peer: what the two cores allow, for the same work. `doorbell bench` has it beside each of its runs.
    "bare-ring": dict(bench=True, idle=[SPIN]),
}
ALL, WARM, COLD = "all", "warm", "cold"
# name: how peers wait (WARM: polling where they can, COLD: sleeping, ALL: both ways), what they are asked, placements
EXPERIMENTS = {
    "warm-64": (WARM, dict(size=64), ["apart"]),
    "warm-1k": (WARM, dict(size=1024), ["apart"]),
    "warm-1m": (WARM, dict(size=1 << 20), ["apart"]),
    "cold": (COLD, dict(size=1024, think_us=1000), ["apart", "same", "unpinned"]),
    "flight-64": (ALL, dict(size=64, in_flight=64), ["apart"]),
    "flight-1k": (ALL, dict(size=1024, in_flight=64), ["apart"]),
    "connections-1000": (ALL, dict(size=1024, connections=1000), ["apart"]),
    "connections-1": (ALL, dict(size=1024, connections=1, in_flight=1), ["apart"]),
    "memory-1": (COLD, dict(size=1024, connections=1, hold=1), ["apart"]),
    "memory-100": (COLD, dict(size=1024, connections=100, hold=1), ["apart"]),
    "memory-1000": (COLD, dict(size=1024, connections=1000, hold=1), ["apart"]),
    "sessions-1000": (COLD, dict(size=1024, connections=1000, hold=1), ["apart"]),
}
CURVES = {
    **{f"size-{size}": (ALL, dict(size=size, in_flight=16), ["apart"]) for size in (64, 256, 1024, 4096, 16384)},
    **{f"many-{n}": (ALL, dict(size=1024, connections=n), ["apart"]) for n in (10, 100)},
    **{f"load-{us}": (COLD, dict(size=1024, think_us=us), ["apart"]) for us in (100, 10)},
}
# Slots of doorbell's session where memory is measured: FEW in its client.
MEMORY_SLOTS = 64
# What the bare ring is asked: whoever sleeps waits for the kernel, and it holds no connections.
BARE = ["warm-64", "warm-1k", "warm-1m", "flight-64", "flight-1k", "connections-1000"]
# Bodies of a mebibyte in these say nothing that the others do not.
NOT_LONG = ["node-json", "node-clone", "tokio-uring", "grpc", "ipc-channel"]
TIMEOUT = 30


class Failed(Exception):
    pass


def cores():
    """The server's and the client's: the first allowed one, and the next that is no hyperthread of it."""
    allowed = sorted(os.sched_getaffinity(0))
    siblings = set()
    path = pathlib.Path(f"/sys/devices/system/cpu/cpu{allowed[0]}/topology/thread_siblings_list")
    for part in path.read_text().strip().split(",") if path.exists() else []:
        first, _, last = part.partition("-")
        siblings.update(range(int(first), int(last or first) + 1))
    others = [core for core in allowed[1:] if core not in siblings] or allowed[1:]
    if not others:
        sys.exit("two cores are needed")
    return allowed[0], others[0]


def build():
    """Builds both groups; returns what cannot be built, with the compiler's reason."""
    missing = {}
    subprocess.run([HERE / "setup.sh"], check=False)
    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    cmake = ROOT / "target/peers-cmake/bin/cmake"
    for names, flags in ((STATIC, {}), (DYNAMIC, {"RUSTFLAGS": ""})):
        for name in names:
            env = {**os.environ, **flags, "CARGO_TARGET_DIR": str(TARGET[name])}
            if cmake.exists():
                env.setdefault("CMAKE", str(cmake))
            command = ["cargo", "build", "--release", "--locked", "--quiet", "--target", TRIPLE, "-p", f"peer-{name}"]
            print(f"building {name}", file=sys.stderr)
            done = subprocess.run(command, cwd=HERE, env=env, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                errors = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower() or "required" in line]
                missing[name] = (" / ".join(errors) or done.stderr[-300:])[:400]
                print(f"{name} cannot be built: {missing[name]}", file=sys.stderr)
    return missing


COMMAND = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / TRIPLE / "release/doorbell"


def bench(seconds, *words):
    """The report of `doorbell bench` where both sides poll."""
    command = [COMMAND, "bench", "--json", "--policy", "spin", "--seconds", seconds, *words]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failed(f"doorbell bench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def bare(asked, seconds):
    """The bare ring beside a run of `doorbell bench`, in the words of a peer's client."""
    report = bench(seconds, "--size", asked["size"], "--in-flight", asked.get("in_flight", 1),
                   "--connections", asked.get("connections", 1))
    found = {name: report[f"floor_{name}"] for name in ("per_second", "p50_ns", "p99_ns", "p999_ns", "max_ns")}
    # Its server polls all the time.
    requests = found["per_second"] * seconds
    return dict(found, requests=requests, server_cpu_ns=seconds * 1e9, elapsed_s=seconds, wrong=0)


def distance():
    """How far apart the two cores are now: p50 of a call of 64 B on the bare ring, ns. Those of a virtual machine move."""
    try:
        return bench(0.05, "--peer", "floor", "--size", 64)["p50_ns"]
    except (Failed, OSError, ValueError) as error:
        # Not the fault of the peer whose turn it is.
        sys.exit(f"the bare ring cannot be asked: {error}")


def libraries():
    """Where Aeron's libraries were built: they are linked dynamically."""
    return ":".join(str(path) for path in TARGET["aeron"].glob(f"{TRIPLE}/release/build/rusteron-*/out/build/lib"))


def binary(name):
    return TARGET[name] / TRIPLE / "release" / f"peer-{name}"


class Process:
    """A child on its cores, which speaks lines."""

    def __init__(self, command, on):
        pin = (lambda: os.sched_setaffinity(0, on)) if on else None
        self.child = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=pin, env={**os.environ, "LD_LIBRARY_PATH": libraries()})
        self.pid = self.child.pid
        self.buffer = b""

    def line(self, within=TIMEOUT):
        until = time.monotonic() + within
        out = self.child.stdout.fileno()
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([out], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise Failed(f"said nothing for {within} s")
            more = os.read(out, 65536)
            if not more:
                self.child.wait()
                words = self.child.stderr.read().decode(errors="replace").strip()
                raise Failed(f"ended with {self.child.returncode}: {words[-300:]}")
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def expect(self, word):
        line = self.line()
        if not line.startswith(word):
            raise Failed(f"said {line!r} instead of {word!r}")
        return line

    def end(self):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout, self.child.stderr):
            pipe.close()


def cpu_ns(pids):
    """CPU time of all threads of some processes, nanoseconds."""
    total = 0
    for pid in pids:
        for task in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                pass
    return total


def footprint(server_pids, all_pids):
    """Resident bytes of the server's processes, and with every page shared with it that exists and is not among those."""
    resident = shared_resident = 0
    shared = {}
    for pid in all_pids:
        of_server = pid in server_pids
        inode = None
        for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                name = " ".join(words[5:])
                is_shared = words[1][3] == "s" and words[4] != "0" and not name.startswith(("/usr", "/lib"))
                inode = (words[3], words[4]) if is_shared else None
                if inode and inode not in shared:
                    try:
                        shared[inode] = os.stat(f"/proc/{pid}/map_files/{words[0]}").st_blocks * 512
                    except OSError:
                        shared[inode] = 0
            elif words[0] == "Rss:" and of_server:
                resident += int(words[1]) * 1024
                shared_resident += int(words[1]) * 1024 if inode else 0
    return resident, resident + max(0, sum(shared.values()) - shared_resident)


def kernel_bytes():
    """Memory that the kernel has for sockets, files, page tables and stacks, of everybody on this machine."""
    fields = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Slab", "PageTables", "KernelStack") if name in fields)


def placed(placement):
    server, client = cores()
    return {"apart": ({server}, {client}), "same": ({client}, {client}), "unpinned": (None, None)}[placement]


NUMBER = 0


def run(peer, idle, placement, asked, seconds, warm, experiment):
    """One run by fresh processes; returns what there is to keep of it."""
    global NUMBER
    NUMBER += 1
    about = PEERS[peer]
    if "bench" in about:
        return bare(asked, seconds)
    before, kernel = leftovers(), kernel_bytes()
    processes = []
    with tempfile.TemporaryDirectory(prefix="peers-") as directory:
        path = f"{directory}/peers-{os.getpid()}-{NUMBER}"
        words = [f"{key}={value}" for key, value in asked.items()] + [f"idle={idle}", f"path={path}"]
        client_words = words + [f"seconds={seconds}", f"warm={warm}"]
        on_server, on_client = placed(placement)

        def start(command, on):
            processes.append(Process(command, on))
            return processes[-1]

        try:
            if about.get("node") in ("json", "advanced"):
                client = start(["node", HERE / "node/peer.js", "fork-client", about["node"], *client_words], on_client)
                server_pids = [int(client.expect("server").split()[1])]
                if on_server:
                    for task in os.listdir(f"/proc/{server_pids[0]}/task"):
                        os.sched_setaffinity(int(task), on_server)
                time.sleep(0.3)
                cpu = cpu_ns(server_pids)
                client.child.stdin.write(b"go\n")
                client.child.stdin.flush()
            else:
                server_pids = []
                if about.get("driver"):
                    driver = start([binary(about["crate"]), "driver", *words], None)
                    driver.expect("ready")
                    server_pids.append(driver.pid)
                if "node" in about:
                    server = start(["node", HERE / "node/peer.js", "net-server", path], on_server)
                    command = ["node", HERE / "node/peer.js", "net-client", path, *client_words]
                else:
                    server = start([binary(about["crate"]), "server", *words], on_server)
                    role = "sessions" if experiment.startswith("sessions") else "client"
                    command = [binary(about["crate"]), role, *client_words]
                if not about.get("driver"):
                    server.expect("ready")
                server_pids.append(server.pid)
                cpu = cpu_ns(server_pids)
                client = start(command, on_client)
                if about.get("driver"):
                    server.expect("ready")
            begun = time.monotonic()
            found = {}
            if asked.get("hold"):
                client.expect("holding")
                time.sleep(0.2)
                everyone = set(server_pids) | {client.pid}
                found["rss_bytes"], found["footprint_bytes"] = footprint(set(server_pids), everyone)
                # Rough: others' is in it, too, and clients'.
                found["kernel_bytes"] = max(0, kernel_bytes() - kernel)
                idle_cpu, idle_begun = cpu_ns(server_pids), time.monotonic()
                time.sleep(1.0)
                found["idle_cores"] = (cpu_ns(server_pids) - idle_cpu) / 1e9 / (time.monotonic() - idle_begun)
                client.child.stdin.close()
            found.update(json.loads(client.line()))
            found["server_cpu_ns"] = cpu_ns(server_pids) - cpu
            found["elapsed_s"] = time.monotonic() - begun
            if found["wrong"]:
                raise Failed(f"{found['wrong']} wrong answers")
            return found
        finally:
            for process in reversed(processes):
                process.end()
            for path in leftovers() - before:
                shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.unlink(path)


def leftovers():
    """Files of peers that are killed and do not clean up behind themselves."""
    found = set()
    for place in ("/dev/shm", "/tmp/iceoryx2/nodes", "/tmp/iceoryx2/services", "/tmp/iceoryx2"):
        if os.path.isdir(place):
            found |= {f"{place}/{name}" for name in os.listdir(place) if name.startswith(("iox2", "peers-"))}
    return found


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown")
    version = lambda *command: subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
    lock = (HERE / "Cargo.lock").read_text().split("[[package]]")
    wanted = ["iceoryx2", "ipc-channel", "rusteron-client", "shmipc", "tokio", "tokio-uring", "tonic"]
    versions = {}
    for package in lock:
        fields = dict(line.split(" = ", 1) for line in package.splitlines() if " = " in line)
        name = fields.get("name", "").strip('"')
        if name in wanted:
            versions[name] = fields["version"].strip('"')
    head = version("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {
        "date": datetime.date.today().isoformat(), "cpu": model, "cores": os.cpu_count(),
        "kernel": platform.release(), "node": version("node", "--version") if shutil.which("node") else None,
        "rustc": version("rustc", "--version"), "commit": head, "server_core": cores()[0], "client_core": cores()[1],
        "versions": versions, "hypervisor": "hypervisor" in info,
    }


def waits(peer, how):
    idle = PEERS[peer]["idle"]
    if how == WARM:
        return [idle[0]]
    if how == COLD:
        return [SLEEP]
    return idle


def plan_of(options):
    experiments = dict(EXPERIMENTS)
    if not options.quick:
        experiments.update(CURVES)
    if options.experiments:
        names = options.experiments.split(",")
        experiments = {name: {**EXPERIMENTS, **CURVES}[name] for name in names}
    peers = options.only.split(",") if options.only else list(PEERS)
    runs = []
    for name, (how, asked, placements) in experiments.items():
        for placement in placements:
            for peer in peers:
                if peer == "bare-ring" and name not in BARE or name == "warm-1m" and peer in NOT_LONG or name == "sessions-1000" and peer != "doorbell":
                    continue
                runs += [(name, peer, idle, placement, asked) for idle in waits(peer, how)]
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of half a second, memory once, no curves")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--only", default="", help="peers, separated by commas: " + ", ".join(PEERS))
    parser.add_argument("--experiments", default="", help="of " + ", ".join({**EXPERIMENTS, **CURVES}))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / f"docs/raw/peers-{datetime.date.today()}.jsonl")
    parser.add_argument("--no-build", action="store_true")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    missing = {} if options.no_build else build()
    rounds = options.rounds or (3 if options.quick else 5)
    seconds = options.seconds or (0.5 if options.quick else 1.5)
    runs = plan_of(options)
    failed = set()
    begun = time.monotonic()
    with options.out.open("w") as out:
        keep = lambda **line: print(json.dumps(line), file=out, flush=True)
        keep(machine=machine(), memory_slots=MEMORY_SLOTS, rounds=rounds, seconds=seconds, missing=missing, quick=options.quick)
        before = None
        for turn in range(rounds):
            for number, (experiment, peer, idle, placement, asked) in enumerate(runs):
                about = PEERS[peer]
                line = dict(round=turn + 1, experiment=experiment, peer=peer, idle=idle, placement=placement, **asked)
                why = missing.get(about.get("crate")) or ("no node" if "node" in about and not shutil.which("node") else None)
                # What has failed once fails again: its time is others'. What is held is the same each time.
                once = options.quick and asked.get("hold") and turn > 0
                if why or once or (experiment, peer, idle) in failed:
                    if why and turn == 0:
                        keep(**line, error=why)
                    continue
                spent = int(time.monotonic() - begun)
                print(f"{spent:4} s, round {turn + 1} of {rounds}, {number + 1} of {len(runs)}: {experiment} {peer} "
                      f"{idle} {placement}", file=sys.stderr)
                warm = 0.5 if "node" in about else 0.2
                try:
                    # What is held is not timed.
                    before = before or distance() if not asked.get("hold") else None
                    found = run(peer, idle, placement, asked, seconds, warm, experiment)
                    after = distance() if before else None
                    keep(**line, **found, **({"cores_ns": [before, after]} if before else {}))
                    before = after
                except (Failed, OSError, ValueError) as error:
                    print(f"     failed: {error}", file=sys.stderr)
                    failed.add((experiment, peer, idle))
                    before = None
                    keep(**line, error=str(error))
    print(f"{options.out}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    sys.exit(1 if any(peer == "doorbell" for _, peer, _ in failed) else 0)


if __name__ == "__main__":
    main()
