#!/bin/bash
# Installs what is missing, builds the release, and measures it beside QEMU's own FUSE export and beside
# what FUSE itself allows (examples/zeros.rs).
# Arguments go to bench.py; --quick takes a minute, without it some ten.

# shellcheck source=../lib/bench.sh
. "$(dirname "$0")/../lib/bench.sh"
measure bench fuse qemu -- --zeros "${CARGO_TARGET_DIR:-target}/release/examples/zeros" "$@"
