#!/bin/bash
# Lets a real kernel use flexnbd as a disk while its servers change: in a guest of qemu with Debian's kernel, and where
# there is /dev/nbd0 and one may, with the kernel of this machine too. `make test-kernel` runs it. It takes some minutes
# and leaves nothing behind. ONLY names some of its exercises. ACCEL is qemu's accelerator: tcg, which works everywhere, or kvm.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

flexnbd=$(realpath "${FLEXNBD:-target/release/flexnbd}")
here=$(realpath "$(dirname "$0")")
dir=$(mktemp -d)
cd "$dir"
# 128 MiB: small enough to be read as a whole without KVM.
size=134217728
# Seconds for all steps of one exercise.
limit=240
# The processes to end: the servers, the proxy, the one that waits for a migration, and the guest or the exercise.
source= destination= last= proxy= migration= kernel=
# Where files can share blocks, once it is mounted.
pool=
# What the exercise is told, on its standard input.
mkfifo input
exec 3<>input
passed=0
# Those that are run; ONLY names some of them.
exercises=${ONLY:-migrate crash_behind_proxy relay copy_and_grow}

clean_up() {
    # The exercise first: it undoes what it did to this machine, and may need the servers for it.
    for job in $kernel $migration $source $destination $last $proxy; do
        kill "$job" 2>/dev/null || continue
        timeout 20 tail --pid="$job" -f /dev/null || kill -KILL "$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
    done
    [ -z "$pool" ] || umount "$pool" || true
    cd /
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say() {
    printf '%5d s  %s\n' "$SECONDS" "$*"
}

fail() {
    say "FAILED: $*"
    [ ! -s console ] || { echo "the end of what the kernel and the exercise said:"; tail -n 30 console; }
    echo "$passed passed, 1 failed"
    exit 1
}

flexnbd() {
    timeout 10 "$flexnbd" "$@"
}

status() {
    flexnbd status --sock "$1" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$2=//p"
}

port_of() {
    local address
    address=$(status "$1" "$2") || true
    echo "${address##*:}"
}

# Starts flexnbd in the mode that follows, with the control socket $2.sock. The variable named $1 gets its process.
start() {
    local variable=$1 called=$2 server
    shift 2
    "$flexnbd" "$@" --addr 127.0.0.1 --port 0 --sock "$called.sock" 2>>"$called.log" 3>&- &
    server=$!
    printf -v "$variable" %s "$server"
    for _ in $(seq 100); do
        ! flexnbd status --sock "$called.sock" >/dev/null 2>&1 || return 0
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    fail "flexnbd $* does not get ready: $(cat "$called.log")"
}

# The same for a server of the new image $2, which newstyle clients reach by TCP.
start_new() {
    truncate -s "$size" "$2"
    start "$@" --file "$2" --newstyle-port 0
}

# Waits until the process in the variable named $1 has ended, with exit code 0. $2 is its log.
await_exit() {
    local job=${!1}
    timeout 30 tail --pid="$job" -f /dev/null || fail "the $1 does not end"
    wait "$job" || fail "the $1 ended with exit code $?: $(cat "$2" 2>/dev/null)"
    printf -v "$1" %s ''
}

# Unpacks Debian's kernel for virtual machines, without installing it; sets `version`.
fetch_kernel() {
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p')
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64; this takes Debian on amd64 (and apt-get update)"
    timeout 120 apt-get download "$package" >fetch.log 2>&1 || fail "apt-get download $package: $(cat fetch.log)"
    dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x ./boot ./lib/modules
    rm "$package"_*.deb
    version=$(ls lib/modules)
}

# Copies a program and the libraries it needs to where they are on this machine, in the guest's root.
add_program() {
    local program file
    program=$(command -v "$1")
    for file in "$program" $(ldd "$program" 2>/dev/null | grep -o '/[^ ]*' || true); do
        install -D "$(realpath "$file")" "root$file"
    done
}

# The modules $@ with those they need, and the index that tells which these are.
add_modules() {
    local file
    depmod --basedir . "$version"
    for file in $(for module in "$@"; do modprobe --dirname . --set-version "$version" --show-depends "$module"; done |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u); do
        install -D -m 644 "$file" "root/lib/modules/$version/${file#*/lib/modules/"$version"/}"
    done
    cp lib/modules/"$version"/modules.{order,builtin,builtin.modinfo} "root/lib/modules/$version"
    depmod --basedir root "$version"
}

make_initramfs() {
    local program perl_base
    mkdir -p root/{bin,dev,proc,sys,tmp}
    for program in nbd-client mkfs.ext4 e2fsck resize2fs fstrim perl; do
        add_program "$program"
    done
    install "$(command -v busybox)" root/bin/busybox
    # What perl itself has, and no more: the package perl-base.
    perl_base=$(perl -e 'print grep { m|/perl-base$| } @INC')
    mkdir -p "root${perl_base%/*}"
    cp -r "$perl_base" "root$perl_base"
    add_modules virtio_pci virtio_net nbd
    install "$here/init.sh" root/init
    cp "$here"/{functions.sh,exercise.sh,undisturbed.sh,grown.sh,reattach.pl} root
    (cd root && find . | cpio --quiet -o -H newc -R 0:0) >initramfs
}

# Both start the exercise $1 in the background, with the ports that follow and what it says in `console`; they set
# `kernel`.
start_guest() {
    local exercise=$1 ports
    shift
    ports=$(IFS=,; echo "$*")
    qemu-system-x86_64 -accel "${ACCEL:-tcg}" -smp 2 -m 512 -display none -monitor none -no-reboot \
        -serial stdio -kernel "boot/vmlinuz-$version" -initrd initramfs \
        -append "console=ttyS0 quiet panic=-1 EXERCISE=$exercise PORTS=$ports" \
        -netdev user,id=net -device virtio-net-pci,netdev=net,romfile= <input >console 2>qemu.log 3>&- &
    kernel=$!
}

start_here() {
    local exercise=$1
    shift
    sh "$here/$exercise.sh" "$device" 127.0.0.1 "$@" <input >console 2>&1 3>&- &
    kernel=$!
}

# A device of this machine that is not in use and may be used, if there is one.
free_device() {
    local device
    [ "$(id -u)" = 0 ] || return 0
    for device in /dev/nbd{0..15}; do
        if [ -b "$device" ] && ! nbd-client -c "$device" >/dev/null; then
            echo "$device"
            return
        fi
    done
}

# The whole lines of the console; the last one may be half a line yet.
lines() {
    head -n "$(wc -l <console)" console | tr -d '\r'
}

# Shows the steps that were done meanwhile, and counts them in `shown`, until one begins with $1. An error ends the
# test.
show_steps() {
    local step alive=yes
    kill -0 "$kernel" 2>/dev/null || alive=no
    while step=$(lines | sed -n 's/^step: //p' | sed -n "$((shown + 1))p") && [ -n "$step" ]; do
        shown=$((shown + 1))
        say "$step"
        [[ $step != error:* && $step != *failed ]] || fail "the exercise"
        [[ -z $1 || $step != "$1"* ]] || return 0
    done
    [ "$alive" = yes ] || fail "it ended too early: $(cat qemu.log 2>/dev/null)"
    return 1
}

# Waits for a step that begins with $1, until `deadline`.
await_step() {
    until show_steps "$1"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "no step '$1' within $limit seconds"
        sleep 0.2
    done
}

# How many files the exercise says it has written.
written() {
    local count
    count=$(lines | sed -n 's/^written: \([0-9]*\)$/\1/p' | tail -n 1)
    echo "${count:-0}"
}

# Waits until $1 more files are written, until `deadline`.
await_files() {
    local enough=$(($(written) + $1))
    until [ "$(written)" -ge "$enough" ]; do
        show_steps '' || true
        [ "$SECONDS" -lt "$deadline" ] || fail "the writer does not get on: $(written) files, not $enough"
        sleep 0.05
    done
}

# Waits until the exercise has done all it does, and keeps in `sum` the checksum that it saw of the device.
await_detached() {
    await_step "detached"
    sum=$(grep -a '^step: detached' console | grep -oE '[0-9a-f]{64}')
    await_exit kernel qemu.log
}

# Compares the image $1 with what the exercise wrote and last saw; then it is done with.
check_image() {
    [ "$(sha256sum <"$1")" = "$sum  -" ] || fail "the image is not what the kernel read at the end"
    say "the image is, byte for byte, the device as the kernel last saw it"
    e2fsck -fn "$1" >fsck.log 2>&1 || fail "e2fsck of the image: $(cat fsck.log)"
    mkdir files
    debugfs -R "rdump / files" "$1" >debugfs.log 2>&1
    (cd files && sha256sum --quiet -c SHA256SUMS) || fail "the files in the image"
    say "e2fsck finds nothing wrong with it, and its $(wc -l <files/SHA256SUMS) files have the right checksums"
    rm -rf files ./*.log "$1"
    passed=$((passed + 1))
}

# A disk that is migrated; the kernel is given connections to the destination. $1 starts the exercise, as below.
migrate() {
    local shown=0 deadline=$((SECONDS + limit)) kib sum
    say "a migration:"
    : >console
    start_new source first serve
    start_new destination second listen --serve
    "$1" exercise "$(port_of first.sock newstyle_address)" "$(port_of second.sock newstyle_address)"

    await_step "trimmed"
    kib=$(du -k first | cut -f 1)
    [ "$kib" -lt 32768 ] || fail "$kib KiB on the disk: the trim did not give back the space"
    say "the image takes $kib KiB on the disk"

    await_step "writing"
    # Slow enough to last some seconds, so that it meets many writes.
    timeout 90 "$flexnbd" mirror --addr 127.0.0.1 --port "$(port_of second.sock address)" --sock first.sock \
        --max-speed 8000000 --wait >mirror.log 2>&1 || fail "mirror: $(cat mirror.log first.log second.log)"
    await_exit source first.log
    say "migrated, and the first server has ended"

    await_detached
    kill "$destination"
    await_exit destination second.log
    rm first
    check_image second
}

# A disk behind a proxy, while its server is killed and started again.
crash_behind_proxy() {
    local shown=0 deadline=$((SECONDS + limit)) sum crash crashes=20 reconnects
    # A name that nobody else can take while the server is away.
    local -a server=(serve --file first --newstyle-sock first.nbd)
    say "a proxy, and $crashes crashes of the server behind it:"
    : >console
    truncate -s "$size" first
    start source first "${server[@]}"
    start proxy proxy proxy --conn-addr "$dir/first.nbd" --newstyle-port 0 --max-clients 4
    "$1" undisturbed "$(port_of proxy.sock newstyle_address)"

    await_step "writing"
    for crash in $(seq "$crashes"); do
        await_files 2
        kill -KILL "$source"
        { wait "$source"; } 2>/dev/null || true
        source=
        # Sometimes it is back before anybody misses it, sometimes everything waits for it.
        sleep "0.$((crash % 10))"
        start source first "${server[@]}"
    done
    await_files 24
    say "killed and started $crashes times; $(written) files were written meanwhile and after it"
    reconnects=$(status proxy.sock reconnects)
    [ "$reconnects" -ge "$crashes" ] || fail "the proxy lost its server $reconnects times"
    say "the proxy lost its server $reconnects times and sent $(status proxy.sock replayed_bytes) bytes again"
    echo over >&3

    await_detached
    kill "$proxy"
    await_exit proxy proxy.log
    kill "$source"
    await_exit source first.log
    check_image first
}

# Has the server $1 migrate to the port $3 of the server $2 and relay from then on, while files are written.
migrate_relayed() {
    # It does not end at this speed before it has met some files.
    timeout 120 "$flexnbd" mirror --addr 127.0.0.1 --port "$3" --sock "$1.sock" --max-speed 200000 --relay --wait \
        >mirror.log 2>&1 &
    migration=$!
    await_files 6
    [ "$(status "$1.sock" is_mirroring)" = true ] ||
        fail "the migration did not meet the writer: $(cat mirror.log "$1.log" "$2.log")"
    flexnbd mirror-speed --sock "$1.sock" --max-speed 8000000 >speed.log 2>&1 || fail "mirror-speed: $(cat speed.log)"
    await_exit migration mirror.log
    [ "$(status "$1.sock" relaying)" = true ] || fail "the $1 server does not relay: $(cat "$1.log")"
    say "the $1 server relays to the $2"
    await_files 12
}

# A disk that is migrated twice, while the first server relays what the kernel asks over the connections it has.
relay() {
    local shown=0 deadline=$((SECONDS + limit)) sum
    say "two relayed migrations:"
    : >console
    start_new source first serve
    start_new destination second listen --serve
    # A machine that the disk comes back to has a new server, which knows nothing of the first.
    start_new last third listen --serve
    "$1" undisturbed "$(port_of first.sock newstyle_address)"

    await_step "writing"
    await_files 6
    migrate_relayed first second "$(port_of second.sock newstyle_address)"
    # The first server relays to one that relays, and this time in oldstyle.
    migrate_relayed second third "$(port_of third.sock address)"
    [ "$(status first.sock num_clients)" = 2 ] || fail "the first server has lost a client"
    echo over >&3

    await_detached
    await_exit source first.log
    await_exit destination second.log
    say "without a client, the first and the second server have ended"
    kill "$last"
    await_exit last third.log
    rm first second
    check_image third
}

# A disk of which snapshots are made while it is written, and which grows.
copy_and_grow() {
    local shown=0 deadline=$((SECONDS + limit)) sum copy copies=100 longest
    say "$copies snapshots, and a larger disk:"
    : >console
    truncate -s 4G btrfs
    mkfs.btrfs -q btrfs >mkfs.log 2>&1 || fail "mkfs.btrfs: $(cat mkfs.log)"
    mkdir files.d
    mount -o loop btrfs files.d || fail "btrfs on a loop device; this takes root"
    pool=$dir/files.d
    start_new source "$pool/first" serve
    "$1" grown "$(port_of "$pool/first.sock" newstyle_address)"

    await_step "writing"
    for copy in $(seq "$copies"); do
        await_files 1
        flexnbd snapshot --sock "$pool/first.sock" --to "$pool/copy" >>snapshot.log 2>&1 || fail "$(cat snapshot.log)"
        # What a power failure leaves: the journal is replayed, and nothing else is to be mended.
        e2fsck -E journal_only -y "$pool/copy" >fsck.log 2>&1 || [ $? = 1 ] || fail "snapshot $copy: $(cat fsck.log)"
        e2fsck -fn "$pool/copy" >fsck.log 2>&1 || fail "e2fsck of snapshot $copy: $(cat fsck.log)"
        rm "$pool/copy"
    done
    longest=$(sed -n 's/.*changes waited for \([0-9]*\) ms$/\1/p' snapshot.log | sort -n | tail -n 1)
    say "e2fsck finds nothing wrong with $copies snapshots; changes waited for ${longest:-?} ms at most"
    truncate -s "$((size * 3 / 2))" "$pool/first"
    [ "$(flexnbd resize --sock "$pool/first.sock")" = "size=$((size * 3 / 2))" ] || fail "resize: $(cat "$pool/first.log")"
    echo over >&3

    await_detached
    kill "$source"
    await_exit source "$pool/first.log"
    check_image "$pool/first"
    umount "$pool"
    pool=
    rm btrfs
    rmdir files.d
}

device=$(free_device)
if [ -n "$device" ]; then
    say "the kernel of this machine, $device"
    for exercise in $exercises; do
        "$exercise" start_here
    done
else
    say "no free /dev/nbd0 here, or not root: only the kernel in qemu"
fi

say "a kernel in qemu (accelerator: ${ACCEL:-tcg})"
fetch_kernel
make_initramfs
say "Debian's kernel $version, initramfs of $(du -m initramfs | cut -f 1) MiB"
for exercise in $exercises; do
    "$exercise" start_guest
done

echo "$passed passed, 0 failed"
