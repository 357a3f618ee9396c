#!/bin/bash
# Holds the structure of src/, as part of `make check`:
#
# - Imports go down only, so there is no circle: of modules, by the layers at the head of lib.rs, and of the files of each
#   folder, by the lists below.
# - A PURE module says so, is listed here, and sees no socket, file or clock.
# - Unsafe code is in src/sys/ alone.
# - Files and the struct that everybody is lent stay small.
#
# What only tests are compiled with is left out. imports_test.sh shows that each rule can be broken and is held.
set -euo pipefail
export LC_ALL=C
tree=${1:-$(dirname "$0")/..}
cd "$tree/src"

# The files of each folder, top down: NAME stands for NAME.rs and for the folder NAME, mod for the mod.rs of the folder. A
# file names only what stands below it; what it takes from `super` itself stands in mod.rs.
declare -A folders=(
    [cli]="mod doors address args"
    [cli/args]="mod control proxy common values"
    [disk]="mod engine ring changes kernel verify hint zero pace sparse reads mark commit queue open image"
    [event]="mod alarm ready run_queue wheel slots"
    [migrate]="mod plan settle flush pace pause pass changes holes incoming mark meter"
    [proto]="mod client server outbox export error wire"
    [proto/client]="mod handshake unanswered account chunk cookies"
    [proto/server]="negotiation parting reading mod handshake write read reply step request unanswered inbox memory tally load stopwatch"
    [remote]="mod transfer progress connect"
    [server]="mod start apply commands metrics status reactor slot client control mirror upstream snapshot listener supervisor attempt trials offer dial change outage \
        mark shared backend gate quota grace admit timings complaints life inbound effect reason watch socket bind signals config"
    [server/client]="deadlines mod"
    [server/mirror]="facts mod"
    [server/upstream]="deadlines mod"
    [upstream]="mod ahead task dirty command"
    [sys]="ring pages memory passed file clone net mod"
)

pure="acl bitmap bucket command migrate proto upstream work"
impure='std::(fs|time|thread|process|env|os)\b|\b(Tcp|Udp|Unix)(Stream|Listener|Socket|Datagram)\b|\bInstant\b|\bSystemTime\b|\bmio\b|\blibc\b|\bcrate::sys\b'
CODE_MAX=400
SHARED_MAX=10

status=0
complain() {
    echo "imports: $*" >&2
    status=1
}

