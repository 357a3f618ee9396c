"""Measures a migration: how long it takes beside nbdcopy, how long clients are paused, how much memory it needs.
`make bench-migration` runs it.

- Time: `flexnbd mirror` from a server to a listener, until both have ended with exit code 0, beside `nbdcopy` from one
  `nbdkit file` to another, and then `sync` of the copy; so both copies are durable. They take turns in each round. All
  is on the loopback, all files are in the page cache at the start, and nothing of the copies is there yet. With it goes
  the processor time of all processes of each, which depends less on what else the machine does.
- Pause: a client with one request in flight, idle (a read of 4 KiB every millisecond) or writing (64 KiB at random
  places, 50 MB/s), for a while without a migration, which shows the noise of the machine, and then during one. What it
  reports is its longest reply time of either; and, as the source never answers the request that is there when it ends,
  how long that one takes until the destination, to which the client goes on, has answered it.
- Memory: the largest VmHWM of both sides in the runs above.

Environment: FLEXNBD (the binary), QUICK=1 (one round, small), ROUNDS (5), SIZE_MIB (1024), BENCH_DIR (/var/tmp, which
should be on a disk; what can be measured without one is measured in /dev/shm too).
"""

import os
import random
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 5))
SIZE = int(os.environ.get("SIZE_MIB", 128 if QUICK else 1024)) * MIB
SPARSE_SIZE, SPARSE_DATA = 8192 * MIB, 64 * MIB
FLEXNBD = os.environ.get("FLEXNBD", "target/release/flexnbd")
# How long a client is watched without a migration.
NOISE_SECONDS = 1 if QUICK else 3
WRITE_SIZE, WRITE_BYTES_PER_SECOND = 64 << 10, 50_000_000
READ_SIZE, READ_SECONDS = 4 << 10, 0.001
# Far above what anything here takes: only a hang meets it.
DEADLINE = 300

READ, WRITE = 0, 1
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC, GREETING_LENGTH = 0x25609513, 0x67446698, 152


