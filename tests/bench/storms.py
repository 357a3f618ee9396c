"""Measures how long a quiet client waits beside clients that storm. `make bench-storms` runs it.

The quiet client reads 4 KiB at a time, at depth 1, of 64 MiB that are in memory; 16 other clients do meanwhile what is
dear for a server, as much of it as they may. That is done on a disk (ext4, as a rule), on tmpfs, and on a loop device
whose file is on tmpfs, so that the kernel writes the zeroes itself. In a round each storm meets each server once, in an
order that changes from round to round; the server has a core of its own, as in bench.py, all clients are on the other.

Printed are the medians of the rounds, in milliseconds: half of the reads took at most so long, 99 of 100 did, and the
longest. The aim is 10 ms for 99 of 100.

Environment:
  FLEXNBD, LOAD, BASE, FLEXNBD_OPTIONS, BASE_OPTIONS  as for bench.py
  ROWS                   only storms whose name, with its place, has a match of this regular expression
  QUICK=1                one short round, which shows that it works and no more
  ROUNDS (3), SECONDS_PER_RUN (3)
  BENCH_DIR (/dev/shm)   on tmpfs, for images with up to 1 GiB of data
  COLD_DIR (/var/tmp)    on a disk, for the same
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable, NamedTuple, Optional

import bench
from bench import CLIENT_CORE, LOAD, MIB, QUICK, libc

ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 3))
SECONDS = float(os.environ.get("SECONDS_PER_RUN", 0.5 if QUICK else 3))
CLIENTS = 16
AIM_MS = 10
# The quiet client reads this much, at the beginning of every image. The storms are behind it.
QUIET_MIB = 64
# How much of an image storms fill, zero and trim.
DATA_MIB = 256 if QUICK else 1024
IMAGE_MIB = 4096
BLOCK = 4096
EXTENTS = 20_000 if QUICK else 200_000
# How long a storm rages before it is measured what it does.
RISE_SECONDS = 0.5
# Far above what the aim allows: then the quiet client has been given up.
STALL_SECONDS = 30
# A server may be killed only when the kernel has done what it has taken, such as a gigabyte of zeroes.
bench.STOP_SECONDS = 300
COMPARED = "flexnbd", "base", "nbdkit", "qemu-nbd"


# ------------------------------------------------------------------------------------------------------------- images

libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
KEEP_SIZE, PUNCH_HOLE = 1, 2


def fallocate(file, mode, offset, length):
    if libc.fallocate(file.fileno(), mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def sparse(file):
    """Nothing but what the quiet client reads."""
    fallocate(file, KEEP_SIZE | PUNCH_HOLE, QUIET_MIB * MIB, (IMAGE_MIB - QUIET_MIB) * MIB)


def full(file):
    """Data where storms are."""
    sparse(file)
    fill(file, QUIET_MIB, DATA_MIB)


def fill(file, at_mib, mib):
    piece = os.urandom(MIB)
    for at in range(at_mib, at_mib + mib):
        os.pwrite(file.fileno(), piece, at * MIB)


def every_second_block():
    return range(QUIET_MIB * MIB, QUIET_MIB * MIB + EXTENTS * 2 * BLOCK, 2 * BLOCK)


def scattered(file):
    """A block of data, a hole of one block, and so on. Half as many blocks of data as extents."""
    sparse(file)
    block = os.urandom(BLOCK)
    for at in every_second_block()[:EXTENTS // 2]:
        os.pwrite(file.fileno(), block, at)


def unwritten(file):
    """Blocks that take room and hold nothing, and holes between them: a search for data goes through all of them."""
    sparse(file)
    for at in every_second_block():
        fallocate(file, 0, at, BLOCK)


class Place(NamedTuple):
    """Where an image is, and its file; on a loop device the file is behind the device."""
    name: str
    image: str
    file: str
    has_extents: bool


# ------------------------------------------------------------------------------------------------------------- storms

class Storm(NamedTuple):
    name: str
    # Makes the image what it shall be.
    shape: Callable
    # Words of load, or none for connections that are reset.
    words: Optional[str]
    replies: str = "simple"
    needs_extents: bool = False


def storms():
    many = f"connections={CLIENTS} depth=32"
    behind = f"from={QUIET_MIB}m size={DATA_MIB}m"
    # As much as the length of a request can say.
    whole = f"block={IMAGE_MIB * 1024 - 4}k"
    return [
        Storm("WRITE_ZEROES that take room", sparse, f"{many} {behind} command=zeroes block={DATA_MIB}m"),
        Storm("TRIM of data", full, f"{many} {behind} command=trim block={DATA_MIB}m"),
        Storm("CACHE of 4 GiB", full, f"{many} {whole} command=cache"),
        Storm(f"BLOCK_STATUS of {EXTENTS} extents", scattered,
              f"{many} from={QUIET_MIB}m size={EXTENTS * BLOCK} block={EXTENTS * BLOCK} command=status", "structured", True),
        Storm(f"READ among {EXTENTS} unwritten extents", unwritten,
              f"{many} from={QUIET_MIB}m size={EXTENTS * 2 * BLOCK}", "structured", True),
        Storm("1 MiB writes with FUA", full, f"connections={CLIENTS} depth=4 {behind} block=1m write=100 fua=100"),
        Storm("connections that ask for zeroes and are reset", sparse, None),
    ]


@contextlib.contextmanager
def raging(storm, server):
    """The storm, for as long as the block takes. False: this server does not take what it is made of."""
    if storm.words is None:
        command = [sys.executable, os.path.abspath(__file__), "--resets", str(server.port), server.contestant.export]
    else:
        command = [LOAD, f"127.0.0.1:{server.port}", f"export={server.contestant.export}", f"replies={storm.replies}",
                   "seconds=3600", "stall=3600", "--", *storm.words.split()]
    process = subprocess.Popen(["taskset", "-c", CLIENT_CORE, *command], stdin=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(RISE_SECONDS)
        yield process.poll() is None
    finally:
        ended = process.poll()
        process.kill()
        said = process.communicate()[1]
        if ended is not None:
            print(f"{server.contestant.name}: {said.strip()}", file=sys.stderr)


def reset_over_and_over(port, export):
    """What each of the clients does: it negotiates, asks for long ranges of zeroes, and resets its connection."""
    zeroes = b"".join(struct.pack(">IHHQQI", 0x25609513, 2, 6, cookie, QUIET_MIB * MIB, DATA_MIB * MIB)
                      for cookie in range(32))
    while True:
        with socket.create_connection(("127.0.0.1", port)) as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(ConnectionError):
                take(stream, 18)
                option = struct.pack(">QII", 0x49484156454F5054, 1, len(export))
                stream.sendall(struct.pack(">I", 3) + option + export.encode())
                take(stream, 10)
                stream.sendall(zeroes)
                # It goes when the server has taken them.
                time.sleep(0.005)


def take(stream, length):
    while length:
        came = stream.recv(length)
        if not came:
            raise ConnectionError("closed")
        length -= len(came)


# ------------------------------------------------------------------------------------------------------------ the runs

class Sample(NamedTuple):
    p50_ms: float
    p99_ms: float
    longest_ms: float


def quiet(server, *words):
    command = [LOAD, f"127.0.0.1:{server.port}", f"export={server.contestant.export}", f"stall={STALL_SECONDS}", *words]
    return json.loads(bench.client(CLIENT_CORE, *command))


def measure(storm, place, contestant, folder):
    """What the quiet client met; nothing where the server does not take the storm's requests."""
    with open(place.image if place.has_extents else place.file, "r+b", buffering=0) as file:
        storm.shape(file)
    with open(place.image, "rb") as file:
        # What this and earlier runs have left must not be written while it is measured.
        os.fsync(file.fileno())
    with tempfile.TemporaryDirectory(dir=folder) as own, bench.Server(contestant, place.image, own) as server:
        # What it reads is in memory from then on.
        quiet(server, "--", f"size={QUIET_MIB}m", "block=64k", f"ops={QUIET_MIB * 16}")
        with raging(storm, server) as rages:
            if not rages:
                return None
            try:
                report = quiet(server, f"seconds={SECONDS}", "--", f"size={QUIET_MIB}m")
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return Sample(*[STALL_SECONDS * 1e3] * 3)
    return Sample(*(report[key] / 1e3 for key in ("p50_us", "p99_us", "longest_us")))


