#!/bin/bash
# Holds the directions of the crate: imports go down only, the modules of one layer never name each other, the pure
# modules see no socket, file or clock, and unsafe code is in src/sys alone. Part of `make check`.
set -euo pipefail
cd "$(dirname "$0")/../src"

# Top down. A module may name those of the lines below its own.
layers=(
    "main"
    "cli"
    "server remote"
    "proto command acl migrate disk event logging endpoint"
    "work"
    "sys"
    "bitmap buffer"
)
pure="proto command acl migrate work bitmap"
impure='std::(fs|time|thread|process|env|os)\b|std::\{|\b(Tcp|Udp|Unix)(Stream|Listener|Socket|Datagram)\b|\bInstant\b|\bSystemTime\b|\bmio\b|\blibc\b|\bcrate::sys\b'

status=0
complain() {
    echo "imports: $*" >&2
    status=1
}

layer_of() {
    local depth
    for depth in "${!layers[@]}"; do
        if [[ " ${layers[depth]} " == *" $1 "* ]]; then
            echo "$depth"
        fi
    done
}

# The code of a file: comments gone, on one line, so that an import may be broken over several.
code_of() {
    sed -E 's://.*::' "$1" | tr -s '\n ' '  '
}

# What a file names of the crate: the first segment of each path that starts at the crate or goes up, also in braces.
named_by() {
    local root="crate|super"
    # The program is a crate of its own, and imports the library by its name.
    [ "$1" != main.rs ] || root=flexnbd
    code_of "$1" | grep -oE "\b($root)(::super)*::([a-z_]+|\{[^}]*\})" | sed -E 's/^([a-z]+::)+//' |
        grep -oE '(^|[{,] ?)[a-z_]+' | tr -d '{, ' | sort -u || true
}

while read -r file; do
    file=${file#./}
    module=${file%%/*}
    module=${module%.rs}
    # The crate root lists every module; the build script stands outside the crate.
    [[ $file == lib.rs || $file == build.rs ]] && continue

    layer=$(layer_of "$module")
    if [ -z "$layer" ]; then
        complain "src/$file: module '$module' has no layer; give it one in tests/imports.sh"
        continue
    fi
    for other in $(named_by "$file"); do
        below=$(layer_of "$other")
        if [ "$other" != "$module" ] && [ -n "$below" ] && [ "$below" -le "$layer" ]; then
            complain "src/$file: '$module' must not name '$other', which is not below it"
        fi
    done
    if [[ " $pure " == *" $module "* ]] && found=$(code_of "$file" | grep -oE "$impure" | sort -u | xargs); then
        complain "src/$file: a pure module names $found"
    fi
    if [ "$module" != sys ] && code_of "$file" | grep -qE '\bunsafe\b|allow\(unsafe_code\)'; then
        complain "src/$file: unsafe code belongs in src/sys"
    fi
done < <(find . -name '*.rs' | sort)

exit "$status"