class Process:
    """A running program, ended with the block it is made for. Keeps an eye on its memory while it is waited for."""

    def __init__(self, folder, name, *words):
        self.name, self.peak_bytes = name, 0
        self.log = os.path.join(folder, f"{name}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def note_memory(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            peak = re.search(r"VmHWM:\s*(\d+) kB", status.read())
        # What has ended has no memory any more.
        if peak:
            self.peak_bytes = int(peak[1]) << 10

    def said(self):
        with open(self.log) as log:
            return log.read()

    def expect_success(self):
        """Waits for its end with exit code 0."""
        descriptor = os.pidfd_open(self.process.pid)
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            give_up = time.monotonic() + DEADLINE
            while not poller.poll(10):
                self.note_memory()
                if time.monotonic() > give_up:
                    raise RuntimeError(f"{self.name} does not end: {self.said()}")
        finally:
            os.close(descriptor)
        if self.process.wait() != 0:
            raise RuntimeError(f"{self.name}: exit code {self.process.returncode}\n{self.said()}")


def run(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def wait_for(what, condition):
    give_up = time.monotonic() + 20
    while not (result := condition()):
        if time.monotonic() > give_up:
            raise RuntimeError(f"no {what} in time")
        time.sleep(0.01)
    return result


def flexnbd(folder, name, mode, image, *words):
    """A server; its control socket is there when it is ready."""
    control = os.path.join(folder, f"{name}.sock")
    process = Process(folder, name, FLEXNBD, mode, "--verbose", "--addr", "127.0.0.1", "--port", "0",
                      "--file", image, "--sock", control, *words)
    try:
        wait_for(f"socket of {name}", lambda: os.path.exists(control))
        status = run(FLEXNBD, "status", "--sock", control)
        process.port, process.control = int(re.search(r" address=\S*:(\d+)", status)[1]), control
    except BaseException:
        process.__exit__()
        raise
    return process


def mirror_words(source, destination):
    return [FLEXNBD, "mirror", "--addr", "127.0.0.1", "--port", str(destination.port), "--sock", source.control]


def nbdkit(folder, name, image):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pid_file = os.path.join(folder, f"{name}.pid")
    process = Process(folder, name, "nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-P", pid_file, "file", image)
    process.uri = f"nbd://127.0.0.1:{port}"
    try:
        # Written when it listens.
        wait_for(f"{name} to listen", lambda: os.path.exists(pid_file))
    except BaseException:
        process.__exit__()
        raise
    os.remove(pid_file)
    return process


def new_copy(folder, size):
    """An empty image, and nothing left to be written by the system for the one before."""
    path = os.path.join(folder, "copy.img")
    if os.path.exists(path):
        os.remove(path)
    with open(path, "wb") as copy:
        copy.truncate(size)
    os.sync()
    return path


def unmark(image):
    """It has moved in the round before."""
    try:
        os.removexattr(image, "user.flexnbd.state")
    except OSError:
        pass


def time_flexnbd(folder, image, results):
    copy = new_copy(folder, os.path.getsize(image))
    unmark(image)
    with flexnbd(folder, "destination", "listen", copy) as destination, \
            flexnbd(folder, "source", "serve", image) as source:
        started = time.monotonic()
        run(*mirror_words(source, destination))
        # By its order, the destination ends last.
        source.expect_success()
        destination.note_memory()
        destination.expect_success()
        elapsed = time.monotonic() - started
    for side in (source, destination):
        results.setdefault(f"peak memory, {side.name}", []).append(side.peak_bytes / MIB)
    return elapsed


def time_nbdcopy(folder, image, _results):
    copy = new_copy(folder, os.path.getsize(image))
    with nbdkit(folder, "to", copy) as to, nbdkit(folder, "from", image) as origin:
        started = time.monotonic()
        run("nbdcopy", origin.uri, to.uri)
        run("sync", copy)
        return time.monotonic() - started


def processor_seconds():
    """What all processes that were waited for have used."""
    used = os.times()
    return used.children_user + used.children_system


class Client:
    """An oldstyle client with one request in flight."""

    def __init__(self, port, writes):
        self.payload = os.urandom(WRITE_SIZE) if writes else b""
        self.random = random.Random(1)
        self.connect(port)

    def connect(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.receive(GREETING_LENGTH)

    def receive(self, length):
        received = bytearray()
        while len(received) < length:
            piece = self.socket.recv(length - len(received))
            if not piece:
                raise ConnectionResetError("end of stream")
            received += piece
        return bytes(received)

    def request(self):
        if self.payload:
            kind, length = WRITE, WRITE_SIZE
        else:
            kind, length = READ, READ_SIZE
        offset = self.random.randrange(SIZE // length) * length
        self.socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, kind, 0, offset, length) + self.payload)
        magic, error, _ = REPLY.unpack(self.receive(REPLY.size))
        if magic != REPLY_MAGIC or error:
            raise RuntimeError(f"the client was answered with error {error}")
        if not self.payload:
            self.receive(length)

    def work(self, seconds):
        """Makes requests at its pace for so long, or until the server ends the connection. Returns how long the longest
        reply took, and when the request was made that was not answered."""
        longest, begun = 0, time.monotonic()
        pace = WRITE_SIZE / WRITE_BYTES_PER_SECOND if self.payload else READ_SECONDS
        due = begun
        while (now := time.monotonic()) < begun + seconds:
            if now < due:
                time.sleep(due - now)
            # What was missed is made up for, but not what a long pause was.
            due = max(due + pace, now - 1)
            asked = time.monotonic()
            try:
                self.request()
            except ConnectionError:
                return longest, asked
            longest = max(longest, time.monotonic() - asked)
        return longest, None

    def reconnect(self, port):
        """Makes a request to another server as soon as that takes it."""
        give_up = time.monotonic() + DEADLINE
        while True:
            self.socket.close()
            try:
                self.connect(port)
                return self.request()
            except ConnectionError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.001)


def measure_pause(folder, image, writes, results):
    work = "writing 50 MB/s" if writes else "idle"
    copy = new_copy(folder, SIZE)
    unmark(image)
    with flexnbd(folder, "destination", "listen", copy, "--serve") as destination, \
            flexnbd(folder, "source", "serve", image) as source:
        client = Client(source.port, writes)
        noise, cut = client.work(NOISE_SECONDS)
        with Process(folder, "mirror", *mirror_words(source, destination), "--wait") as mirror:
            if not cut:
                longest, cut = client.work(DEADLINE)
            if not cut:
                raise RuntimeError(f"the migration did not end: {source.said()}")
            client.reconnect(destination.port)
            handed_over = time.monotonic() - cut
            mirror.expect_success()
        client.socket.close()
        source.expect_success()
        destination.note_memory()
    told = re.search(r"complete: .*, ([\d.]+) s, clients paused for (\d+) ms", source.said())
    for row, value in (
        (f"{work}: longest reply without a migration", noise * 1000),
        (f"{work}: longest reply during the migration", longest * 1000),
        (f"{work}: the last request, answered by the destination", handed_over * 1000),
        (f"{work}: the pause by the source's log", float(told[2])),
        (f"{work}: the migration", float(told[1]) * 1000),
        ("peak memory, destination", destination.peak_bytes / MIB),
    ):
        results.setdefault(row, []).append(value)


def fill(file, size):
    for _ in range(size // MIB):
        file.write(os.urandom(MIB))


def make_images(folder):
    full, sparse = os.path.join(folder, "full.img"), os.path.join(folder, "sparse.img")
    with open(full, "wb") as file:
        # Random bytes: nobody may take a short cut over zeroes.
        fill(file, SIZE)
    with open(sparse, "wb") as file:
        file.truncate(SPARSE_SIZE)
        pieces = SPARSE_DATA // MIB
        for number in range(pieces):
            file.seek(number * SPARSE_SIZE // pieces)
            fill(file, MIB)
    return full, sparse


def show(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(values):
    """The median, and the least and the most."""
    return f"{show(statistics.median(values))} ({show(min(values))}..{show(max(values))})"


def print_tables(times, figures):
    print("\n| durable copy, s | flexnbd | nbdcopy and sync | flexnbd to nbdcopy, by round |\n|---|---:|---:|---:|")
    for name, (ours, others) in times.items():
        ratios = [mine / other for mine, other in zip(ours, others)]
        print(f"| {name} | {cells(ours)} | {cells(others)} | {cells(ratios)} |")
    print("\n| pause, ms | |\n|---|---:|")
    for name, values in figures.items():
        if not name.startswith("peak"):
            print(f"| {name} | {cells(values)} |")
    print("\n| peak memory, MiB | |\n|---|---:|")
    for name, values in figures.items():
        if name.startswith("peak"):
            print(f"| {name} | {show(max(values))} |")


def bench(folders):
    print(f"rounds: {ROUNDS}, Linux {os.uname().release}, {os.cpu_count()} cores, load: {os.getloadavg()[0]:.2f}")
    print(run("nbdkit", "--version").strip(), run("nbdcopy", "--version").splitlines()[0], sep=", ", flush=True)
    images = [make_images(folder) for folder in folders]
    times, figures = {}, {}
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        for folder, (full, sparse) in zip(folders, images):
            where = os.path.dirname(folder)
            for name, image in (
                (f"{SIZE // MIB} MiB random in {where}", full), (f"8 GiB sparse with 64 MiB in {where}", sparse),
            ):
                turns = list(enumerate((time_flexnbd, time_nbdcopy)))
                for who, measure in turns if number % 2 == 0 else turns[::-1]:
                    before = processor_seconds()
                    times.setdefault(name, ([], []))[who].append(measure(folder, image, figures))
                    spent = processor_seconds() - before
                    times.setdefault(f"{name}, processor time", ([], []))[who].append(spent)
        for writes in (False, True):
            measure_pause(folders[0], images[0][0], writes, figures)
    print_tables(times, figures)
    print(f"\nload after: {os.getloadavg()[0]:.2f}")


def main():
    for program in ("nbdkit", "nbdcopy"):
        if not shutil.which(program):
            sys.exit(f"bench: {program} is not installed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    disk, memory = os.environ.get("BENCH_DIR", "/var/tmp"), "/dev/shm"
    with tempfile.TemporaryDirectory(dir=disk, prefix="flexnbd-bench-") as first, \
            tempfile.TemporaryDirectory(dir=memory, prefix="flexnbd-bench-") as second:
        bench([first, second])


if __name__ == "__main__":
    main()
