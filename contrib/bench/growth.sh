#!/bin/bash
# Builds the release and measures how the time of each command grows with the number of files, and that of
# a search for data and holes with the size of the disk. Arguments go to growth.py.

# shellcheck source=../lib/bench.sh
. "$(dirname "$0")/../lib/bench.sh"
measure growth fuse -- "$@"
