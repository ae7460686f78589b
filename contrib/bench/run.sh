#!/bin/bash
# Installs what is missing, builds the release, and measures it beside QEMU's own FUSE export and beside
# what FUSE allows a server that just reads a file (examples/plain.rs).
# Arguments go to bench.py; --quick takes a minute, without it some ten.

# shellcheck source=../lib/bench.sh
. "$(dirname "$0")/../lib/bench.sh"
measure bench fuse qemu -- --plain "${CARGO_TARGET_DIR:-target}/release/examples/plain" "$@"
