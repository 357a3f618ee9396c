#!/bin/bash
# Makes a GlusterFS volume with three copies of everything on this machine, for as long as a command runs:
#
#   volume.sh COMMAND...       as root; Debian's glusterfs-server and iproute2
#
# The command finds the mounted volume in CLUSTER_MOUNT, its name in CLUSTER_VOLUME, and in CLUSTER_LOCAL a folder that is
# not on it.
# All of it is in a network, a mount and a process namespace of its own: nothing outside can be reached, nothing outside
# sees it, and all its processes end with it. CLUSTER_DIR is where it keeps its files meanwhile (/var/tmp).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

# Inside the namespaces, as their first process. $dir is empty, and there is no other process.
inside() {
    # A signal that arrives now ends this shell, and with it the namespaces.
    trap 'exit 130' INT TERM
    export CLUSTER_MOUNT=$dir/mounted CLUSTER_VOLUME=copies CLUSTER_LOCAL=$dir/local
    mkdir "$CLUSTER_MOUNT" "$CLUSTER_LOCAL" "$dir"/{state,logs,run,brick1,brick2,brick3}
    # What a glusterd of this machine has is not touched.
    mount --bind "$dir/run" /run
    mount --bind "$dir/state" /var/lib/glusterd
    mount --bind "$dir/logs" /var/log/glusterfs
    mkdir /run/gluster
    # It takes no address of the loopback network for a host.
    ip link set lo up
    ip address add 10.9.0.1/32 dev lo

    timeout 60 glusterd
    within 60 gluster --mode=script volume list
    must gluster --mode=script volume create "$CLUSTER_VOLUME" replica 3 10.9.0.1:"$dir"/brick{1,2,3}/data force
    # A copy that is silent is given up after so many seconds, and one that was away is looked at so often.
    must gluster --mode=script volume set "$CLUSTER_VOLUME" network.ping-timeout 5 cluster.heal-timeout 5
    must gluster --mode=script volume start "$CLUSTER_VOLUME"
    within 60 mount -t glusterfs "10.9.0.1:/$CLUSTER_VOLUME" "$CLUSTER_MOUNT"
    # In the background, so that a signal does not wait for its end.
    "$@" &
    wait $!
}

# Runs a command that has to succeed; what it says is shown only if it fails.
must() {
    timeout 60 "$@" >"$dir/said" 2>&1 || { echo "volume: $*: $(cat "$dir/said")" >&2; exit 1; }
}

# Runs a command until it succeeds, at most so many seconds.
within() {
    local deadline=$((SECONDS + $1))
    shift
    until timeout 20 "$@" >"$dir/said" 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || { echo "volume: $*: $(cat "$dir/said")" >&2; exit 1; }
        sleep 0.1
    done
}

clean_up() {
    # The child of unshare dies with it and, being the first process of the namespaces, takes all others with it before.
    local first
    first=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) || true
    kill -KILL "$outer" 2>/dev/null || true
    wait "$outer" 2>/dev/null || true
    for _ in $(seq 300); do
        grep -qs '^State:[^XZ]*$' "/proc/${first:-none}/status" || break
        sleep 0.1
    done
    rm -rf "$dir"
}

if [ "${1:-}" = --inside ]; then
    dir=$2
    shift 2
    inside "$@"
    exit
fi

[ $# -gt 0 ] && [ "$(id -u)" = 0 ] || { echo "usage: volume.sh COMMAND..., as root" >&2; exit 2; }
dir=$(mktemp -d -p "${CLUSTER_DIR:-/var/tmp}" flexnbd-cluster-XXXXXX)
trap 'rm -rf "$dir"' EXIT
# If this shell is killed, so is everything.
setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" --inside "$dir" "$@" &
outer=$!
trap clean_up EXIT
trap 'exit 130' INT TERM
wait "$outer"
