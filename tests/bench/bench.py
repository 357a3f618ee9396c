"""Compares flexnbd with the other NBD servers that are installed. `make bench` runs it.

Every server serves its own copy of the same image on the loopback, pinned to one core; the client is pinned to another.
The servers take turns within each row of each round, so that what else the machine does meets all of them alike. The
clients are the same for all, but flexnbd is spoken to in oldstyle and the others in newstyle:

- fio (ioengine=nbd) for random and sequential transfers. Its engine has no FUA;
- so writes with FUA are made by `qemu-img bench -t writethrough`, one process for each connection, which asks for FUA on
  each write and goes through the image in strides of a prime number of blocks;
- nbdcopy for whole images.

Environment: FLEXNBD (the binary), QUICK=1 (one short round), ROUNDS (5), SECONDS_PER_RUN (2), BENCH_DIR (/dev/shm).
"""

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
IMAGE_SIZE = 256 * MIB
SERVER_CORE, CLIENT_CORE = "0", "1"
QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 5))
SECONDS = float(os.environ.get("SECONDS_PER_RUN", 0.5 if QUICK else 2))
# Far above what anything here takes: only a hang meets it.
DEADLINE = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client(*words):
    """Runs a client on its core and returns what it printed."""
    command = ["taskset", "-c", CLIENT_CORE, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Server:
    """A running server. `command` gives its words from the port, the image and a directory for its own files."""

    def __init__(self, name, version, command, folder, master, export=""):
        self.name, self.version = name, version
        self.pid_file = os.path.join(folder, f"{name}.pid")
        port = free_port()
        self.uri = f"nbd://127.0.0.1:{port}/{export}"
        image = os.path.join(folder, f"{name}.img")
        shutil.copyfile(master, image)
        with open(os.path.join(folder, f"{name}.log"), "w") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", SERVER_CORE, *command(port, image, folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        try:
            self.wait_until_ready(port, log.name)
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, port, log):
        give_up = time.monotonic() + 20
        # A server that goes into the background exits with 0 and leaves a file with the number of the other process.
        while time.monotonic() < give_up and not self.process.poll():
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        with open(log) as lines:
            raise RuntimeError(f"{self.name} did not get ready: {lines.read()}")

    def stop(self):
        if os.path.exists(self.pid_file):
            with open(self.pid_file) as file:
                os.kill(int(file.read()), signal.SIGTERM)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def flexnbd(port, image, _folder):
    return [os.environ.get("FLEXNBD", "target/release/flexnbd"),
            "serve", "--addr", "127.0.0.1", "--port", str(port), "--file", image]


def nbdkit(port, image, _folder):
    return ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", image]


def qemu_nbd(port, image, _folder):
    return ["qemu-nbd", "-f", "raw", "--cache=writeback", "-t", "-e", "100",
            "-b", "127.0.0.1", "-p", str(port), "-x", "", image]


def nbd_server(port, image, folder):
    config = os.path.join(folder, "nbd-server.conf")
    with open(config, "w") as file:
        file.write(f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n"
                   f"[image]\nexportname = {image}\nflush = true\nfua = true\n")
    return ["nbd-server", "-C", config, "-p", os.path.join(folder, "nbd-server.pid")]


def start_servers(folder, master):
    """flexnbd first, then those of the others that are installed."""
    servers = []
    try:
        servers.append(Server("flexnbd", version_of(flexnbd(0, "", "")[0]), flexnbd, folder, master))
        for program, command, export in (
            ("nbdkit", nbdkit, ""), ("qemu-nbd", qemu_nbd, ""), ("nbd-server", nbd_server, "image"),
        ):
            if shutil.which(program):
                servers.append(Server(program, version_of(program), command, folder, master, export))
            else:
                print(f"{program} is not installed and left out")
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers


def version_of(program):
    said = subprocess.run([program, "-V"], capture_output=True, text=True, timeout=DEADLINE)
    return re.search(r"\d+\.\d+[\w.]*", said.stdout + said.stderr)[0]


def fio(uri, *jobs):
    """Runs jobs at the same time and returns fio's report on each; options before the first name are everybody's."""
    words = ["fio", "--output-format=json", "--ioengine=nbd", f"--uri={uri}", "--thread", "--group_reporting",
             f"--size={IMAGE_SIZE}", "--time_based", f"--runtime={round(SECONDS * 1000)}ms", "--randrepeat=0", "--norandommap"]
    for name, job in enumerate(jobs):
        words += [f"--name=job{name}", *job.split()]
    said = client(*words)
    return json.loads(said[said.index("{"):])["jobs"]


def fio_iops(rw, depth, connections):
    def run(uri, _folder):
        kind = "read" if rw == "randread" else "write"
        report = fio(uri, f"--rw={rw} --bs=4k --iodepth={depth} --numjobs={connections}")
        return report[0][kind]["iops"] / 1000
    return run


