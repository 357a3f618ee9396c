#!/bin/bash
# Lets a real kernel use flexnbd as a disk, and migrates it to another server meanwhile: in a guest of qemu with
# Debian's kernel, and where there is /dev/nbd0 and one may, with the kernel of this machine too. `make test-kernel`
# runs it. It takes a minute or two and leaves nothing behind. ACCEL is qemu's accelerator: tcg, which works everywhere,
# or kvm.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

flexnbd=$(realpath "${FLEXNBD:-target/release/flexnbd}")
here=$(realpath "$(dirname "$0")")
dir=$(mktemp -d)
cd "$dir"
# 128 MiB: small enough to be read as a whole without KVM.
size=134217728
# Seconds for all steps of one kernel.
limit=240
# The processes to end: the two servers, and the guest or the exercise.
source= destination= kernel=
passed=0

clean_up() {
    # The exercise first: it undoes what it did to this machine, and may need the servers for it.
    for job in $kernel $source $destination; do
        kill "$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
    done
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

# Starts a server for a new image $2, with the control socket $2.sock, in the mode that follows. The variable named $1
# gets its process.
start() {
    local variable=$1 image=$2 server
    shift 2
    truncate -s "$size" "$image"
    "$flexnbd" "$@" --addr 127.0.0.1 --port 0 --newstyle-port 0 --file "$image" --sock "$image.sock" 2>"$image.log" &
    server=$!
    printf -v "$variable" %s "$server"
    for _ in $(seq 100); do
        ! flexnbd status --sock "$image.sock" >/dev/null 2>&1 || return 0
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    fail "flexnbd $* does not get ready: $(cat "$image.log")"
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
    for program in nbd-client mkfs.ext4 e2fsck fstrim perl; do
        add_program "$program"
    done
    install "$(command -v busybox)" root/bin/busybox
    # What perl itself has, and no more: the package perl-base.
    perl_base=$(perl -e 'print grep { m|/perl-base$| } @INC')
    mkdir -p "root${perl_base%/*}"
    cp -r "$perl_base" "root$perl_base"
    add_modules virtio_pci virtio_net nbd
    install "$here/init.sh" root/init
    cp "$here"/{exercise.sh,reattach.pl} root
    (cd root && find . | cpio --quiet -o -H newc -R 0:0) >initramfs
}

# Both start the exercise in the background, with what it says in `console`; they set `kernel`.
start_guest() {
    qemu-system-x86_64 -accel "${ACCEL:-tcg}" -smp 2 -m 512 -display none -monitor none -no-reboot \
        -serial file:console -kernel "boot/vmlinuz-$version" -initrd initramfs \
        -append "console=ttyS0 quiet panic=-1 FIRST_PORT=$1 SECOND_PORT=$2" \
        -netdev user,id=net -device virtio-net-pci,netdev=net,romfile= 2>qemu.log &
    kernel=$!
}

start_here() {
    sh "$here/exercise.sh" "$device" 127.0.0.1 "$1" "$2" >console 2>&1 &
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

# Shows the steps as they are done until one begins with $1. Counts them in `shown`; gives up at `deadline`.
await_step() {
    local step
    while :; do
        # The last line may be half a line yet.
        while step=$(head -n "$(wc -l <console)" console | tr -d '\r' | sed -n 's/^step: //p' |
            sed -n "$((shown + 1))p") && [ -n "$step" ]; do
            shown=$((shown + 1))
            say "$step"
            [[ $step != error:* && $step != *failed ]] || fail "the exercise"
            [[ $step != "$1"* ]] || return 0
        done
        kill -0 "$kernel" 2>/dev/null || fail "it ended before the step '$1': $(cat qemu.log 2>/dev/null)"
        [ "$SECONDS" -lt "$deadline" ] || fail "no step '$1' within $limit seconds"
        sleep 0.2
    done
}

# The servers, the migration and what is to be found in the images; $1 starts the exercise.
exercise() {
    local shown=0 deadline=$((SECONDS + limit)) kib sum
    : >console
    start source first serve
    start destination second listen --serve
    "$1" "$(port_of first.sock newstyle_address)" "$(port_of second.sock newstyle_address)"

    await_step "trimmed"
    kib=$(du -k first | cut -f 1)
    [ "$kib" -lt 32768 ] || fail "$kib KiB on the disk: the trim did not give back the space"
    say "the image takes $kib KiB on the disk"

    await_step "writing"
    # Slow enough to last some seconds, so that it meets many writes.
    timeout 90 "$flexnbd" mirror --addr 127.0.0.1 --port "$(port_of second.sock address)" --sock first.sock \
        --max-speed 8000000 --wait >mirror.log 2>&1 || fail "mirror: $(cat mirror.log) $(cat first.log second.log)"
    timeout 10 tail --pid="$source" -f /dev/null || fail "the first server does not end"
    wait "$source" || fail "the first server ended with exit code $?: $(cat first.log)"
    source=
    say "migrated, and the first server has ended"

    await_step "detached"
    sum=$(grep -a '^step: detached' console | grep -oE '[0-9a-f]{64}')
    timeout 30 tail --pid="$kernel" -f /dev/null || fail "the guest does not end"
    wait "$kernel" || fail "it ended with exit code $?: $(cat qemu.log 2>/dev/null)"
    kernel=
    kill "$destination"
    timeout 10 tail --pid="$destination" -f /dev/null || fail "the second server does not end"
    wait "$destination" || fail "the second server ended with exit code $?: $(cat second.log)"
    destination=

    [ "$(sha256sum <second)" = "$sum  -" ] || fail "the second image is not what the kernel read at the end"
    say "the second image is, byte for byte, the device as the kernel last saw it"
    e2fsck -fn second >fsck.log 2>&1 || fail "e2fsck of the second image: $(cat fsck.log)"
    mkdir files
    debugfs -R "rdump / files" second >debugfs.log 2>&1
    (cd files && sha256sum --quiet -c SHA256SUMS) || fail "the files in the second image"
    say "e2fsck finds nothing wrong with it, and its $(wc -l <files/SHA256SUMS) files have the right checksums"
    rm -rf files first second
    passed=$((passed + 1))
}

device=$(free_device)
if [ -n "$device" ]; then
    say "the kernel of this machine, $device"
    exercise start_here
else
    say "no free /dev/nbd0 here, or not root: only the kernel in qemu"
fi

say "a kernel in qemu (accelerator: ${ACCEL:-tcg})"
fetch_kernel
make_initramfs
say "Debian's kernel $version, initramfs of $(du -m initramfs | cut -f 1) MiB"
exercise start_guest

echo "$passed passed, 0 failed"
