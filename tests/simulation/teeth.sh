#!/bin/bash
# Shows that the simulated histories find what they are there to find: breaks a copy of src/upstream in one way after the
# other, and says which seed has found it. Fails when none does, or when the code it would break is not there any more.
set -euo pipefail
export LC_ALL=C
only=${ONLY:-.}
cd "$(dirname "$0")/../.."
# What others have compiled is compiled once.
target=${CARGO_TARGET_DIR:-$PWD/target}/teeth

copy=$(mktemp -d "${TMPDIR:-/tmp}/flexnbd-teeth-XXXXXX")
trap 'rm -rf "$copy"' EXIT
trap 'exit 1' INT TERM HUP
cp -r Cargo.toml Cargo.lock README.md .cargo src tests "$copy"
cd "$copy"
export CARGO_TARGET_DIR=$target RUST_BACKTRACE=0

status=0
# breaks WHAT [FILE PERL]...: applies each substitution to its file of src/upstream, and plays the histories.
breaks() {
    local what=$1 result=0 seed
    [[ $what =~ $only ]] || return 0
    shift
    rm -rf broken
    cp -r src broken
    while [ $# -gt 0 ]; do
        cp "src/upstream/$1" before
        perl -0pi -e "$2" "src/upstream/$1"
        if cmp -s "src/upstream/$1" before; then
            echo "teeth: $what: src/upstream/$1 has changed, so that this breaks nothing" >&2
            exit 1
        fi
        shift 2
    done
    timeout 1800 cargo test --locked --quiet --test simulation --no-run 2>log || {
        cat log >&2
        echo "teeth: $what: it does not compile" >&2
        exit 1
    }
    timeout 900 cargo test --locked --quiet --test simulation -- --nocapture histories >log 2>&1 || result=$?
    seed=$(sed -nE 's/^to run it again: FLEXNBD_SEED=([0-9]+) .*/\1/p' log)
    if [ "$result" = 0 ]; then
        echo "$what: NOT FOUND"
        status=1
    elif [ -z "$seed" ]; then
        tail -20 log >&2
        echo "teeth: $what: the histories did not come to their end" >&2
        exit 1
    else
        echo "$what: found at seed $seed"
        # How, for whoever wants to know.
        grep -A1 "^thread .*panicked" log | tail -n 1 | cut -c1-100 | sed 's/^/    /'
    fi
    rm -rf src
    mv broken src
}

breaks "an answer with FUA does not cut what is older" \
    task.rs 's/(    is_durable: bool)/    pub(super) is_durable: bool/' \
    mod.rs 's/(_ => self\.dirty\.cut\(&range\))/_ if task.is_durable => {}\n                $1/'

breaks "what is dirty is dropped when the FLUSH is sent" \
    mod.rs 's/(self\.own_flush = OwnFlush::Sent;)/$1 self.dirty.drop_until(self.seq);/' \
    mod.rs 's/(task\.sent\(what, fua, length, self\.seq\);)/$1 if what == What::Flush { self.dirty.drop_until(self.seq); }/'

breaks "a change does not wait for an earlier one of the same place" \
    mod.rs 's/(\.any\(\|other\| )(overlap\(range, other\))/$1false && $2/'

breaks "operations go before what is dirty has been written again" \
    mod.rs 's/(Stage::Replaying \{ next \} => )(self\.next_replay\(next\))/$1self.next_of_tasks().or_else(|| $2)/' \
    mod.rs 's/self\.in_flight == 0 && (self\.dirty\.next\(next, 1\))/$1/'

breaks "a FLUSH makes clean what was answered after it was sent, too" \
    mod.rs 's/drop_until\(task\.mark\)/drop_until(task.mark.max(u64::MAX))/' \
    mod.rs 's/drop_until\(mark\)/drop_until(mark.max(u64::MAX))/'

breaks "the FLUSH of a long WRITE with FUA does not wait for its earlier parts" \
    mod.rs 's/if (self\.awaits_earlier_parts\(number\))/if false && $1/'

exit "$status"
