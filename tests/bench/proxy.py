"""Measures what a proxy costs between a client and its server. `make bench-proxy` runs it.

The same client (tests/bench/load.rs) speaks to the server and to a proxy before it, in turn, in every round; the server
serves an image on tmpfs. On two cores the three processes have less to themselves than the two have, so the share of the
direct rate says more about the machine than about the proxy there; the added latency does not suffer as much.

Then both are put behind a forwarder that delays everything by 1 ms, one way, and the proxy is asked at depth 1 and 32, and
by a client that reads one block after the other, without reading ahead and with it; and the server is killed while another
one of the same image waits for the proxy, which was told of it with `switch --when-lost`: the longest answer a reader has
seen is the hand-over.

Printed are medians of the rounds.

Environment: FLEXNBD, LOAD, QUICK=1, ROUNDS (5), SECONDS_PER_RUN (2), BENCH_DIR (/dev/shm)
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import bench
from bench import LOAD, MIB, QUICK

ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 5))
SECONDS = float(os.environ.get("SECONDS_PER_RUN", 0.5 if QUICK else 2))
FLEXNBD = os.environ.get("FLEXNBD", "target/release/flexnbd")
IMAGE_MIB = 256
READY_SECONDS, STOP_SECONDS = 20, 5
DELAY_SECONDS = 0.001
# What --cache is given; 0 is as without it.
READ_AHEAD_BYTES = 0, 4096, 128 << 10, 512 << 10


class Process:
    """A flexnbd, for as long as the block takes that it is made for. It is ready when its control socket is there."""

    def __init__(self, folder, name, *words):
        self.sock = os.path.join(folder, f"{name}.sock")
        self.words = [FLEXNBD, *words, "--quiet", "--addr", "127.0.0.1", "--sock", self.sock]

    def __enter__(self):
        self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL)
        give_up = time.monotonic() + READY_SECONDS
        while not os.path.exists(self.sock):
            if time.monotonic() > give_up or self.process.poll() is not None:
                self.stop()
                raise RuntimeError(f"{' '.join(self.words)} did not get ready")
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self, by=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(by)
        self.process.wait(STOP_SECONDS)

    def status_kib(self, key):
        with open(f"/proc/{self.process.pid}/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder, name, image, port, *options):
    return Process(folder, name, "serve", "--file", image, "--port", "0", "--newstyle-port", str(port), *options)


def proxy(folder, name, server_port, port, *options):
    return Process(folder, name, "proxy", "--conn-addr", "127.0.0.1", "--conn-port", str(server_port), "--port", "0",
                   "--newstyle-port", str(port), "--max-clients", "64", *options)


def load(port, job, seconds=SECONDS):
    """Runs a job against a port; the report on it."""
    words = [LOAD, f"127.0.0.1:{port}", "export=", f"seconds={seconds}", "--", *job.split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60 + 2 * seconds, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    report = json.loads(done.stdout)
    if report["errors"]:
        raise RuntimeError(f"{' '.join(words)}: {report}")
    return report


class Delay:
    """A forwarder that hands on what it gets a fixed time later, in both directions."""

    def __init__(self, to_port):
        self.to_port = to_port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to_port))
                for one, other in ((near, far), (far, near)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    queue, there_is_more = [], threading.Condition()
                    threading.Thread(target=self.receive, args=(one, queue, there_is_more), daemon=True).start()
                    threading.Thread(target=self.send, args=(other, queue, there_is_more), daemon=True).start()

    @staticmethod
    def receive(one, queue, there_is_more):
        data = b"-"
        while data:
            try:
                data = one.recv(1 << 20)
            except OSError:
                data = b""
            with there_is_more:
                queue.append((time.monotonic() + DELAY_SECONDS, data))
                there_is_more.notify()

    @staticmethod
    def send(other, queue, there_is_more):
        with contextlib.suppress(OSError):
            while True:
                with there_is_more:
                    while not queue:
                        there_is_more.wait()
                    due, data = queue.pop(0)
                time.sleep(max(0, due - time.monotonic()))
                if not data:
                    return other.shutdown(socket.SHUT_WR)
                other.sendall(data)


def median(figures, name):
    return statistics.median(figures[name])


def compare(folder, image, figures):
    """One round of the server alone and behind a proxy."""
    direct, through = free_port(), free_port()
    with serve(folder, "server", image, direct), proxy(folder, "proxy", direct, through) as between:
        figures.setdefault("idle KiB", []).append(between.status_kib("VmRSS:"))
        for name, job in (("reads, depth 1", "depth=1"), ("reads, depth 32", "depth=32"),
                          ("writes, depth 1", "depth=1 write=100"), ("writes, depth 32", "depth=32 write=100"),
                          ("1 MiB reads, depth 4", "block=1m order=sequential depth=4"),
                          ("1 MiB writes, depth 4", "block=1m order=sequential depth=4 write=100")):
            for way, port in (("direct", direct), ("proxy", through)):
                report = load(port, job)
                figures.setdefault(f"{name} {way} us", []).append(report["p50_us"])
                figures.setdefault(f"{name} {way} ops", []).append(report["ops_per_s"])
        figures.setdefault("peak KiB", []).append(between.status_kib("VmHWM:"))


def behind_a_delay(folder, image, figures):
    direct, through = free_port(), free_port()
    with serve(folder, "server", image, direct), Delay(direct) as delay, proxy(folder, "proxy", delay.port, through):
        for depth in 1, 32:
            figures.setdefault(f"1 ms, depth {depth}", []).append(load(through, f"depth={depth}")["ops_per_s"])
        for size in READ_AHEAD_BYTES:
            ahead = free_port()
            with proxy(folder, "ahead", delay.port, ahead, f"--cache={size}"):
                figures.setdefault(f"1 ms, --cache={size}", []).append(load(ahead, "order=sequential")["ops_per_s"])


def hand_over(folder, image, figures):
    first, second, through = free_port(), free_port(), free_port()
    with serve(folder, "first", image, first, "--shared-image") as old, \
            serve(folder, "second", image, second, "--shared-image"), proxy(folder, "proxy", first, through) as between:
        subprocess.run([FLEXNBD, "switch", "--sock", between.sock, "--conn-addr", "127.0.0.1", "--conn-port",
                        str(second), "--when-lost"], check=True, timeout=30, stdout=subprocess.DEVNULL)
        timer = threading.Timer(SECONDS / 2, lambda: old.stop(signal.SIGKILL))
        timer.start()
        figures.setdefault("hand-over ms", []).append(load(through, "depth=1")["longest_us"] / 1000)
        timer.join()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR", "/dev/shm"), prefix="flexnbd-bench-") as folder:
        image = os.path.join(folder, "image")
        bench.random_file(image, IMAGE_MIB)
        print(f"rounds: {ROUNDS}, seconds a run: {SECONDS}, Linux {os.uname().release}, {os.cpu_count()} cores, "
              f"load before: {os.getloadavg()[0]:.2f}", flush=True)
        for turn in range(ROUNDS):
            print(f"round {turn + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            compare(folder, image, figures)
            behind_a_delay(folder, image, figures)
            hand_over(folder, image, figures)
    lines = []
    for name in [key[:-len(" direct us")] for key in figures if key.endswith(" direct us")]:
        direct, through = (median(figures, f"{name} {way} ops") for way in ("direct", "proxy"))
        latency = [median(figures, f"{name} {way} us") for way in ("direct", "proxy")]
        lines.append([name, bench.number(direct), bench.number(through), f"{through / direct:.0%}",
                      *(bench.number(us) for us in latency), bench.number(latency[1] - latency[0])])
    bench.print_table(["", "direct (1/s)", "proxy (1/s)", "share", "direct p50 (us)", "proxy p50 (us)", "added (us)"], lines)
    one, many = median(figures, "1 ms, depth 1"), median(figures, "1 ms, depth 32")
    print(f"\nbehind a delay of 1 ms: {bench.number(one)} reads/s at depth 1, {bench.number(many)} at depth 32, "
          f"{many / one:.1f} times as many")
    for size in READ_AHEAD_BYTES:
        rate = median(figures, f"1 ms, --cache={size}")
        print(f"the same, sequential reads at depth 1, --cache={size}: {bench.number(rate)} reads/s")
    print(f"hand-over when the server is killed: {median(figures, 'hand-over ms'):.1f} ms")
    print(f"memory of the proxy: {median(figures, 'idle KiB') / 1024:.1f} MiB idle, "
          f"{median(figures, 'peak KiB') / 1024:.1f} MiB at its peak")


if __name__ == "__main__":
    main()
