#!/bin/bash
# What `make fuzz`, `make fuzz-seeds` and `make fuzz-coverage` do. Each takes the names of targets.
#
#   run SECONDS TARGET...    fuzzes one target after the other. What is found that reaches something new stays in
#                            fuzz/corpus, from which the next run goes on.
#   seeds TARGET...          copies from there to fuzz/seeds the inputs that reach what no seed does.
#   coverage TARGET...       names the functions that neither the corpora nor the seeds reach.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo}
BUILT=$(realpath -m "${CARGO_TARGET_DIR:-fuzz/target}")
# A seed is part of the repository, so it has to be small.
SEED_MAX_BYTES=8192
# For compiling, beside the time that is asked for.
BUILD_MAX_S=900
# As in the Makefile: at a terminal Ctrl-C has to reach what runs under a deadline.
FOREGROUND=$(test -t 0 && echo --foreground || true)

within() {
    # Unquoted, because it may be empty.
    timeout $FOREGROUND --kill-after=10 "$@"
}

# Runs a command whose output is of interest only when it fails.
quietly() {
    "$@" >"$scratch/log" 2>&1 || {
        cat "$scratch/log" >&2
        exit 1
    }
}

main() {
    local do=$1
    shift
    [ "$do" != run ] || { seconds=$1 && shift; }
    for target in "$@"; do
        if [ ! -f "fuzz/fuzz_targets/$target.rs" ]; then
            echo "there is no target '$target'; there are: $(cd fuzz/fuzz_targets && echo *.rs | sed 's/\.rs//g')" >&2
            exit 2
        fi
    done
    "$CARGO" fuzz --version >/dev/null 2>&1 || {
        echo "installing cargo-fuzz, which fuzzing needs"
        within 900 "$CARGO" install cargo-fuzz --locked
    }
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    case $do in
        run) run_all "$@" ;;
        seeds) add_seeds "$@" ;;
        coverage) show_coverage "$@" ;;
    esac
}

# Runs all targets, also after one has found a failure.
run_all() {
    local target failed=()
    for target in "$@"; do
        mkdir -p "fuzz/corpus/$target"
        echo "fuzzing $target for $seconds s"
        within $((seconds + BUILD_MAX_S)) "$CARGO" fuzz run --sanitizer none "$target" \
            "fuzz/corpus/$target" "fuzz/seeds/$target" -- -max_total_time="$seconds" || failed+=("$target")
    done
    if [ ${#failed[@]} -gt 0 ]; then
        echo "failed: ${failed[*]}; what they failed with is in fuzz/artifacts" >&2
        exit 1
    fi
}

add_seeds() {
    local target found all new
    for target in "$@"; do
        found=$scratch/$target.found all=$scratch/$target.all
        mkdir -p "$found" "$all"
        if [ -d "fuzz/corpus/$target" ]; then
            find "fuzz/corpus/$target" -type f -size "-$((SEED_MAX_BYTES + 1))c" -exec cp -t "$found" {} +
        fi
        cp "fuzz/seeds/$target"/* "$all"
        # An input is worth a seed when it reaches code that the seeds do not; that it goes through a loop more often is
        # not enough, or there would be hundreds of them.
        quietly within $((BUILD_MAX_S + 900)) "$CARGO" fuzz run --sanitizer none "$target" "$all" "$found" -- \
            -merge=1 -use_counters=0
        new=0
        for input in "$all"/*; do
            name=${input##*/}
            [ ! -e "fuzz/seeds/$target/$name" ] || continue
            # The fuzzer names an input by the SHA-1 of its bytes.
            cp "$input" "fuzz/seeds/$target/found-${name:0:12}"
            new=$((new + 1))
        done
        echo "$target: $new new seeds from $(find "$found" -type f | wc -l) inputs"
    done
}

show_coverage() {
    local target triple tools binary
    triple=$(rustc -vV | sed -n 's/^host: //p')
    tools=$(rustc --print sysroot)/lib/rustlib/$triple/bin
    if [ ! -x "$tools/llvm-cov" ]; then
        echo "coverage needs LLVM's tools: rustup component add llvm-tools" >&2
        exit 1
    fi
    for target in "$@"; do
        mkdir -p "fuzz/corpus/$target"
        quietly within $((BUILD_MAX_S + 900)) "$CARGO" fuzz coverage --sanitizer none \
            --target-dir "$BUILT/coverage" "$target" "fuzz/corpus/$target" "fuzz/seeds/$target"
        binary=$BUILT/coverage/$triple/release/$target
        "$tools/llvm-cov" export -format=lcov -instr-profile "fuzz/coverage/$target/coverage.profdata" "$binary" \
            >>"$scratch/lcov"
    done
    # A generic function is there once for each of its types, and each target has its own copy.
    awk -F '[:,]' -v root="$PWD/" '
        $1 == "SF" { file = substr($0, 4); ours = index(file, root "src/") == 1; sub(root, "", file) }
        ours && $1 == "FN" { place[$NF] = file ":" $2 }
        ours && $1 == "FNDA" { at = place[$3] ; entered[at] += $2; name[at] = $3; used[file] += $2 }
        END { for (at in entered) { split(at, parts, ":"); if (used[parts[1]]) print at, entered[at], name[at] } }
    ' "$scratch/lcov" | sort -t : -k 1,1 -k 2,2n >"$scratch/functions"
    echo "no input reaches these functions:"
    awk '$2 == 0 { print "  " $1 " " $3 }' "$scratch/functions" | c++filt | sed -E 's/\[[0-9a-f]+\]|::h[0-9a-f]{16}$//g'
    awk '{ all++; if ($2 > 0) reached++ }
        END { print reached " of " all " functions are reached in those files of src/ that are reached at all" }
    ' "$scratch/functions"
}

main "$@"
