#!/bin/bash
# Shows what flexnbd is for: a disk image moves to another server while a client goes on using it. `make demo` runs it.
# All servers are on this machine here, with images of the demo's own making. It leaves nothing behind, and whatever
# takes longer than it should ends it with an error.
set -euo pipefail

flexnbd=$(realpath "${FLEXNBD:-target/release/flexnbd}")
dir=$(mktemp -d)
# The processes to end: the servers, and the client.
source= destination= third= client=

clean_up() {
    for job in $client $source $destination $third; do
        kill "$job" 2>/dev/null || true
    done
    wait
    cd /
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
    timeout 10 bash -euo pipefail -c "$1" 2>&1 | sed 's/^/    /' || fail "this has failed, or took too long"
}

fail() {
    echo "demo: $*" >&2
    exit 1
}

# Starts a server in the mode $1 with the image and the control socket of these names, and with the options that follow;
# sets `started` to its process and `at` to how it is reached.
start() {
    local mode=$1 name=$2 port
    shift 2
    set -- "$mode" --verbose --addr 127.0.0.1 --port 0 --file "$name.img" --sock "$name.sock" "$@"
    echo "  \$ flexnbd $* &"
    "$flexnbd" "$@" 2>"$name.log" &
    started=$!
    for _ in $(seq 100); do
        port=$(flexnbd status --sock "$name.sock" 2>/dev/null | sed -n 's/.* address=[^ ]*:\([0-9]*\).*/\1/p') || true
        [ -z "$port" ] || break
        kill -0 "$started" 2>/dev/null || fail "the server ended: $(cat "$name.log")"
        sleep 0.1
    done
    [ -n "$port" ] || fail "the server did not get ready: $(cat "$name.log")"
    at="--addr 127.0.0.1 --port $port"
    echo "    It is process $started and listens on the free port $port."
}

# Waits for a server to end, which must be soon and with exit code 0.
ends() {
    timeout 10 tail --pid="$1" -f /dev/null || fail "process $1 does not end"
    wait "$1" || fail "process $1 ended with exit code $?: $(cat ./*.log)"
}

# The client. It keeps a journal at the start of the image: it appends a line of 16 bytes, reads it back, and so on. The
# lines whose writes were answered it also keeps in a file of its own. It ends when its server does.
keep_journal() {
    local lines line offset read
    lines=$(wc -l <answered)
    while true; do
        printf -v line 'write %9d' "$((lines += 1))"
        offset=$((lines * 16 - 16))
        flexnbd write $at --from "$offset" --size 16 <<<"$line" 2>/dev/null || break
        echo "$line" >>answered
        read=$(flexnbd read $at --from "$offset" --size 16 2>/dev/null) || break
        [ "$read" = "$line" ] || fail "the client wrote '$line' and read '$read'"
    done
    timeout 2 tail --pid="$1" -f /dev/null || fail "the client was cut off by a server that still runs"
}

# The same client, for as long as the file `enough.not` is there, over one connection: it is cut off by nobody.
keep_journal_connected() {
    local lines line offset
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    # The greeting of an oldstyle server.
    timeout 10 head -c 152 <&3 >greeting
    lines=$(wc -l <answered)
    while [ -e enough.not ]; do
        printf -v line 'write %9d' "$((lines += 1))"
        offset=$((lines * 16 - 16))
        request 1 "$lines" "$offset" "$line"
        echo "$line" >>answered
        request 0 "$lines" "$offset" ""
        [ "$(timeout 10 head -c 16 <&3)" = "$line" ] || fail "the client wrote '$line' and read something else"
    done
    # DISC
    bytes "25609513 0000 0002 $(printf '%016x %016x %08x' 0 0 0)" >&3
    exec 3>&-
}

# Sends a request of the type $1 with the cookie $2 for the 16 bytes at $3, with the line $4 if it writes, over the
# connection 3, and takes the head of the reply, which has to be a good one.
request() {
    local reply cookie
    printf -v cookie '%016x' "$2"
    {
        bytes "25609513 0000 000$1 $cookie $(printf '%016x %08x' "$3" 16)"
        [ -z "$4" ] || echo "$4"
    } >&3
    reply=$(timeout 10 head -c 16 <&3 | od -An -v -tx1 | tr -d ' \n')
    [ "$reply" = "6744669800000000$cookie" ] || fail "the client was answered '$reply'"
}

# Prints the bytes that these hexadecimal digits say.
bytes() {
    printf "$(tr -d ' ' <<<"$1" | sed 's/../\\x&/g')"
}