# The code of a file: no comments, no text of strings, no blank lines, nothing that only tests are compiled with.
code_of() {
    awk '
        # Cuts comments and the text of strings; a string may go on in the next line.
        function stripped(line,    out, token) {
            out = in_string ? "\"" : ""
            while (line != "") {
                if (in_string) {
                    if (!match(line, /^([^"\\]|\\.)*"/)) { return out }
                    line = substr(line, RLENGTH + 1)
                    in_string = 0
                } else if (match(line, /\/\/|"|\047(\\.|[^\047\\])\047/)) {
                    out = out substr(line, 1, RSTART - 1)
                    token = substr(line, RSTART, RLENGTH)
                    line = substr(line, RSTART + RLENGTH)
                    if (token == "//") { return out }
                    if (token == "\"") { in_string = 1 }
                } else {
                    return out line
                }
            }
            return out
        }
        { line = stripped($0) }
        # What is for tests ends in a line of its own indentation: with its brace, or at once.
        match(line, /^ *#\[cfg\(test\)\]/) { indent = line; sub(/#.*/, "", indent); in_test = 1; next }
        in_test {
            if (match(line, "^" indent "(}|[^ }].*[;,}]$)")) { in_test = 0 }
            next
        }
        line ~ /[^ ]/ { print line }
    ' "$1"
}

# Every path that code names, with braces resolved: `use a::{b, c::{d, e}};` is a::b, a::c::d and a::c::e.
paths_of() {
    tr '\n' ' ' | sed -E 's/ as [A-Za-z_0-9]+//g' | awk '{
        text = $0
        while (match(text, /[A-Za-z_][A-Za-z_0-9]*(::[A-Za-z_][A-Za-z_0-9]*)*(::\{)?|[{}]/)) {
            token = substr(text, RSTART, RLENGTH)
            text = substr(text, RSTART + RLENGTH)
            if (token == "}") { depth-- }
            else if (token ~ /\{$/) { depth++; prefix[depth] = prefix[depth - 1] substr(token, 1, length(token) - 1) }
            else { print prefix[depth] token }
        }
    }' | sort -u
}

# The modules of the crate, top down, a line each for those that may not name each other: the first table of lib.rs, whose
# columns are names and what they are, at least two spaces apart.
layers() {
    awk '/^\/\/! The layers, top down/ { found = 1 }
        found && /^\/\/! ```$/ { exit }
        in_table { sub(/^\/\/! */, ""); n = split($0, columns, /  +/); for (i = 1; i <= n; i += 2) printf "%s ", columns[i]; print "" }
        found && /^\/\/! ```text$/ { in_table = 1 }' lib.rs
}

# Where each name stands: rank[folder/name], from the top. The crate itself is the folder "".
declare -A rank
place() {
    local folder=$1 depth=$2 name
    for name in $3; do
        rank[$folder/$name]=$depth
        [ -e "${folder:+$folder/}$name.rs" ] || [ -e "${folder:+$folder/}$name" ] ||
            complain "there is no '$name' in src/$folder, but it has a place"
    done
}
depth=0
while read -r names; do
    place "" $((depth++)) "$names"
done < <(layers)
[ "$depth" -gt 0 ] || complain "lib.rs has no table of layers"
for folder in "${!folders[@]}"; do
    depth=0
    for name in ${folders[$folder]}; do
        place "$folder" $((depth++)) "$name"
    done
done

# The file that a path of FILE leads to; nothing for what is not of this crate. Sets `target`.
find_target() {
    local file=$1 path=$2 dir segment
    target=
    dir=${file%/*}
    [ "$dir" != "$file" ] || dir=
    case $path in
        crate::* | flexnbd::*)
            dir=
            path=${path#*::}
            ;;
        super::*)
            [[ $file != */mod.rs ]] || dir=$(dirname "$dir")
            path=${path#*::}
            while [[ $path == super::* ]]; do
                dir=$(dirname "$dir")
                path=${path#*::}
            done
            [ "$dir" != . ] || dir=
            ;;
        # The modules that a mod.rs, lib.rs or main.rs declares need no such beginning.
        *::*)
            [[ $file == */mod.rs ]] || return 0
            segment=${path%%::*}
            [ -e "$dir/$segment.rs" ] || [ -d "$dir/$segment" ] || return 0
            ;;
        *) return 0 ;;
    esac
    for segment in ${path//::/ }; do
        if [ -f "${dir:+$dir/}$segment.rs" ]; then
            target=${dir:+$dir/}$segment.rs
            return 0
        fi
        [ -d "${dir:+$dir/}$segment" ] || break
        dir=${dir:+$dir/}$segment
    done
    target=${dir:+$dir/mod.rs}
    target=${target:-lib.rs}
}

# Complains unless FILE may name TARGET: where their paths part, the target stands below.
check_import() {
    local from=$1 to=$2 folder=
    while [[ $from == */* && $to == */* && ${from%%/*} == "${to%%/*}" ]]; do
        folder=${folder:+$folder/}${from%%/*}
        from=${from#*/}
        to=${to#*/}
    done
    from=${from%%/*} to=${to%%/*}
    from=${from%.rs} to=${to%.rs}
    [ "$from" != "$to" ] || return 0
    if [ -z "${rank[$folder/$to]:-}" ]; then
        complain "src/$1: names src/$2, which has no place"
    elif [ -n "${rank[$folder/$from]:-}" ] && [ "${rank[$folder/$to]}" -le "${rank[$folder/$from]}" ]; then
        complain "src/$1: '$from' must not name '$to', which is not below it"
    fi
}

# The files that only tests are compiled with: `mod NAME;` behind `#[cfg(test)]`.
for_tests=$(find . -name mod.rs | sed 's:^\./::' | while read -r file; do
    { grep -A1 "^#\[cfg(test)\]$" "$file" || true; } | sed -nE "s:^mod ([a-z_]+);$:${file%/*}/\1.rs:p"
done)

while read -r file; do
    module=${file%%/*}
    module=${module%.rs}
    # The root of the crate only lists what there is; the build script and its module stand outside.
    [[ $file != lib.rs && $file != build.rs && $file != manual.rs && $'\n'$for_tests$'\n' != *$'\n'$file$'\n'* ]] || continue
    code=$(code_of "$file")
    paths=$(paths_of <<<"$code")

    folder=${file%/*}
    [ "$folder" != "$file" ] || folder=
    name=${file##*/}
    name=${name%.rs}
    if [ -z "${rank[/$module]:-}" ]; then
        complain "src/$file: '$module' has no place; give it a line in the table of layers in lib.rs"
    elif [[ -n $folder && -z ${rank[$folder/$name]:-} ]]; then
        complain "src/$file: '$name' has no place among the files of src/$folder; give it one in tests/imports.sh"
    fi

    declare -A targets=()
    while read -r path; do
        find_target "$file" "$path"
        [ -z "$target" ] || targets[$target]=1
    done <<<"$paths"
    for target in "${!targets[@]}"; do
        check_import "$file" "$target"
    done

    if [[ " $pure " == *" $module "* ]] && found=$(grep -oE "$impure" <<<"$paths" | sort -u | xargs) && [ -n "$found" ]; then
        complain "src/$file: a pure module names $found"
    fi
    if [ "$module" != sys ] && grep -qE '\bunsafe(_code)?\b' <<<"$paths"; then
        complain "src/$file: unsafe code belongs in src/sys/"
    fi
    lines=$(wc -l <<<"$code")
    if [[ $lines -gt $CODE_MAX ]]; then
        complain "src/$file: $lines lines of code, more than $CODE_MAX; split it along what it does"
    fi
done < <(find . -name '*.rs' | sed 's:^\./::' | sort)

# A pure module begins with the word, and no other line of src/ claims it.
for module in $pure; do
    root=$module.rs
    [ -f "$root" ] || root=$module/mod.rs
    head -1 "$root" | grep -q '^//! PURE: ' || complain "src/$root: a pure module begins with '//! PURE: '"
done
while IFS=: read -r file line text; do
    module=${file%%/*}
    if [[ $line != 1 || $text != "//! PURE: "* || " $pure " != *" ${module%.rs} "* ]]; then
        complain "src/$file:$line: what is PURE is listed in tests/imports.sh, and says so at the beginning of its docs"
    fi
done < <(grep -rn --include='*.rs' '\bPURE\b' . | sed 's:^\./::' | grep -v '^lib.rs:')

fields=$(code_of server/shared.rs | awk '/struct Shared / { inside = 1; next } /^}/ { inside = 0 } inside && /^    [a-z].*: / { n++ } END { print n + 0 }')
[ "$fields" -gt 0 ] || complain "src/server/shared.rs: there is no struct Shared"
[ "$fields" -le "$SHARED_MAX" ] || complain "src/server/shared.rs: Shared has $fields fields, more than $SHARED_MAX"

exit "$status"