def fio_sequential(rw):
    def run(uri, _folder):
        return fio(uri, f"--rw={rw} --bs=1m --iodepth=8")[0][rw]["bw_bytes"] / MIB
    return run


def fio_reader_beside_writer(uri, _folder):
    jobs = fio(uri, "--rw=randread --bs=4k --iodepth=1", "--new_group --rw=randwrite --bs=4k --iodepth=16 --fsync=1")
    return jobs[0]["read"]["iops"] / 1000


def qemu_fua_iops(depth, connections):
    def attempt(uri, count):
        word = ["taskset", "-c", CLIENT_CORE, "timeout", str(DEADLINE), "qemu-img", "bench", "-f", "raw", "-w",
                "-t", "writethrough", "--pattern=85", "-s", "4096", "-S", str(4096 * 7919), "-d", str(depth),
                "-c", str(count), uri]
        clients = [subprocess.Popen(word, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
                   for _ in range(connections)]
        said = [process.communicate()[0] for process in clients]
        if any(process.returncode for process in clients):
            raise RuntimeError(f"{' '.join(word)}: failed")
        return max(float(re.search(r"completed in ([\d.]+) sec", text)[1]) for text in said)

    def run(uri, _folder):
        # How many writes take as long as the other runs is found by a short run.
        count = 500
        elapsed = max(attempt(uri, count), 0.001)
        count = max(int(count * SECONDS / elapsed), depth)
        return connections * count / attempt(uri, count) / 1000
    return run


def nbdcopy(from_server):
    def run(uri, folder):
        ends = [uri, "null:"] if from_server else [os.path.join(folder, "master.img"), uri]
        started = time.monotonic()
        client("nbdcopy", *ends)
        return IMAGE_SIZE / MIB / (time.monotonic() - started)
    return run


def rows():
    """Name, unit, and the measurement of each."""
    table = []
    shapes = [(1, 1), (32, 1), (1, 16), (32, 16)]
    for title, rw in (("reads", "randread"), ("writes", "randwrite")):
        for depth, connections in shapes:
            name = f"4 KiB random {title}, depth {depth}, {connections} conn."
            table.append((name, "k/s", fio_iops(rw, depth, connections)))
    for depth, connections in shapes:
        table.append((f"4 KiB FUA writes, depth {depth}, {connections} conn.", "k/s", qemu_fua_iops(depth, connections)))
    table.append(("1 MiB sequential reads, depth 8", "MiB/s", fio_sequential("read")))
    table.append(("1 MiB sequential writes, depth 8", "MiB/s", fio_sequential("write")))
    table.append(("nbdcopy from the server to null:", "MiB/s", nbdcopy(True)))
    table.append(("nbdcopy from memory to the server", "MiB/s", nbdcopy(False)))
    table.append(("4 KiB depth-1 reads beside flushed writes", "k/s", fio_reader_beside_writer))
    return table


def print_table(servers, results):
    names = [server.name for server in servers]
    print("\n| " + " | ".join(["", *names, "to the best of the others"]) + " |")
    print("|---|" + "---:|" * (len(names) + 1))
    for (name, unit), measured in results.items():
        medians = [statistics.median(measured[server]) for server in names]
        cells = [f"{median:.0f}" if median >= 1000 else f"{median:.3g}" for median in medians]
        ratio = f"{medians[0] / max(medians[1:]):.2f}" if len(medians) > 1 else "-"
        print("| " + " | ".join([f"{name} ({unit})", *cells, ratio]) + " |")


def bench(folder):
    # Random bytes: no server may take a short cut over zeroes.
    master = os.path.join(folder, "master.img")
    with open(master, "wb") as file:
        for _ in range(IMAGE_SIZE // MIB):
            file.write(os.urandom(MIB))
    servers = start_servers(folder, master)
    try:
        print(", ".join(f"{server.name} {server.version}" for server in servers))
        print(f"rounds: {ROUNDS}, seconds a run: {SECONDS}, image: {IMAGE_SIZE // MIB} MiB in {os.path.dirname(folder)}, "
              f"Linux {os.uname().release}, load before: {os.getloadavg()[0]:.2f}", flush=True)
        results = {(name, unit): {server.name: [] for server in servers} for name, unit, _ in rows()}
        for number in range(ROUNDS):
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            for name, unit, measure in rows():
                for server in servers:
                    results[name, unit][server.name].append(measure(server.uri, folder))
        print_table(servers, results)
    finally:
        for server in servers:
            server.stop()


def main():
    if os.cpu_count() < 2:
        sys.exit("bench: two cores are needed, one for the server and one for the client")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR", "/dev/shm"), prefix="flexnbd-bench-") as folder:
        bench(folder)


if __name__ == "__main__":
    main()
