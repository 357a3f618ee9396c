"""Images on a replicated volume, served by flexnbd. `make test-cluster` runs it, inside tests/cluster/volume.sh.

It kills and silences copies of the volume under clients, moves an image there and back, and takes the quorum away. Its own client
knows what an image has to hold: a write that was answered is there, one that was answered with an error or not at all
may be. It says what it has done, and exits with 0 if all was as it should be.

Environment: FLEXNBD (target/release/flexnbd), FLEXNBD_OPTIONS (more options of `serve` and `listen`), STEP (only steps
whose name holds this), and what volume.sh sets.
"""

import contextlib
import os
import random
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree

MIB, BLOCK = 1 << 20, 4096
FLEXNBD = os.path.realpath(os.environ.get("FLEXNBD", "target/release/flexnbd"))
OPTIONS = shlex.split(os.environ.get("FLEXNBD_OPTIONS", ""))
CLUSTER, VOLUME, LOCAL = (os.environ[f"CLUSTER_{name}"] for name in ("MOUNT", "VOLUME", "LOCAL"))
# Seconds for what takes a moment where nothing is wrong.
SOON = 60
EIO = 5
READ, WRITE, DISC, FLUSH, WRITE_ZEROES = 0, 1, 2, 3, 6
FUA, NO_HOLE = 1, 2


class Failed(Exception):
    """Something was not as it should be."""


def expect(condition, what):
    if not condition:
        raise Failed(what)


def say(what):
    print(f"{time.monotonic() - BEGAN:5.0f} s  {what}", flush=True)


def wait_for(what, condition, seconds=SOON):
    """Asks until something is so, and returns it."""
    give_up = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        expect(time.monotonic() < give_up, f"not within {seconds} seconds: {what}")
        time.sleep(0.05)


@contextlib.contextmanager
def deadline(seconds):
    """Ends what takes longer, wherever it waits."""
    def late(*_):
        raise Failed(f"not done after {seconds} seconds")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# ------------------------------------------------------------------------------------------------------------- copies

def gluster(*words):
    done = subprocess.run(["gluster", "--mode=script", *words, "--xml"], capture_output=True, text=True, timeout=SOON)
    answer = xml.etree.ElementTree.fromstring(done.stdout)
    expect(answer.findtext("opRet") == "0", f"gluster {' '.join(words)}: {answer.findtext('opErrstr')}")
    return answer


def pid_of_copy(number):
    for node in gluster("volume", "status", VOLUME).iter("node"):
        if node.findtext("path").endswith(f"/brick{number}/data"):
            return int(node.findtext("pid"))
    raise Failed(f"the volume has no copy {number}")


def kill_copies(*numbers):
    """As if their machines were gone."""
    pids = [pid_of_copy(number) for number in numbers]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def await_copies(count):
    """Waits until the mounted volume works with so many."""
    def is_connected(number):
        # Without a quorum nothing can be opened.
        with contextlib.suppress(OSError), open(
                f"{CLUSTER}/.meta/graphs/active/{VOLUME}-client-{number}/private") as file:
            return "connected = 1\n" in file
        return False
    wait_for(f"{count} copies are connected", lambda: sum(map(is_connected, range(3))) == count)


def revive_copies():
    """Brings back those that were killed, and waits until all have everything."""
    gluster("volume", "start", VOLUME, "force")
    await_copies(3)

    def are_healed():
        copies = list(gluster("volume", "heal", VOLUME, "info").iter("brick"))
        return len(copies) == 3 and all(copy.findtext("numberOfEntries") == "0" for copy in copies)
    wait_for("all copies are the same", are_healed, 180)


def forget_caches(copies):
    """What is read next comes from the copies, of which there are so many. Mounted again, because GlusterFS has caches of
    its own."""
    subprocess.run(["umount", CLUSTER], check=True, timeout=SOON)
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3\n")
    wait_for("the volume is mounted", lambda: subprocess.run(
        ["mount", "-t", "glusterfs", f"10.9.0.1:/{VOLUME}", CLUSTER], timeout=SOON).returncode == 0)
    await_copies(copies)


# ------------------------------------------------------------------------------------------------------------ flexnbd

