#!/bin/bash
# Builds the release and measures restore beside qemu-img, and verify beside b3sum. Arguments go to
# restore.py.

# shellcheck source=../lib/bench.sh
. "$(dirname "$0")/../lib/bench.sh"
measure restore qemu filesystems b3sum -- "$@"
