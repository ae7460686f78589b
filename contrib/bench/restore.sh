#!/bin/bash
# Builds the release and measures restore beside qemu-img. Arguments go to restore.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=../lib/deps.sh
. contrib/lib/deps.sh
deps_rust
deps_build
deps_qemu
deps_filesystems
deps_bench
cargo build --release --quiet
exec python3 contrib/bench/restore.py --fleecefs "${CARGO_TARGET_DIR:-target}/release/fleecefs" "$@"