def print_results(names, results):
    lines, missed = [], []
    for (storm, place), samples in results.items():
        name = f"{storm.name}, {place.name}"
        line = [name]
        for server in names:
            there = [sample for sample in samples[server] if sample]
            medians = [statistics.median(values) for values in zip(*there)]
            line.append(" / ".join(f"{value:.3g}" for value in medians) or "does not take it")
            if server == "flexnbd" and medians and medians[1] > AIM_MS:
                missed.append(name)
        lines.append(line)
    print("\nWhat a quiet client's reads took: half of them at most / 99 of 100 / the longest, in ms.")
    bench.print_table(["beside", *names], lines)
    print(f"\n{len(missed)} of {len(lines)} beyond the aim of {AIM_MS} ms for 99 of 100" + "".join(f"\n- {m}" for m in missed))


@contextlib.contextmanager
def loop_device(path):
    """A block device of this file, or nothing where that is not allowed."""
    attached = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True, timeout=60)
    device = attached.stdout.strip()
    if attached.returncode:
        print(f"no loop device: {attached.stderr.strip()}")
    try:
        yield device
    finally:
        if device:
            subprocess.run(["losetup", "-d", device], check=True, timeout=60)


def run(chosen, folder):
    servers = [server for server in bench.contestants() if server.name in COMPARED]
    names = [server.name for server in servers]
    print(", ".join(f"{server.name} {server.version}" for server in servers))
    print(f"rounds: {ROUNDS}, seconds a run: {SECONDS}, Linux {os.uname().release}, load before: {os.getloadavg()[0]:.2f}",
          flush=True)
    complete = {}
    try:
        for turn in range(ROUNDS):
            first = turn % len(servers)
            for storm, place in chosen:
                print(f"round {turn + 1} of {ROUNDS}: {storm.name}, {place.name}", file=sys.stderr, flush=True)
                samples = {server.name: measure(storm, place, server, folder)
                           for server in servers[first:] + servers[:first]}
                for name in names:
                    complete.setdefault((storm, place), {}).setdefault(name, []).append(samples[name])
    finally:
        # Also what there is when it is interrupted.
        if complete:
            print_results(names, complete)


