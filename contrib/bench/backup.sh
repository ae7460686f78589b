#!/bin/bash
# Builds the release and measures backup beside upstream's qmpbackup. Arguments go to backup.py;
# --qmpbackup names upstream's program, which is no part of this repository: clone abbbi/qmpbackup
# from GitHub, then
#
#   python3 -m venv venv && venv/bin/pip install ./qmpbackup
#   contrib/bench/backup.sh --qmpbackup venv/bin/qmpbackup
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=../lib/deps.sh
. contrib/lib/deps.sh
deps_rust
deps_build
deps_bench
deps_qemu
cargo build --release --quiet
exec python3 contrib/bench/backup.py --fleecefs "${CARGO_TARGET_DIR:-target}/release/fleecefs" "$@"
