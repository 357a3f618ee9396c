#!/bin/sh
# Uses an NBD device of this kernel as a disk that is written all the time, over connections that have to last whatever
# becomes of the server behind them.
#
# usage: undisturbed.sh DEVICE HOST PORT
#
# From `step: writing` on anything may happen behind PORT, until a line on standard input says that it is over. The last
# step has the checksum of the device.
. "$(dirname "$0")/functions.sh"

# What the driver itself says of the device is about a connection: that it was lost, that a request took too long.
lost_connections() {
    dmesg | grep -c "block $name: " || true
}

# The kernel ends a connection on which a request waits for so many seconds: more than the whole exercise takes.
attach 900
lost=$(lost_connections)
put stays 4096
for n in 1 2 3 4 5 6 7 8; do
    put "small$n" $((n * 7))
done
verify "before"

write_until_told
[ "$(lost_connections)" = "$lost" ] || fail "a connection was lost: $(dmesg | grep "block $name: " | tail -n 5)"
step "$(cat "$work/count") files written without an error, over the first connections"

finish "after it"