def main():
    if sys.argv[1:2] == ["--resets"]:
        for _ in range(CLIENTS):
            threading.Thread(target=reset_over_and_over, args=(int(sys.argv[2]), sys.argv[3]), daemon=True).start()
        signal.pause()
    if os.cpu_count() < 2:
        sys.exit("bench-storms: two cores are needed, one for the server and one for the clients")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    libc.prctl(bench.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.ExitStack() as stack:
        def image_in(parent, name):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix="flexnbd-bench-"))
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.truncate(IMAGE_MIB * MIB)
                fill(file, 0, QUIET_MIB)
            return path
        memory = os.environ.get("BENCH_DIR", "/dev/shm")
        on_disk, in_memory, behind = (image_in(parent, name) for parent, name in (
            (os.environ.get("COLD_DIR", "/var/tmp"), "disk.img"), (memory, "memory.img"), (memory, "loop.img")))
        places = [Place("disk", on_disk, on_disk, True), Place("tmpfs", in_memory, in_memory, True)]
        device = stack.enter_context(loop_device(behind))
        if device:
            places.append(Place("loop", device, behind, False))
        pattern = re.compile(os.environ.get("ROWS", ""), re.IGNORECASE)
        chosen = [(storm, place) for storm in storms() for place in places
                  if (place.has_extents or not storm.needs_extents) and pattern.search(f"{storm.name}, {place.name}")]
        if not chosen:
            sys.exit("bench-storms: no row matches ROWS")
        run(chosen, os.path.dirname(in_memory))


if __name__ == "__main__":
    main()
