#!/bin/bash
# Shows that the simulated histories and migrations find what they are there to find: breaks a copy of src/upstream and
# src/migrate in one way after the other, and says which seed has found it. Fails when none does, or when the code it would
# break is not there any more.
cd "$(dirname "$0")/../.."
. tests/teeth.sh
only=${ONLY:-.}
enter_copy

status=0
tests=histories
# breaks WHAT [FILE PERL]...: breaks a copy, and plays the tests.
breaks() {
    local what=$1 result=0 seed
    [[ $what =~ $only ]] || return 0
    shift
    break_copy "$what" simulation "$@"
    timeout 900 cargo test --locked --quiet --test simulation -- --nocapture "$tests" >log 2>&1 || result=$?
    seed=$(sed -nE 's/^(to run it again: FLEXNBD_SEED=|seed )([0-9]+).*/\2/p' log | head -n 1)
    if [ "$result" = 0 ]; then
        echo "$what: NOT FOUND"
        status=1
    elif [ -z "$seed" ]; then
        tail -20 log >&2
        echo "teeth: $what: the tests did not come to their end" >&2
        exit 1
    else
        echo "$what: found at seed $seed"
        # How, for whoever wants to know.
        grep -A1 "^thread .*panicked" log | tail -n 1 | cut -c1-100 | sed 's/^/    /'
    fi
    mend_copy
}

breaks "an answer with FUA does not cut what is older" \
    upstream/task.rs 's/(    is_durable: bool)/    pub(super) is_durable: bool/' \
    upstream/mod.rs 's/(_ => self\.dirty\.cut\(&range\))/_ if task.is_durable => {}\n                $1/'

breaks "what is dirty is dropped when the FLUSH is sent" \
    upstream/mod.rs 's/(self\.own_flush = OwnFlush::Sent;)/$1 self.dirty.drop_until(self.seq);/' \
    upstream/mod.rs 's/(task\.sent\(what, fua, length, self\.seq\);)/$1 if what == What::Flush { self.dirty.drop_until(self.seq); }/'

breaks "a change does not wait for an earlier one of the same place" \
    upstream/mod.rs 's/(\.any\(\|other\| )(overlap\(range, other\))/$1false && $2/'

breaks "operations go before what is dirty has been written again" \
    upstream/mod.rs 's/(Stage::Replaying \{ next \} => )(self\.next_replay\(next\))/$1self.next_of_tasks().or_else(|| $2)/' \
    upstream/mod.rs 's/self\.in_flight == 0 && (self\.dirty\.next\(next, 1\))/$1/'

breaks "a FLUSH makes clean what was answered after it was sent, too" \
    upstream/mod.rs 's/drop_until\(mark\)/drop_until(mark.max(u64::MAX))/'

breaks "the FLUSH of a long WRITE with FUA does not wait for its earlier parts" \
    upstream/mod.rs 's/if (self\.awaits_earlier_parts\(number\))/if false && $1/'

breaks "a change does not drop what was read ahead" \
    upstream/ahead.rs 's/(if )(task\.changes\(\)\.is_some_and\(\|range\| overlap\(&range, &bytes\)\))/$1false && $2/'

breaks "what is being changed is read ahead" \
    upstream/ahead.rs 's/(length == 0 \|\| )(changes\.any\()/$1false && $2/'

tests=marks::never
breaks "the image is changed before it is marked as one that comes" \
    migrate/incoming.rs 's/self\.mark == Marking::Over/true || $&/'

breaks "DISC is said without a mark" \
    migrate/plan.rs 's/Need::Nothing if (self\.settling\.is_some\(\))/Need::Nothing if false \&\& $1/'

tests=seeds::seeds
breaks "DISC does not wait until the mark is durable" \
    migrate/plan.rs 's/(Phase::Marked \{ \.\. \}) => return self\.commit/Phase::Marking { .. } | $&/' \
    migrate/pause.rs 's/(if let Phase::LastPass \{ since_ms \}) \| (Phase::Marked)/$1 | Phase::Marking { since_ms } | $2/'

breaks "the mark is forgotten with the attempt" \
    migrate/plan.rs 's/self\.attempt\.settling\.is_some\(\) && is_late/false \&\& is_late/'

exit "$status"
