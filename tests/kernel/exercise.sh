#!/bin/sh
# Uses an NBD device of this kernel as a disk: ext4, files, trims, and a change of servers while it is written to.
# It runs in the guest and on a machine with /dev/nbd0 alike, so it keeps to what busybox and coreutils both have.
#
# usage: exercise.sh DEVICE HOST PORT SECOND_PORT
#
# What it has done it says in lines that begin with `step: `. At `step: writing` the server on PORT is to be migrated to
# the one on SECOND_PORT. The last line has the checksum of the device.
set -eu

device=$1 host=$2 port=$3 second_port=$4
here=$(dirname "$0")
name=${device#/dev/}
work=$(mktemp -d)
mnt=$work/mnt
# Two, so that the kernel spreads its requests over connections, as CAN_MULTI_CONN lets it.
connections=2
# What was in flight when the connections ended is sent again after so many seconds. A slow machine takes seconds over a
# flush, and a request that is only slow would end its connection.
timeout=20
agent='' writer=''

step() {
    echo "step: $*"
}

fail() {
    step "error: $*"
    exit 1
}

clean_up() {
    for job in $agent $writer; do
        kill "$job" 2>/dev/null || true
    done
    # First the device: without a server, unmounting would wait for one.
    nbd-client -d "$device" >/dev/null 2>&1 || true
    umount "$mnt" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# Writes NAME of KIB random KiB, and keeps the checksum of what it meant to write outside of the device.
put() {
    head -c "$2k" /dev/urandom >"$work/source"
    sum=$(sha256sum <"$work/source")
    cp "$work/source" "$mnt/$1"
    echo "${sum%% *}  $1" >"$work/sums/$1"
}

forget() {
    rm -f "$mnt/$1" "$work/sums/$1"
}

# Compares every file with what was meant to be written, read from the device and not from the cache.
verify() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    cat "$work/sums/"* >"$work/list"
    (cd "$mnt" && sha256sum -c "$work/list" >"$work/verdict" 2>&1) || fail "$1: $(grep -v ': OK$' "$work/verdict")"
    step "$1: $(grep -c ': OK$' "$work/verdict") files have the right checksum"
}

kernel_complaints() {
    dmesg | grep -cE "(I/O error|EXT4-fs error|EXT4-fs warning|JBD2).*$name" || true
}

# Writes, syncs, reads back, deletes and trims, until told that it is enough.
write_on() {
    n=0
    while [ ! -e "$work/enough" ]; do
        n=$((n + 1))
        file=w$((n % 24))
        put "$file" $((16 + n * 37 % 500))
        if [ $((n % 2)) = 0 ]; then
            sync "$mnt/$file"
            read_back=$(dd if="$mnt/$file" bs=64k iflag=direct 2>/dev/null | sha256sum)
            [ "$read_back" = "$sum" ] || fail "$file reads back as something else"
        fi
        if [ $((n % 12)) = 0 ]; then
            forget "w$((n / 2 % 24))"
            fstrim "$mnt"
        fi
        echo "$n" >"$work/count.new"
        mv "$work/count.new" "$work/count"
        # A guest that writes without a break would make the migration a matter of who is faster.
        sleep 0.05
    done
}

# Waits until there is the FILE, at most SECONDS, as long as the writer has no error.
await() {
    waited=0
    until [ -s "$1" ]; do
        kill -0 "$writer" 2>/dev/null || fail "the writer ended"
        waited=$((waited + 1))
        [ "$waited" -lt $(($2 * 10)) ] || fail "no $(basename "$1") after $2 seconds: $(cat "$work/agent.log")"
        sleep 0.1
    done
}

mkdir "$mnt" "$work/sums"
complaints=$(kernel_complaints)

nbd-client "$host" "$port" "$device" -N "" -connections "$connections" -timeout "$timeout" >"$work/log" 2>&1 ||
    fail "nbd-client: $(cat "$work/log")"
step "nbd-client attached $device, $(cat "/sys/block/$name/size") sectors, over $connections connections"

mkfs.ext4 -q "$device" >"$work/log" 2>&1 || fail "mkfs.ext4: $(cat "$work/log")"
mount -t ext4 "$device" "$mnt"
step "ext4 made and mounted"

put stays 16384
put goes 32768
for n in 1 2 3 4 5 6 7 8; do
    put "small$n" $((n * 7))
done
verify "before the trim"
forget goes
sync
fstrim "$mnt" || fail "fstrim"
step "trimmed 32 MiB that were deleted"

perl "$here/reattach.pl" "${name#nbd}" "$connections" "$host" "$second_port" "$work" >"$work/agent.log" 2>&1 &
agent=$!
write_on &
writer=$!
await "$work/watching" 10
await "$work/count" 30
before=$(cat "$work/count")
step "writing"

await "$work/disconnected" 90
during=$(($(cat "$work/count") - before))
step "the first server closed the connections; $during files were written during the migration"
[ "$during" -gt 0 ] || fail "the migration did not meet a writer"
await "$work/reattached" 60
wait "$agent" || fail "reattach: $(cat "$work/agent.log")"
agent=
step "reattached to the second server"

# Not before what waited for the new connections has been written does the count say anything about them.
now=$(cat "$work/count")
waited=0
until [ "$(cat "$work/count")" -ge $((now + 32)) ]; do
    kill -0 "$writer" 2>/dev/null || fail "the writer ended"
    waited=$((waited + 1))
    [ "$waited" -lt 90 ] || fail "the writer does not get on"
    sleep 1
done
echo yes >"$work/enough"
wait "$writer" || fail "the writer failed"
writer=
step "32 more files written, all without an error"

verify "after the migration"
cp "$work/list" "$mnt/SHA256SUMS"
umount "$mnt"
e2fsck -fn "$device" >"$work/log" 2>&1 || fail "e2fsck: $(cat "$work/log")"
step "unmounted, and e2fsck finds nothing wrong"

mount -t ext4 "$device" "$mnt"
verify "mounted again"
umount "$mnt"
[ "$(kernel_complaints)" = "$complaints" ] || fail "the kernel complained: $(dmesg | grep "$name" | tail -n 5)"

sum=$(sha256sum <"$device")
nbd-client -d "$device" >"$work/log" 2>&1 || fail "nbd-client -d: $(cat "$work/log")"
step "detached; sha256 of the device: ${sum%% *}"
