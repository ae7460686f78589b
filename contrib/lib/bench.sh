# shellcheck shell=bash
# For the scripts of contrib/bench: measure SCRIPT [NEEDS...] -- [ARGUMENTS...] installs what is missing,
# builds the release and runs contrib/bench/SCRIPT.py on it. NEEDS are names of deps_... in deps.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=deps.sh
. contrib/lib/deps.sh

measure() {
    local script=$1
    shift
    deps_rust
    deps_build
    deps_bench
    until [ "$1" = -- ]; do
        "deps_$1"
        shift
    done
    shift
    # Apart: what examples are built with, the hooks for tests, is not what is measured.
    cargo build --release --quiet --examples
    cargo build --release --quiet --bins
    exec python3 "contrib/bench/$script.py" --fleecefs "${CARGO_TARGET_DIR:-target}/release/fleecefs" "$@"
}
