#!/bin/bash
# Fuzzes every target with the address sanitizer for SECONDS_EACH (default 240) seconds, from seeds made
# by seeds.py. Ends at the first finding. Needs cargo-fuzz (cargo install cargo-fuzz); works with a stable
# compiler.
set -euo pipefail
cd "$(dirname "$0")"
: "${FLEECEFS:?the fleecefs program, for seeds}"
python3 seeds.py
export RUSTC_BOOTSTRAP=1
for target in ${TARGETS:-manifest qmp folder qcow2 fold vma stream name files}; do
    echo "=== $target"
    mkdir -p "corpus/$target"
    log=$(mktemp)
    cargo fuzz run --fuzz-dir . -s address "$target" -- \
        -max_total_time="${SECONDS_EACH:-240}" -rss_limit_mb=2048 -max_len=262144 -timeout=30 \
        -print_final_stats=1 >"$log" 2>&1 || { tail -40 "$log"; echo "$target: see $log"; exit 1; }
    grep -E "^stat::(number|peak)" "$log"
    rm "$log"
done
