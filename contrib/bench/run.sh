#!/bin/bash
# Installs what is missing, builds the release, and measures it beside QEMU's own FUSE export and beside
# what FUSE itself allows (examples/zeros.rs).
# Arguments go to bench.py; --quick takes a minute, without it some ten.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=../lib/deps.sh
. contrib/lib/deps.sh
deps_rust
deps_build
deps_fuse
deps_bench
deps_qemu
cargo build --release --quiet --bins --example zeros
exec python3 contrib/bench/bench.py --fleecefs "${CARGO_TARGET_DIR:-target}/release/fleecefs" \
    --zeros "${CARGO_TARGET_DIR:-target}/release/examples/zeros" "$@"
