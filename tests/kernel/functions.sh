# What the exercises have in common: they use an NBD device of this kernel as a disk and say what they have done in
# lines that begin with `step: `. They run in the guest and on a machine with /dev/nbd0 alike, so they keep to what
# busybox and coreutils both have. The arguments begin with DEVICE HOST PORT.
set -eu

device=$1 host=$2 port=$3
here=$(dirname "$0")
name=${device#/dev/}
work=$(mktemp -d)
mnt=$work/mnt
# Two, so that the kernel spreads its requests over connections, as CAN_MULTI_CONN lets it.
connections=2
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

# How often the kernel said that the device or the file system on it failed.
kernel_complaints() {
    dmesg | grep -cE "(I/O error|EXT4-fs error|EXT4-fs warning|JBD2).*$name" || true
}

# Writes, syncs, reads back, deletes and trims, until told that it is enough. It says how many files it has written in
# lines that begin with `written: `.
write_on() {
    trap '[ -e "$work/enough" ] || step "error: the writer ended"' EXIT
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
        echo "written: $n"
        # A guest that writes without a break would make the migration a matter of who is faster.
        sleep 0.05
    done
}

# Attaches the device, with $1 as the timeout of its connections.
connect() {
    nbd-client "$host" "$port" "$device" -N "" -connections "$connections" -timeout "$1" >"$work/log" 2>&1 ||
        fail "nbd-client: $(cat "$work/log")"
    step "nbd-client attached $device, $(cat "/sys/block/$name/size") sectors, over $connections connections"
}

# The same, and makes and mounts a file system.
attach() {
    mkdir "$mnt" "$work/sums"
    complaints=$(kernel_complaints)
    connect "$1"

    mkfs.ext4 -q "$device" >"$work/log" 2>&1 || fail "mkfs.ext4: $(cat "$work/log")"
    mount -t ext4 "$device" "$mnt"
    step "ext4 made and mounted"
}

stop_writing() {
    echo yes >"$work/enough"
    wait "$writer" || fail "the writer failed"
    writer=
}

# Writes from `step: writing` on, until a line on standard input says that whatever was to happen is over.
write_until_told() {
    write_on &
    writer=$!
    step "writing"
    read -r _
    kill -0 "$writer" 2>/dev/null || fail "the writer ended"
    stop_writing
}

# Reads everything back, from the file system and beside it, and detaches the device. $1 is what has happened.
finish() {
    verify "$1"
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
}
