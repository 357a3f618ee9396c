# What the scripts share that show that tests find a broken program. To be read by bash, in the folder of the project.
set -euo pipefail
export LC_ALL=C

# Goes to a copy of the project, which is gone at the end. What others have compiled is compiled once.
enter_copy() {
    local target=${CARGO_TARGET_DIR:-$PWD/target}/teeth
    copy=$(mktemp -d "${TMPDIR:-/tmp}/flexnbd-teeth-XXXXXX")
    trap 'rm -rf "$copy"' EXIT
    trap 'exit 1' INT TERM HUP
    cp -r Cargo.toml Cargo.lock README.md .cargo src tests "$copy"
    cd "$copy"
    export CARGO_TARGET_DIR=$target RUST_BACKTRACE=0
}

# break_copy WHAT TEST [FILE PERL]...: applies each substitution to its file of src, and compiles the test. Ends the script
# when the code to be broken is not there any more.
break_copy() {
    local what=$1 test=$2
    shift 2
    cp -r src whole
    while [ $# -gt 0 ]; do
        cp "src/$1" before
        perl -0pi -e "$2" "src/$1"
        if cmp -s "src/$1" before; then
            echo "teeth: $what: src/$1 has changed, so that this breaks nothing" >&2
            exit 1
        fi
        shift 2
    done
    timeout 1800 cargo test --locked --quiet --test "$test" --no-run 2>log || {
        cat log >&2
        echo "teeth: $what: it does not compile" >&2
        exit 1
    }
}

mend_copy() {
    rm -rf src
    mv whole src
}