class Server:
    """flexnbd in the mode `serve` or `listen`, for as long as the block takes."""
    engine = "auto"
    started = 0

    def __init__(self, mode, image, *options):
        Server.started += 1
        self.image = image
        self.sock = os.path.join(LOCAL, f"{Server.started}.sock")
        self.log = os.path.join(LOCAL, f"{Server.started}.log")
        self.words = [FLEXNBD, mode, "--verbose", "--addr", "127.0.0.1", "--port", "0", "--newstyle-port", "0",
                      "--file", image, "--sock", self.sock, "--disk-engine", Server.engine, *OPTIONS, *options]

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_for("the server is ready", lambda: os.path.exists(self.sock) or self.process.poll() is not None)
            status = self.status()
            self.port, self.newstyle_port = (
                int(status[key].rpartition(":")[2]) for key in ("address", "newstyle_address"))
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, *_):
        self.process.kill()
        self.process.wait()
        if kind:
            with open(self.log) as log:
                print(f"the log of {' '.join(self.words)}:\n{log.read()[-4000:]}", file=sys.stderr)

    def tell(self, mode, *words):
        """Its answer to a control command."""
        done = subprocess.run([FLEXNBD, mode, "--sock", self.sock, *words],
                              capture_output=True, text=True, timeout=SOON)
        expect(done.returncode == 0, f"flexnbd {mode}: {done.stdout}{done.stderr}")
        return done.stdout

    def status(self):
        return dict(pair.split("=", 1) for pair in self.tell("status").split())

    def await_end(self, seconds=SOON):
        """Its exit code."""
        return self.process.wait(timeout=seconds)

    def stop(self):
        self.process.terminate()
        expect(self.await_end() == 0, f"exit code {self.process.returncode} after SIGTERM")


# ------------------------------------------------------------------------------------------------------------- client

class Client:
    """A connection to the oldstyle port."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SOON)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting = self.receive(152)
        expect(greeting.startswith(b"NBDMAGIC"), "no greeting")
        self.size = struct.unpack_from(">Q", greeting, 16)[0]

    def receive(self, length):
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise EOFError("the server closed the connection")
            data += more
        return data

    def send(self, kind, cookie, offset=0, length=0, payload=b"", flags=0):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + payload)

    def reply(self):
        """The cookie of a request that is done, and the error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        expect(magic == 0x67446698, f"no reply: {magic:#x}")
        return cookie, error

    def ask(self, *request, **more):
        self.send(*request, **more)
        return self.reply()[1]

    def flush(self):
        return self.ask(FLUSH, 0)

    def write(self, offset, data, flags=0):
        return self.ask(WRITE, 0, offset, len(data), data, flags)

    def read(self, offset, length):
        error = self.ask(READ, 0, offset, length)
        expect(error == 0, f"READ at {offset}: error {error}")
        return self.receive(length)

    def close(self):
        with contextlib.suppress(OSError):
            self.send(DISC, 0)
        self.socket.close()


