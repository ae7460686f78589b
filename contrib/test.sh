#!/bin/bash
# Installs what the tests need and is missing, then runs them all. The last line is the sum over
# cargo's test binaries: "N passed, N failed" and, where there are any, ", N skipped".
# Arguments go to cargo test. With CI set, a test whose tool is missing fails instead of skipping.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh
deps_all

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
# --show-output: a skipped test says so on its standard output, which is not shown otherwise.
cargo test --no-fail-fast "$@" -- --show-output </dev/null 2>&1 | tee "$log" || status=$?

# Backups once more with the oldest QEMU that is to be had: it has its own ways of going wrong.
if [ $# -eq 0 ]; then
    contrib/old-qemu.sh "${CARGO_TARGET_DIR:-target}/old-qemu" \
        cargo test --no-fail-fast --test backup_qemu --test beside --test between --test early_hash --test migration \
        --test odd_disks --test several_paths --test snapshot_load --test watermark \
        -- --show-output </dev/null 2>&1 |
        tee -a "$log" || { old=$?; [ "$old" = 4 ] || status=$old; }
fi

awk -v status="$status" '
    # test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s
    /^test result: / {
        for (i = 2; i <= NF; i++) {
            if ($i == "passed;") passed += $(i - 1)
            if ($i == "failed;") failed += $(i - 1)
            if ($i == "ignored;") skipped += $(i - 1)
        }
    }
    # What returned early is not what passed. (Each says it once, on a line of its own.)
    /^skipped: / { passed--; skipped++ }
    END {
        # Code that does not compile, or a test that took its whole binary down.
        if (status != 0 && failed == 0) failed = 1
        printf "%d passed, %d failed", passed, failed
        if (skipped > 0) printf ", %d skipped", skipped
        printf "\n"
        exit failed > 0
    }' "$log"
