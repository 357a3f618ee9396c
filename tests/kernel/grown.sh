#!/bin/sh
# Uses an NBD device of this kernel as a disk that is written all the time, and then as a larger one.
#
# usage: grown.sh DEVICE HOST PORT
#
# From `step: writing` on the image may be copied. A line on standard input says that it has grown. The last step has the
# checksum of the device.
. "$(dirname "$0")/functions.sh"

blocks() {
    stat -f -c %b "$mnt"
}

attach 900
put stays 4096
write_until_told
before=$(blocks)
verify "before it grows"
umount "$mnt"
nbd-client -d "$device" >"$work/log" 2>&1 || fail "nbd-client -d: $(cat "$work/log")"

connect 900
mount -t ext4 "$device" "$mnt"
resize2fs "$device" >"$work/log" 2>&1 || fail "resize2fs: $(cat "$work/log")"
step "ext4 has $(blocks) blocks instead of $before"
[ "$(blocks)" -gt $((before * 5 / 4)) ] || fail "it has not grown"
put added 49152

finish "after it has grown"
