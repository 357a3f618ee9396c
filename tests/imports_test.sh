#!/bin/bash
# Shows that tests/imports.sh refuses what it should and nothing else: breaks every rule in a copy of the tree, does next to
# each what is allowed, and compares the complaints with those that are due. Part of `make check`.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r ../src "$copy"
cd "$copy/src"

due=()
# Adds code to a file. What else is said is the complaint that is due: its end, behind the file and a colon.
add() {
    printf '%s\n' "$2" >>"$1"
    [ -z "${3:-}" ] || due+=("src/$1: $3")
}

# Layers: up, along one line, in braces over several lines, from code in the middle, and by the program.
add proto/wire.rs 'use crate::server::Config;' "'proto' must not name 'server', which is not below it"
add acl.rs 'use crate::command;' "'acl' must not name 'command', which is not below it"
add bitmap.rs $'use crate::{\n    work::{Op, Action},\n    sys as system,\n};' "'bitmap' must not name 'work', which is not below it"
due+=("src/bitmap.rs: 'bitmap' must not name 'sys', which is not below it" "src/bitmap.rs: a pure module names crate::sys")
add buffer.rs 'fn long() -> usize { crate::disk::OPS_MAX }' "'buffer' must not name 'disk', which is not below it"
add work.rs 'use crate::novelty::Novelty;' "names src/novelty.rs, which has no place"
add novelty.rs 'pub struct Novelty;' "'novelty' has no place; give it a line in the table of layers in lib.rs"
sed -i 's/^\/\/!  work .*/&\n\/\/!  nowhere   nothing/' lib.rs
due+=("there is no 'nowhere' in src/, but it has a place")

# Files of a folder: up to a sibling, up to mod.rs, down from mod.rs without `self`, and one without a place.
add event/slots.rs 'use super::wheel::Wheel;' "'slots' must not name 'wheel', which is not below it"
add proto/wire.rs 'use super::Promise;' "'wire' must not name 'mod', which is not below it"
add proto/server/tally.rs 'use super::super::client;' "'server' must not name 'client', which is not below it"
add sys/mod.rs 'use file::allocate;' "'mod' must not name 'file', which is not below it"
add event/novelty.rs 'use super::slots::Key;' "'novelty' has no place among the files of src/event; give it one in tests/imports.sh"
add proto/mod.rs 'mod novelty;'

# Pure modules.
add migrate/meter.rs 'use std::{io, time::Instant};' "a pure module names Instant std::time"
add migrate/mod.rs '// PURE, or nearly so'
due+=("src/migrate/mod.rs:$(wc -l <migrate/mod.rs): what is PURE is listed in tests/imports.sh, and says so at the beginning of its docs")
sed -i '1s/PURE: //' proto/mod.rs
due+=("src/proto/mod.rs: a pure module begins with '//! PURE: '")
sed -i '1s/^/\/\/! PURE: nothing happens here.\n/' remote/connect.rs
due+=("src/remote/connect.rs:1: what is PURE is listed in tests/imports.sh, and says so at the beginning of its docs")

# Unsafe code, and what only looks like it.
add remote/progress.rs 'fn read(at: *const u8) -> u8 { unsafe { *at } }' "unsafe code belongs in src/sys/"
add remote/transfer.rs '#[allow(unsafe_code)]' "unsafe code belongs in src/sys/"
add command.rs '// unsafe { } // use crate::server;'
add command.rs $'const TEXT: &str = "unsafe { use crate::server; \\" // \\\n    use crate::cli; {{{";'

# Size. What is not code does not count.
long=$(printf 'const A: u8 = 0;\n%.0s' $(seq 400))
add endpoint.rs "$long" "$(($(grep -c '^ *[^ /]' endpoint.rs) + 400)) lines of code, more than 400; split it along what it does"
add event/alarm.rs "$(printf '// one\n\n%.0s' $(seq 400))"
sed -i 's/^pub(super) struct Shared {/&\n'"$(printf '    a: u8,\\n%.0s' $(seq 11))"'/' server/shared.rs
due+=("src/server/shared.rs: Shared has $(sed -n '/^pub(super) struct Shared /,/^}/p' server/shared.rs | grep -c '^    [a-z].*: ') fields, more than 10")

# What only tests are compiled with may name anything, and hides nothing behind it.
add event/run_queue.rs $'#[cfg(test)]\nmod trials {\n    use crate::server::Config;\n    fn a() {}\n}'
add event/run_queue.rs $'#[cfg(test)]\nuse crate::cli;\nuse super::alarm::Alarm;' "'run_queue' must not name 'alarm', which is not below it"

printf 'imports: %s\n' "${due[@]}" | sort >"$copy/due"
if bash "$OLDPWD/imports.sh" .. 2>"$copy/said"; then
    echo "imports_test: a broken tree was taken" >&2
    exit 1
fi
sort "$copy/said" | diff "$copy/due" - || { echo "imports_test: other complaints than are due" >&2; exit 1; }
