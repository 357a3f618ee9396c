"""Compares flexnbd with the other NBD servers that are installed. `make bench` runs it.

In a round each row is run once for each server, one server after the other, in an order that changes from round to
round, so that what else the machine does meets all of them alike. For each run a server is started, on a core of its
own; the client (tests/bench/load.rs, or nbdcopy) is on another. All are spoken to over TCP, newstyle, simple replies,
and serve the same files of random bytes, which no server can take for holes:

- hot: on tmpfs, for what only costs processor time;
- disk: on a disk, in the page cache, and clean when a run begins, for what waits for the disk to have it;
- cold: on a disk, not in the page cache when a run begins, and larger than what a run reads.

Inside tests/cluster/volume.sh, which `make bench-cluster` does, there are other rows, of an image on a volume with three
copies that are all on this machine: they and their clients have the processors together with the servers.

Printed are medians; the ratio to the best of the others, which is the one with the best median (the median of the
ratios in each round, above 1 when ours is better, and their range); and processor time. That is the server's from when
it was ready to its end, with its children and its kernel workers; what the kernel does elsewhere is not in it.

Environment:
  FLEXNBD, LOAD          the program and the client (target/release/...)
  BASE                   another flexnbd, to compare with in the same run
  FLEXNBD_OPTIONS, BASE_OPTIONS  more options of `serve`, for either
  ROWS                   only rows whose name has a match of this regular expression, whatever the case
  QUICK=1                one short round, which shows that it works and no more
  ROUNDS (9), SECONDS_PER_RUN (2)
  BENCH_DIR (/dev/shm)   for the hot image, 256 MiB
  COLD_DIR (/var/tmp)    on a disk, for the others, 256 MiB and COLD_MIB (1536) MiB
  CLUSTER_MOUNT, CLUSTER_LOCAL  the volume, for an image of 512 MiB, and a folder beside it, as volume.sh sets them
"""

import contextlib
import ctypes
import json
import mmap
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Callable, NamedTuple

MIB = 1 << 20
QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 9))
SECONDS = float(os.environ.get("SECONDS_PER_RUN", 0.5 if QUICK else 2))
IMAGE_MIB, COLD_MIB = 256, int(os.environ.get("COLD_MIB", 512 if QUICK else 1536))
CLUSTER, LOCAL, CLUSTER_MIB = os.environ.get("CLUSTER_MOUNT"), os.environ.get("CLUSTER_LOCAL"), 512
# What the reader of cached data reads there.
CACHED_MIB = 8
LOAD = os.environ.get("LOAD", "target/release/examples/load")
SERVER_CORE, CLIENT_CORE = "0", "1"
READY_SECONDS, STOP_SECONDS = 20, 5
# Far above what anything here takes: only a hang meets it.
RUN_SECONDS = 60 + 2 * SECONDS
PR_SET_CHILD_SUBREAPER = 36
libc = ctypes.CDLL(None, use_errno=True)


# ------------------------------------------------------------------------------------------------------------ servers

class Contestant(NamedTuple):
    """A server that takes part. `command` gives its words from the port, the image and a folder for its own files."""
    name: str
    version: str
    command: Callable
    export: str = ""
    goes_into_background: bool = False


def flexnbd(program, options):
    def command(port, image, _folder):
        return [program, "serve", "--quiet", "--addr", "127.0.0.1", "--port", "0", "--newstyle-port", str(port),
                "--file", image, *shlex.split(options)]
    return command


def nbdkit(*threads):
    def command(port, image, _folder):
        return ["nbdkit", "-f", *threads, "-i", "127.0.0.1", "-p", str(port), "file", image]
    return command


def qemu_nbd(port, image, _folder):
    return ["qemu-nbd", "-f", "raw", "--cache=writeback", "-t", "-e", "100",
            "-b", "127.0.0.1", "-p", str(port), "-x", "", image]


def nbd_server(port, image, folder):
    config = os.path.join(folder, "nbd-server.conf")
    with open(config, "w") as file:
        file.write(f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n"
                   f"[image]\nexportname = {image}\nflush = true\nfua = true\n")
    return ["nbd-server", "-C", config, "-p", os.path.join(folder, "pid")]


def contestants():
    """Ours first, then those of the others that are installed."""
    env = os.environ.get
    ours = [("flexnbd", env("FLEXNBD", "target/release/flexnbd"), env("FLEXNBD_OPTIONS", ""))]
    if env("BASE"):
        ours.append(("base", env("BASE"), env("BASE_OPTIONS", "")))
    found = [Contestant(name, version_of(program), flexnbd(program, options)) for name, program, options in ours]
    for name, command, export in (("nbdkit", nbdkit(), ""), ("nbdkit -t 1", nbdkit("-t", "1"), ""),
                                  ("qemu-nbd", qemu_nbd, ""), ("nbd-server", nbd_server, "image")):
        program = name.split()[0]
        if shutil.which(program):
            found.append(Contestant(name, version_of(program), command, export, program == "nbd-server"))
        else:
            print(f"{program} is not installed and left out")
    return found


