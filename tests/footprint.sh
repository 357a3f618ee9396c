#!/bin/bash
# Measures what flexnbd costs: the size of the binary, resident memory, system calls. `make footprint` runs it.
# The last column is the aim.
set -euo pipefail

flexnbd=$(realpath "${FLEXNBD:-target/release/flexnbd}")
dir=$(mktemp -d)
server=

clean_up() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
    fi
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
cd "$dir"

row() {
    printf '%-46s %18s   %s\n' "$@"
}

fail() {
    echo "footprint: $*" >&2
    exit 1
}

flexnbd() {
    timeout 60 "$flexnbd" "$@"
}

# Starts a server, by way of the program in $1 if that is not empty, and sets `port` and `server`.
serve() {
    $1 "$flexnbd" serve --addr 127.0.0.1 --port 0 --file image --sock control --max-clients 1100 2>log &
    server=$!
    local status
    for _ in $(seq 100); do
        status=$(flexnbd status --sock control 2>/dev/null) || { sleep 0.1; continue; }
        port=$(sed -n 's/.* address=[^ ]*:\([0-9]*\).*/\1/p' <<<"$status")
        return
    done
    fail "the server did not get ready: $(cat log)"
}

stop() {
    kill "$server"
    wait "$server" || fail "the server ended with exit code $?: $(cat log)"
    server=
}

# A figure of the server's memory in KiB: VmRSS is what it has now, VmHWM the most it has had.
memory() {
    sed -n "s/^$1:[^0-9]*\([0-9]*\).*/\1/p" "/proc/$server/status"
}

reset_peak() {
    echo 5 >"/proc/$server/clear_refs"
}

truncate -s 2G image
row "what" "measured" "aim"
strip -o stripped "$flexnbd" 2>/dev/null || cp "$flexnbd" stripped
row "stripped binary" "$(($(stat -c %s stripped) / 1024)) KiB" "1536 KiB"

serve ""
row "resident memory, idle" "$(memory VmRSS) KiB" "3072 KiB"

before=$(memory VmRSS)
timeout 60 python3 - "$port" "$server" <<'END' >with_clients
import re, resource, socket, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30) for _ in range(1000)]
for client in clients:
    assert len(client.makefile("rb").read(152)) == 152, "no greeting"
print(re.search(r"VmRSS:\s*(\d+)", open(f"/proc/{sys.argv[2]}/status").read())[1])
END
row "  more with 1000 idle clients" "$(($(cat with_clients) - before)) KiB" "2048 KiB"
stop

for mode in read write; do
    serve ""
    reset_peak
    before=$(memory VmHWM)
    if [ "$mode" = read ]; then
        flexnbd read --addr 127.0.0.1 --port "$port" --from 4096 --size 1073741824 >/dev/null
    else
        head -c 1073741824 /dev/zero | tr '\0' x | flexnbd write --addr 127.0.0.1 --port "$port" --from 4096 --size 1073741824
    fi
    row "  more at the peak of a $mode of 2^30 bytes" "$(($(memory VmHWM) - before)) KiB" "8192 KiB"
    stop
done

# Has $1 reads of 4 KiB sent at once, and leaves the system calls the server made for them in the file `calls`. A read
# goes before that is not counted, so that the calls of a new connection stay out.
calls() {
    serve "strace -D -o trace -s 0"
    timeout 60 python3 - "$port" "$1" <<'END'
import socket, struct, sys, time
port, count = map(int, sys.argv[1:])
def read(depth):
    client.sendall(b"".join(struct.pack(">LHHQQL", 0x25609513, 0, 0, i, i * 4096, 4096) for i in range(depth)))
    assert len(replies.read(depth * (16 + 4096))) == depth * (16 + 4096)
    # The server goes back to waiting.
    time.sleep(0.5)
client = socket.create_connection(("127.0.0.1", port), timeout=30)
replies = client.makefile("rb")
assert len(replies.read(152)) == 152
read(1)
start = len(open("trace").readlines())
read(count)
end = len(open("trace").readlines())
with open("span", "w") as span:
    span.write(f"{start + 1},{end}p")
END
    stop
    sed -n -f span trace >calls
}

show_calls() {
    sed -E 's/\(.*//' calls | sort | uniq -c | sort -rn
}

calls 1
row "system calls of a lone 4 KiB read" "$(wc -l <calls)" "5"
show_calls
calls 32
disk=$(grep -cE '^p(read|write)' calls || true)
row "system calls of 32 pipelined 4 KiB reads" "$disk + $(($(wc -l <calls) - disk))" "32 of the disk + 6 others"
show_calls
