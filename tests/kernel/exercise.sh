#!/bin/sh
# Uses an NBD device of this kernel as a disk: ext4, files, trims, and a change of servers while it is written to.
#
# usage: exercise.sh DEVICE HOST PORT SECOND_PORT
#
# At `step: writing` the server on PORT is to be migrated to the one on SECOND_PORT. The last step has the checksum of
# the device.
. "$(dirname "$0")/functions.sh"

second_port=$4
# What was in flight when the connections ended is sent again after so many seconds. A slow machine takes seconds over a
# flush, and a request that is only slow would end its connection.
timeout=20

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

attach "$timeout"

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
stop_writing
step "32 more files written, all without an error"

finish "after the migration"
