#!/bin/bash
# Builds the release and measures INCs beside upstream's qmpbackup: many extents, and a long chain.
# Arguments go to increments.py; see backup.sh for upstream's program.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=../lib/deps.sh
. contrib/lib/deps.sh
deps_rust
deps_build
deps_bench
deps_qemu
cargo build --release --quiet
exec python3 contrib/bench/increments.py --fleecefs "${CARGO_TARGET_DIR:-target}/release/fleecefs" "$@"
