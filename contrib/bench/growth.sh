#!/bin/bash
# Builds the release and measures how the time of each command grows with the number of files, and that of
# a search for data and holes with the size of the disk. Arguments go to growth.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=../lib/deps.sh
. contrib/lib/deps.sh
deps_rust
deps_build
deps_fuse
deps_bench
cargo build --release --quiet
exec python3 contrib/bench/growth.py --fleecefs "${CARGO_TARGET_DIR:-target}/release/fleecefs" "$@"