# Fails if the client has, or if it has no new line within some seconds.
client_goes_on() {
    local before
    before=$(wc -l <answered)
    for _ in $(seq 50); do
        [ "$(wc -l <answered)" = "$before" ] || return 0
        sleep 0.1
    done
    fail "the client does not get on"
}

say "1. A disk image of 256 MiB. There are 64 MiB of data at its end; the rest is a hole, which takes no space on the
   disk. A server for it, with a control socket:"
show "truncate -s 256M source.img"
show "head -c 64M /dev/urandom | dd of=source.img bs=1M seek=192 conv=notrunc status=none"
start serve source
source=$started

say "2. Any NBD client could use it now. flexnbd has a small one: write 14 bytes at 128 MiB, read them back."
show "echo 'Hello, blocks' | flexnbd write $at --from 134217728 --size 14"
show "flexnbd read $at --from 134217728 --size 14"
[ "$(flexnbd read $at --from 134217728 --size 14)" = "Hello, blocks" ] || fail "other bytes came back"

say "3. The control socket says how it is going, and who may connect. Let that be only 192.0.2.0/24, which is not us:"
show "flexnbd status --sock source.sock | tr ' ' '\n' | head -n 6"
show "flexnbd acl --sock source.sock 192.0.2.0/24"
echo "  \$ flexnbd read $at --from 0 --size 14"
if flexnbd read $at --from 0 --size 14 >refused 2>&1; then
    fail "a client was let in against the access control list"
fi
sed 's/^/    /' refused
show "flexnbd acl --sock source.sock 127.0.0.1"

say "4. Now a client that never stops: it writes line after line into the image, and reads each one back."
>answered
keep_journal "$source" &
client=$!
client_goes_on
echo "    Its last line so far: $(tail -n 1 answered)"

say "5. The image is to move. Another server waits for it, with an empty image of the same size (on another machine, if
   this were not a demo). It will go on as a server of the image once it has all of it:"
show "truncate -s 256M destination.img"
start listen destination --serve
destination=$started

say "6. The migration, made slow enough to be watched. The client goes on meanwhile. What it writes where the copy has
   been already is copied once more; for the last of it the client is paused, for some milliseconds:"
before=$(wc -l <answered)
echo "  \$ flexnbd mirror $at --sock source.sock --max-speed 12000000 --wait"
# Not through a pipe: at a terminal the progress is drawn.
timeout --foreground 60 "$flexnbd" mirror $at --sock source.sock --max-speed 12000000 --wait ||
    fail "the migration failed"

say "7. The source has ended by itself, with exit code 0, and with it the client. The end of the source's log:"
ends "$source"
source=
wait "$client" || fail "the client has failed"
client=
grep migration source.log | tail -n 2 | sed 's/^/    /'
lines=$(wc -l <answered)
echo "    While the image moved, $((lines - before)) writes of the client were answered; $lines in all."
[ "$lines" -gt "$before" ] || fail "the client was not served during the migration"

say "8. Nothing is lost: the images are the same, and every line that was answered is at the destination. What was a
   hole is still one:"
show "cmp source.img destination.img && echo the same"
show "flexnbd read $at --from 0 --size $((lines * 16)) | cmp - answered && echo all of them"
show "du -m source.img destination.img"

say "9. The client goes on at the destination, where it had to stop. This time it keeps one connection; and the image moves
   once more, to a third server:"
from_port=${at##* }
>enough.not
keep_journal_connected "$from_port" &
client=$!
client_goes_on
show "truncate -s 256M third.img"
start listen third --serve
third=$started

say "10. With --relay the connection stays. The second server closes and removes its file, and passes on what the client
   asks, until that leaves:"
before=$(wc -l <answered)
show "flexnbd mirror $at --sock destination.sock --relay --unlink --wait"
[ ! -e destination.img ] || fail "the file is still there"
client_goes_on
show "flexnbd status --sock destination.sock | tr ' ' '\n' | grep -E 'relaying|num_clients|upstream='"
sleep 1
rm enough.not
wait "$client" || fail "the client has failed"
client=
ends "$destination"
destination=
lines=$(wc -l <answered)
echo "    The client has noticed nothing: $((lines - before)) writes answered since, over the connection that it had. When it"
echo "    had left, the second server ended, with exit code 0."
show "flexnbd read $at --from 0 --size $((lines * 16)) | cmp - answered && echo all $lines lines"
echo "  \$ kill $third"
kill "$third"
ends "$third"
third=

say "That was flexnbd. README.md has more; \`flexnbd help MODE\` explains each mode."
