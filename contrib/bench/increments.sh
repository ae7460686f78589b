#!/bin/bash
# Builds the release and measures INCs beside upstream's qmpbackup: many extents, and a long chain.
# Arguments go to increments.py; see backup.sh for upstream's program.

# shellcheck source=../lib/bench.sh
. "$(dirname "$0")/../lib/bench.sh"
measure increments qemu -- "$@"