def content(block, version):
    """What a block holds in a version. A quarter of a new image is holes, and three of eight later versions are zero."""
    if (version == 0 and block % 64 >= 48) or (version and version % 8 < 3):
        return bytes(BLOCK)
    return struct.pack(">QQ", block, version) * (BLOCK // 16)


def make_image(path, blocks):
    with open(path, "wb") as file:
        file.truncate(blocks * BLOCK)
        for block in range(blocks):
            data = content(block, 0)
            if any(data):
                file.seek(block * BLOCK)
                file.write(data)
        os.fsync(file.fileno())


class Writer(threading.Thread):
    """A client that writes and writes, and knows what has to be in the image. When its server is gone it goes to the next
    one, as the disk of a machine does that has moved."""
    DEPTH = 16

    def __init__(self, blocks, *ports, fua, per_second):
        super().__init__(daemon=True)
        self.ports, self.fua, self.per_second = ports, fua, per_second
        # What each block may hold, by version; several as long as a write is not known to be done or not.
        self.holds = [{0} for _ in range(blocks)]
        self.version = self.answered = self.failed = 0
        self.on = None
        self.broken = None
        self.enough = threading.Event()
        self.random = random.Random(1)
        self.start()

    def run(self):
        try:
            for port in self.ports:
                with contextlib.suppress(ConnectionError, EOFError):
                    client = Client(port)
                    self.on = port
                    self.write_on(client)
                    client.close()
                    return
            expect(self.enough.is_set(), "the last server has closed the connection")
        except Exception as error:
            self.broken = error

    def write_on(self, client):
        flying, began, sent = {}, time.monotonic(), 0
        while flying or not self.enough.is_set():
            while len(flying) < self.DEPTH and not self.enough.is_set():
                wait = began + sent / self.per_second - time.monotonic()
                if wait > 0 and flying:
                    break
                time.sleep(max(wait, 0))
                block = self.random.randrange(len(self.holds))
                if block in flying:
                    continue
                self.version += 1
                sent += 1
                flying[block] = self.version
                self.holds[block].add(self.version)
                durable = FUA if self.random.random() < self.fua else 0
                if self.version % 8 < 2:
                    client.send(WRITE_ZEROES, block, block * BLOCK, BLOCK, b"", durable | self.version % 8 * NO_HOLE)
                else:
                    client.send(WRITE, block, block * BLOCK, BLOCK, content(block, self.version), durable)
            block, error = client.reply()
            version = flying.pop(block)
            if error:
                self.failed += 1
            else:
                self.answered += 1
                self.holds[block] = {version}

    def expect_progress(self, more=200):
        """Waits until so many more writes were answered well."""
        goal = self.answered + more

        def is_there():
            expect(self.broken is None, f"the writer ended: {self.broken!r}")
            return self.answered >= goal
        wait_for("the writer gets on", is_there)

    def finish(self):
        self.enough.set()
        self.join(SOON)
        expect(not self.is_alive(), "the writer does not end")
        if self.broken:
            raise self.broken

    def check(self, read):
        """Compares all of an image with what it has to hold."""
        at_once = 64
        for first in range(0, len(self.holds), at_once):
            data = read(first * BLOCK, min(at_once, len(self.holds) - first) * BLOCK)
            for block in range(first, first + len(data) // BLOCK):
                found = data[(block - first) * BLOCK:][:BLOCK]
                if not any(found == content(block, version) for version in self.holds[block]):
                    raise Failed(f"block {block} has to hold version {self.holds[block]}, and begins with "
                                 f"{struct.unpack_from('>QQ', found)}")


# -------------------------------------------------------------------------------------------------------------- steps

def fio_while_a_copy_is_killed():
    image, mib = os.path.join(CLUSTER, "fio.img"), 64
    with open(image, "wb") as file:
        file.truncate(mib * MIB)

    def fio(server, *more):
        words = ["fio", "--name=verify", "--ioengine=nbd", f"--uri=nbd://127.0.0.1:{server.newstyle_port}/",
                 "--rw=randwrite", "--bs=4k", f"--size={mib}m", "--iodepth=16", "--randseed=7", "--verify=crc32c",
                 "--verify_fatal=1", "--verify_state_save=0", *more]
        with open(os.path.join(LOCAL, "fio.log"), "w") as log:
            return subprocess.Popen(words, cwd=LOCAL, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def expect_good(job):
        code = job.wait(timeout=300)
        with open(os.path.join(LOCAL, "fio.log")) as log:
            said = log.read()
        expect(code == 0 and "err= 0" in said, f"fio: exit code {code}: {said}")

    def verify_anew():
        """By a new server, and with nothing in any cache."""
        forget_caches(2)
        with Server("serve", image) as server:
            expect_good(fio(server, "--verify_only"))
            server.stop()

    blocks = mib * MIB // BLOCK
    with Server("serve", image) as server:
        # So slow that it does not end before it was seen to write without the copy.
        job = fio(server, "--rate_iops=2000")
        try:
            def writes():
                expect(job.poll() is None, "fio ended")
                return int(server.status()["writes"])
            wait_for("fio writes", lambda: writes() > 1000)
            kill_copies(1)
            before = writes()
            wait_for("fio writes on", lambda: writes() > before + 2000)
            expect(writes() < blocks, "it was written before the copy was killed")
            expect_good(job)
        finally:
            job.kill()
            job.wait()
        expect(server.status()["errors"] == "0", "there were errors")
        say(f"fio wrote {blocks} blocks, the copy was killed after {before}; it has read and verified all of them")
        server.stop()
    verify_anew()
    say("verified again by a new server, read from the two copies that are left")
    revive_copies()
    kill_copies(2)
    verify_anew()
    say("the killed copy was brought back and healed, another one killed: verified once more")
    revive_copies()
    os.unlink(image)


def a_copy_falls_silent():
    blocks = 16 * MIB // BLOCK
    image = os.path.join(CLUSTER, "silent.img")
    make_image(image, blocks)
    with Server("serve", image) as server:
        writer = Writer(blocks, server.port, fua=0.1, per_second=500)
        writer.expect_progress()
        pid = pid_of_copy(1)
        os.kill(pid, signal.SIGSTOP)
        try:
            # Until then writes wait for it.
            await_copies(2)
            writer.expect_progress()
        finally:
            os.kill(pid, signal.SIGCONT)
        revive_copies()
        writer.expect_progress()
        writer.finish()
        expect(writer.failed == 0, f"{writer.failed} writes failed")
        server.stop()
    forget_caches(3)
    with Server("serve", image) as server:
        client = Client(server.port)
        writer.check(client.read)
        client.close()
        server.stop()
    say(f"it was given up, came back and was healed; all of {writer.answered} answered writes are there")
    os.unlink(image)


def migration_there_and_back():
    blocks = 32 * MIB // BLOCK
    here, there, back = (os.path.join(*place) for place in
                         ((LOCAL, "here.img"), (CLUSTER, "there.img"), (LOCAL, "back.img")))
    make_image(here, blocks)
    for path in there, back:
        with open(path, "wb") as file:
            file.truncate(blocks * BLOCK)

    def migrate(source, destination, then):
        """Moves the image, under the writer; `then` is done when a third has moved."""
        source.tell("mirror", "--addr", "127.0.0.1", "--port", str(destination.port), "--max-speed", str(6 * MIB))

        def left():
            expect(source.process.poll() is None, "the migration has ended")
            return int(source.status()["migration_bytes_left"])
        wait_for("a third has moved", lambda: left() < blocks * BLOCK * 2 // 3)
        then()
        writer.expect_progress()
        expect(left() > 0 and writer.on == source.port, "the migration was over before the writer got on")
        expect(source.await_end(300) == 0, f"the source ended with exit code {source.process.returncode}")
        wait_for("the writer is there", lambda: writer.on == destination.port)
        writer.expect_progress()

    with Server("serve", here) as source, Server("listen", there, "--serve") as middle, \
            Server("listen", back, "--serve") as last:
        writer = Writer(blocks, source.port, middle.port, last.port, fua=0.1, per_second=200)
        writer.expect_progress()
        migrate(source, middle, lambda: kill_copies(3))
        expect(writer.failed == 0, f"{writer.failed} writes failed")
        say(f"migrated to the volume, one copy killed on the way; {writer.answered} writes were answered")
        migrate(middle, last, lambda: gluster("volume", "start", VOLUME, "force"))
        writer.finish()
        expect(writer.failed == 0, f"{writer.failed} writes failed")
        last.stop()
    with open(back, "rb") as file:
        writer.check(lambda offset, length: os.pread(file.fileno(), length, offset))
    say(f"migrated back, while the copy was healed; all of {writer.answered} answered writes are there")
    revive_copies()
    for path in here, there, back:
        os.unlink(path)


def quorum_is_lost():
    blocks = 16 * MIB // BLOCK
    image = os.path.join(CLUSTER, "quorum.img")
    # The last block is another client's.
    make_image(image, blocks + 1)
    last = blocks * BLOCK, content(blocks, 0)
    with Server("serve", image) as server:
        # All its writes are durable when they are answered well.
        writer = Writer(blocks, server.port, fua=1, per_second=2000)
        writer.expect_progress(1000)
        client = Client(server.port)
        # Answered, and not durable yet.
        expect(client.write(*last) == 0, "a write failed")
        kill_copies(1, 2)
        errors = [client.flush(), client.flush(), client.write(*last, FUA)]
        expect(errors == [EIO] * 3, f"FLUSH, FLUSH and FUA were answered with {errors}")
        wait_for("writes fail", lambda: writer.failed > 0)
        # After that no FUA succeeds any more, so the count of those that did stands.
        answered = writer.answered
        say(f"two of three copies killed after {answered} durable writes: FLUSH and FUA are answered with EIO")
        revive_copies()
        expect([client.flush(), client.write(*last, FUA)] == [EIO] * 2, "the error did not stick")
        expect(client.read(BLOCK, BLOCK) is not None and server.status()["num_clients"] == "2", "a client is gone")
        writer.finish()
        expect(writer.answered == answered, "a FUA write succeeded after a lost fdatasync")
        say("the copies are back, and the error sticks; clients stay connected and read")
        server.stop()
    forget_caches(3)
    with Server("serve", image) as server:
        client = Client(server.port)
        writer.check(client.read)
        expect([client.write(*last, FUA), client.flush()] == [0, 0], "a new server has the old error")
        client.close()
        server.stop()
    say(f"a new server: no error, and all of {answered} durable writes are there")
    os.unlink(image)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Seconds: far more than they take.
    limits = {fio_while_a_copy_is_killed: 600, a_copy_falls_silent: 400, migration_there_and_back: 600,
              quorum_is_lost: 400}
    steps = [(engine, step) for engine in ("auto", "sync") for step in limits
             if os.environ.get("STEP", "") in step.__name__]
    for number, (Server.engine, step) in enumerate(steps):
        say(f"{step.__name__.replace('_', ' ')}, --disk-engine {Server.engine}")
        try:
            with deadline(limits[step]):
                step()
        except (Failed, OSError, EOFError, subprocess.SubprocessError) as error:
            sys.exit(f"FAILED: {error}\n{number} passed, 1 failed")
    print(f"{len(steps)} passed, 0 failed")


BEGAN = time.monotonic()

if __name__ == "__main__":
    main()
