#!/bin/bash
# Shows that `make chaos` finds what it is there to find: breaks a copy of the program in one way after the other, and says
# in how many rounds each was found. Fails when one is not found, or when the code it would break is not there any more.
cd "$(dirname "$0")/../.."
. tests/teeth.sh
rounds=${ROUNDS:-40}
seed=${SEED:-1}
only=${ONLY:-.}
enter_copy

status=0
# breaks WHAT [FILE PERL]...: breaks a copy, and plays the rounds.
breaks() {
    local what=$1 result found
    [[ $what =~ $only ]] || return 0
    shift
    break_copy "$what" chaos "$@"
    result=0
    FLEXNBD_SEED=$seed FLEXNBD_ROUNDS=$rounds timeout 1800 \
        cargo test --locked --quiet --test chaos -- --nocapture rounds >log 2>&1 || result=$?
    found=$(sed -nE 's/^([0-9]+) of [0-9]+ rounds failed: .*/\1/p' log)
    if [ "$result" = 0 ]; then
        echo "$what: NOT FOUND in $rounds rounds"
        status=1
    elif [ -z "$found" ]; then
        tail -20 log >&2
        echo "teeth: $what: the rounds did not come to their end" >&2
        exit 1
    else
        echo "$what: found in $found of $rounds rounds"
        # How, for whoever wants to know.
        grep -hA1 '^thread .seed' log | grep -v '^thread\|^--' | sed -E 's/[0-9]+/N/g' | cut -c1-100 | sort | uniq -c |
            sort -rn | head -3
    fi
    mend_copy
}

breaks "a dropped dirty note, one in four" \
    migrate/pass.rs 's/(fn note_write\(&mut self, range: &Range<u64>\) -> u64 \{)/$1 if range.start >> 12 & 3 == 1 { return 0; }/'

breaks "no pause in the last pass" \
    server/life.rs 's/Self::Sending \{ plan, \.\. \} => plan\.pauses_clients\(\)/Self::Sending { .. } => false/'

breaks "no fresh start after a failure" \
    migrate/pass.rs 's/(let Self \{ size, mut dirty, mut in_flight,)( \.\. \} = self;)\n        dirty\.set_range\(0, size\);/$1 taken,$2
        for lost in in_flight.iter().map(|sent| sent.range.clone()).chain([taken]) {
            dirty.set_range(lost.start, lost.end - lost.start);
        }/'

breaks "clients cut at the pause" \
    server/apply.rs 's/if let Some\(Slot::Client\(client\)\) = self\.slots\.get_mut\(key\) \{\s*client\.keep\(self\.shared\.now_ms\);\s*\}/self.settle(key, Some(Next::Close(Reason::Killswitch { age_ms: 0 })));/'

breaks "a listener that takes any DISC for the end" \
    server/client.rs 's/if incoming\.is_complete\(\) =>/if incoming.is_complete() || true =>/'

exit "$status"
