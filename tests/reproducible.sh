#!/bin/bash
# Builds the program twice, in two folders that share nothing but the packages, and compares. A path of this machine in it would
# differ between the two, or is found in what is printable.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Both are copied first: somebody may work on the sources meanwhile.
for copy in one another-one; do
    mkdir "$folder/$copy"
    cp -r Cargo.toml Cargo.lock Makefile README.md .cargo src tests "$folder/$copy/"
done
for copy in one another-one; do
    env -u CARGO_TARGET_DIR make -C "$folder/$copy"
done
cmp "$folder/one/target/release/flexnbd" "$folder/another-one/target/release/flexnbd"
for path in "$folder" "$PWD" "${CARGO_HOME:-$HOME/.cargo}" "$HOME/"; do
    if grep -aqF -- "$path" "$folder/one/target/release/flexnbd"; then
        echo "error: the program names $path" >&2
        exit 1
    fi
done
echo "both are $(sha256sum <"$folder/one/target/release/flexnbd" | cut -d' ' -f1)"