def version_of(program):
    said = subprocess.run([program, "-V"], capture_output=True, text=True, timeout=RUN_SECONDS)
    return re.search(r"\d+\.\d+[\w.]*", said.stdout + said.stderr)[0]


class Server:
    """A running server, for as long as the block takes that it is made for. Then `cpu_seconds` says what it took."""

    def __init__(self, contestant, image, folder):
        self.contestant, self.image, self.folder = contestant, image, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"nbd://127.0.0.1:{self.port}/{contestant.export}"
        self.log = os.path.join(folder, "log")
        self.pid = None

    def __enter__(self):
        command = ["taskset", "-c", SERVER_CORE, *self.contestant.command(self.port, self.image, self.folder)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.wait_until_ready()
            # The clock of the processor time of a process, as clock_getcpuclockid gives it.
            self.cpu_before = time.clock_gettime(~self.pid << 3 | 2)
        except BaseException:
            self.stop()
            raise
        return self

    def find_pid(self):
        """Who goes into the background exits with 0 and leaves a file with the number of the other process. Before it does, it
        may be ready already."""
        if not self.contestant.goes_into_background:
            return self.process.pid if self.process.poll() is None else None
        with contextlib.suppress(FileNotFoundError, ValueError), open(os.path.join(self.folder, "pid")) as file:
            return int(file.read())

    def wait_until_ready(self):
        give_up = time.monotonic() + READY_SECONDS
        while time.monotonic() < give_up and not self.process.returncode:
            self.pid = self.find_pid()
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                self.pid = self.find_pid()
                if self.pid:
                    return
            time.sleep(0.01)
        with open(self.log) as lines:
            raise RuntimeError(f"{self.contestant.name} did not get ready: {lines.read()}")

    def __exit__(self, *_):
        try:
            # A child that it has waited for is in its processor time, and it waits when a client is gone.
            self.wait(lambda: not self.children())
        finally:
            self.cpu_seconds = self.stop() - self.cpu_before

    def children(self):
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
            return file.read()

    def stop(self):
        """Ends it, and returns the processor time it has taken."""
        if not self.pid:
            return 0
        for end in signal.SIGTERM, signal.SIGKILL:
            os.kill(self.pid, end)
            ended = self.wait(self.reap)
            if ended:
                return ended.ru_utime + ended.ru_stime
        raise RuntimeError(f"{self.contestant.name} does not end")

    def reap(self):
        """What it has used, if it has ended."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if pid == self.process.pid:
            self.process.returncode = status
        return used if pid else None

    @staticmethod
    def wait(condition):
        give_up = time.monotonic() + STOP_SECONDS
        while time.monotonic() < give_up:
            found = condition()
            if found:
                return found
            time.sleep(0.005)
        return None


# ------------------------------------------------------------------------------------------------------------- images

def random_file(path, mib):
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def prepare(kind, images):
    """Brings an image to where a run begins."""
    if kind == "hot":
        return
    for path in images.values():
        # What other runs have left must not be written in this one.
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if kind == "cluster":
        # The copies are read by other processes, and have their pages in the same cache.
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3\n")
        with open(images[kind], "rb", buffering=0) as file:
            for _ in range(CACHED_MIB):
                file.read(MIB)
        return
    with open(images[kind], "r+b", buffering=0) as file:
        if kind == "disk":
            while file.read(MIB):
                pass
            return
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = cached_share(file)
        if share > 0.01:
            raise RuntimeError(f"{share:.0%} of the cold image are still in memory: COLD_DIR must be on a disk")


def cached_share(file):
    """How much of a file is in the page cache."""
    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), size) as pages:
        pin = ctypes.c_char.from_buffer(pages)
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(pin)), ctypes.c_size_t(size), found)
        # The mapping cannot be closed while something points into it.
        del pin
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in bytes(found)) / len(found)


# ------------------------------------------------------------------------------------------------------------ clients

def client(core, *words):
    """Runs a client on a core and returns what it printed."""
    command = ["taskset", "-c", core, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def load(*jobs, core=CLIENT_CORE):
    """Runs these jobs at the same time; a report on each."""
    def run(server, _master):
        words = [f"127.0.0.1:{server.port}", f"export={server.contestant.export}", f"seconds={SECONDS}"]
        for job in jobs:
            words += ["--", *job.split()]
        reports = [json.loads(line) for line in client(core, LOAD, *words).splitlines()]
        if any(report["errors"] for report in reports):
            raise RuntimeError(f"{server.contestant.name} answered {' '.join(words)} with errors: {reports}")
        return reports
    return run


def nbdcopy(to_server):
    """Copies the image, and reports as if by requests of 1 MiB."""
    def run(server, master):
        ends = [master, server.uri] if to_server else [server.uri, "null:"]
        began = time.monotonic()
        client(CLIENT_CORE, "nbdcopy", *ends)
        seconds = time.monotonic() - began
        return [{"seconds": seconds, "bytes_per_s": IMAGE_MIB * MIB / seconds, "reads": IMAGE_MIB, "writes": 0}]
    return run


# --------------------------------------------------------------------------------------------------------------- rows

class Figure(NamedTuple):
    """What is read from the report on the first job."""
    name: str
    unit: str
    key: str
    scale: float
    less_is_better: bool = False


class Row(NamedTuple):
    name: str
    image: str
    run: Callable
    figures: tuple


RATE = (Figure("", "k/s", "ops_per_s", 1e3),)
SPEED = (Figure("", "MiB/s", "bytes_per_s", MIB),)


def cluster_rows():
    """The reader's range is all that is in memory when a run begins."""
    rest = f"from={CACHED_MIB}m depth=32"
    beside = (Figure("", "k/s", "ops_per_s", 1e3), Figure(": median", "ms", "p50_us", 1e3, True),
              Figure(": longest", "ms", "longest_us", 1e3, True))
    return [Row("4 KiB cold random reads, depth 32", "cluster", load(rest), RATE),
            Row("4 KiB random writes, depth 32", "cluster", load(f"{rest} write=100"), RATE),
            Row("4 KiB depth-1 reads of cached data beside such writes", "cluster",
                load(f"depth=1 size={CACHED_MIB}m", f"{rest} write=100"), beside)]


def rows():
    if CLUSTER:
        return cluster_rows()
    table = []
    shapes = [(1, 1), (32, 1), (1, 16), (32, 16)]

    def small(name, image, words, which):
        for depth, connections in which:
            job = f"depth={depth} connections={connections} {words}"
            table.append(Row(f"4 KiB {name}, depth {depth}, {connections} conn.", image, load(job), RATE))

    small("random reads", "hot", "", shapes)
    small("random writes", "hot", "write=100", shapes)
    table.append(Row("4 KiB random reads, depth 1, client and server on one core", "hot",
                     load("depth=1", core=SERVER_CORE), RATE))
    large = "block=1m order=sequential depth=4"
    table.append(Row("1 MiB sequential reads, depth 4", "hot", load(large), SPEED))
    table.append(Row("1 MiB sequential reads, depth 4, thrown away", "hot", load(f"{large} data=discard"), SPEED))
    table.append(Row("1 MiB sequential writes, depth 4", "hot", load(f"{large} write=100"), SPEED))
    table.append(Row("nbdcopy from the server to null:", "hot", nbdcopy(False), SPEED))
    table.append(Row("nbdcopy from memory to the server", "hot", nbdcopy(True), SPEED))

    table.append(Row("1 MiB sequential writes with FUA, depth 4", "disk", load(f"{large} write=100 fua=100"), SPEED))
    small("FUA writes", "disk", "write=100 fua=100", shapes)
    table.append(Row("4 KiB random 70 % reads, 30 % FUA writes, depth 32", "disk",
                     load("depth=32 write=30 fua=100"), RATE))
    half = IMAGE_MIB // 2
    table.append(Row("4 KiB depth-1 reads beside 188 MiB/s of flushed writes", "disk",
                     load(f"depth=1 size={half}m",
                          f"from={half}m block=64k depth=16 write=100 pace=188m flush=16m"),
                     (Figure(": longest", "ms", "longest_us", 1e3, True), Figure(": p99.9", "ms", "p999_us", 1e3, True),
                      Figure(": reads", "k/s", "ops_per_s", 1e3))))

    # No block is read twice.
    cold_4k, cold_1m = f"depth=32 ops={COLD_MIB * 256}", f"{large} ops={COLD_MIB}"
    table.append(Row("4 KiB cold random reads, depth 32, 1 conn.", "cold", load(cold_4k), RATE))
    table.append(Row("4 KiB cold random reads, depth 32, 4 conn.", "cold", load(f"{cold_4k} connections=4"), RATE))
    table.append(Row("1 MiB cold sequential reads, depth 4", "cold", load(cold_1m), SPEED))
    return table


class Sample(NamedTuple):
    """What a run gave: a value for each figure, the server's processor time, how busy the client's core was."""
    values: list
    cpu_us_per_op: float
    client_busy: float


def measure(row, contestant, images, folder):
    with tempfile.TemporaryDirectory(dir=folder) as own, Server(contestant, images[row.image], own) as server:
        prepare(row.image, images)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        reports = row.run(server, images.get("hot"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    client_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ops = sum(report["reads"] + report["writes"] for report in reports)
    return Sample([reports[0][figure.key] / figure.scale for figure in row.figures],
                  server.cpu_seconds * 1e6 / ops, client_seconds / max(report["seconds"] for report in reports))


# ------------------------------------------------------------------------------------------------------------- tables

def number(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def ratios_of(ours, other, less_is_better):
    """In each round, how often ours is as good as the other."""
    return [theirs / mine if less_is_better else mine / theirs for mine, theirs in zip(ours, other)]


def print_table(head, lines):
    print("\n| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def print_results(names, results):
    """`results` has for each row and name the samples of the rounds that are over."""
    has_base, others = "base" in names, [name for name in names if name not in ("flexnbd", "base")]
    head = ["", *names, *(["to the best of the others", "from, to"] if others else []),
            *(["to base", "from, to"] if has_base else [])]
    figures, costs = [], []
    for row, samples in results.items():
        for index, figure in enumerate(row.figures):
            values = {name: [sample.values[index] for sample in samples[name]] for name in names}
            medians = {name: statistics.median(values[name]) for name in names}
            best = min if figure.less_is_better else max
            line = [f"{row.name}{figure.name} ({figure.unit})", *(number(medians[name]) for name in names)]
            for other in ([best(others, key=medians.get)] if others else []) + (["base"] if has_base else []):
                ratios = ratios_of(values["flexnbd"], values[other], figure.less_is_better)
                line += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}, {max(ratios):.2f}"]
            figures.append(line)
        costs.append([row.name,
                      *(number(statistics.median(sample.cpu_us_per_op for sample in samples[name])) for name in names),
                      f"{max(statistics.median(sample.client_busy for sample in samples[name]) for name in names):.0%}"])
    print_table(head, figures)
    print("\nProcessor time of the server, in microseconds for each request (nbdcopy: for each MiB), and how busy the\n"
          "client's core was at most; where that is near 100 %, the client is what is measured.")
    print_table(["", *names, "client"], costs)


def bench(chosen, images, folder):
    servers = contestants()
    names = [server.name for server in servers]
    print(", ".join(f"{server.name} {server.version}" for server in servers))
    print(f"rounds: {ROUNDS}, seconds a run: {SECONDS}, Linux {os.uname().release}, load before: {os.getloadavg()[0]:.2f}; "
          + ", ".join(f"{kind}: {os.stat(path).st_size // MIB} MiB in {os.path.dirname(os.path.dirname(path))}"
                      for kind, path in images.items()), flush=True)
    complete = {}
    try:
        for turn in range(ROUNDS):
            print(f"round {turn + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            first = turn % len(servers)
            for row in chosen:
                samples = {server.name: measure(row, server, images, folder)
                           for server in servers[first:] + servers[:first]}
                for name in names:
                    complete.setdefault(row, {}).setdefault(name, []).append(samples[name])
    finally:
        # Also what there is when it is interrupted.
        if complete:
            print_results(names, complete)


def main():
    if os.cpu_count() < 2:
        sys.exit("bench: two cores are needed, one for the server and one for the client")
    pattern = re.compile(os.environ.get("ROWS", ""), re.IGNORECASE)
    chosen = [row for row in rows() if pattern.search(row.name)]
    if not chosen:
        sys.exit("bench: no row matches ROWS; there are:\n" + "\n".join(row.name for row in rows()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # So that a server that goes into the background is still a child, which can be waited for.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.ExitStack() as stack:
        def folder_in(parent):
            return stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix="flexnbd-bench-"))
        # What volume.sh has made goes with it, however that ends.
        memory = folder_in(LOCAL or os.environ.get("BENCH_DIR", "/dev/shm"))
        disk = folder_in(LOCAL or os.environ.get("COLD_DIR", "/var/tmp"))
        needed = {row.image for row in chosen}
        if not CLUSTER:
            # nbdcopy copies it.
            needed.add("hot")
        images = {}
        for kind, folder, mib in (("hot", memory, IMAGE_MIB), ("disk", disk, IMAGE_MIB), ("cold", disk, COLD_MIB),
                                  ("cluster", CLUSTER, CLUSTER_MIB)):
            if kind in needed:
                images[kind] = os.path.join(folder, f"{kind}.img")
                random_file(images[kind], mib)
        bench(chosen, images, memory)


if __name__ == "__main__":
    main()
