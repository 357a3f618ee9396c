#!/bin/bash
# Shows what flexnbd does, on an image of its own making. `make demo` runs it. It leaves nothing behind, and whatever
# takes longer than it should ends it with an error.
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

# So that commands can be shown, and run, as one would type them.
flexnbd() { timeout 10 "$flexnbd" "$@"; }
export -f flexnbd
export flexnbd

say() {
    printf '\n%s\n\n' "$*"
}

# Shows a command and runs it, its output indented.
show() {
    echo "  \$ $1"
    timeout 10 bash -euo pipefail -c "$1" 2>&1 | sed 's/^/    /'
}

fail() {
    echo "demo: $*" >&2
    exit 1
}

# Starts a server with a control socket; ready when that answers.
serve() {
    echo "  \$ flexnbd serve $* &"
    "$flexnbd" serve "$@" 2>log &
    server=$!
    for _ in $(seq 100); do
        port=$(flexnbd status --sock control 2>/dev/null | sed -n 's/.* address=[^ ]*:\([0-9]*\).*/\1/p') || true
        [ -z "$port" ] || return 0
        kill -0 "$server" 2>/dev/null || fail "the server ended: $(cat log)"
        sleep 0.1
    done
    fail "the server did not get ready: $(cat log)"
}

# Stops the server, which must end at once and cleanly.
stop() {
    echo "  \$ kill $server"
    kill "$server"
    timeout 10 tail --pid="$server" -f /dev/null || fail "the server does not end"
    wait "$server" || fail "the server ended with exit code $?: $(cat log)"
    server=
}

say "1. A disk image of 1 GiB. It is one hole: it holds no data, and takes no space yet."
show "truncate -s 1G image"
show "du -k image"

say "2. A server for it, on a free port of this machine, with a control socket."
serve --addr 127.0.0.1 --port 0 --file image --sock control
echo "    It is process $server and listens on port $port."
# What the commands below have in common.
at="--addr 127.0.0.1 --port $port"

say "3. Any NBD client could use it now. flexnbd has a small one: write 14 bytes at 512 MiB, read them back."
show "echo 'Hello, blocks' | flexnbd write $at --from 536870912 --size 14"
show "flexnbd read $at --from 536870912 --size 14"
[ "$(flexnbd read $at --from 536870912 --size 14)" = "Hello, blocks" ] || fail "other bytes came back"

say "4. A write of zeroes over a hole leaves the hole: 64 MiB written, and still next to nothing on the disk."
show "head -c 67108864 /dev/zero | flexnbd write $at --from 0 --size 67108864"
show "du -k image"

say "5. The control socket tells how it is going."
show "flexnbd status --sock control | tr ' ' '\n'"

say "6. ... and says who may connect. Now only 192.0.2.0/24, which is not us:"
show "flexnbd acl --sock control 192.0.2.0/24"
echo "  \$ flexnbd read $at --from 0 --size 14"
if flexnbd read $at --from 0 --size 14 >refused 2>&1; then
    fail "a client was let in against the access control list"
fi
sed 's/^/    /' refused

say "   The server has logged it. With this machine back on the list, the data is there again:"
sed 's/^/    /' log
show "flexnbd acl --sock control 192.0.2.0/24 127.0.0.1"
show "flexnbd read $at --from 536870912 --size 14"

say "7. Asked to stop, it stops at once, and takes its control socket with it."
stop
[ ! -e control ] || fail "the control socket is still there"

say "That was flexnbd. README.md has more; \`flexnbd help MODE\` explains each mode."
