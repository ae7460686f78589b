#!/bin/bash
# Builds the release and measures backup beside upstream's qmpbackup. Arguments go to backup.py;
# --qmpbackup names upstream's program, which is no part of this repository: clone abbbi/qmpbackup
# from GitHub, then
#
#   python3 -m venv venv && venv/bin/pip install ./qmpbackup
#   contrib/bench/backup.sh --qmpbackup venv/bin/qmpbackup

# shellcheck source=../lib/bench.sh
. "$(dirname "$0")/../lib/bench.sh"
measure backup qemu -- "$@"
