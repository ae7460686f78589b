#!/usr/bin/env python3
"""How long a second copy takes: `fleecefs replicate` beside `rsync -aS`, from empty, with one new point, and with none.

usage: replicate.py FLEECEFS SOURCE FOLDER    (FOLDER: where the copies go, in a folder of their own that is removed)

Each number is the median of three rounds, in turn, with what was written on its disk. Before each command the page
cache forgets both directories (as far as the system does so when asked), so that none reads what another has read.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 3


def forget(folder):
    """Has the page cache forget the files of a folder."""
    for path, _, names in os.walk(folder):
        for name in names:
            full = os.path.join(path, name)
            if os.path.islink(full):
                continue
            fd = os.open(full, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def timed(args, *folders):
    """Seconds that a command takes, with what it wrote on its disk."""
    os.sync()
    for folder in folders:
        forget(folder)
    start = time.monotonic()
    subprocess.run(args, check=True, stdout=subprocess.DEVNULL)
    os.sync()
    return time.monotonic() - start


def newest(source):
    """The image that was made last, by the time in its name, and its manifest."""
    images = []
    for folder, _, names in os.walk(source):
        for name in names:
            parts = name.split("-")
            if not folder.endswith(".fleecefs") and len(parts) > 2 and parts[1].isdigit():
                images.append((int(parts[1]), folder, name))
    if not images:
        sys.exit(f"{source}: no images with a time in their names")
    _, folder, name = max(images)
    return os.path.join(folder, name), os.path.join(folder, ".fleecefs", name + ".json")


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    program, source, folder = sys.argv[1:]
    tools = {
        "fleecefs replicate": lambda to: [program, "-q", "replicate", source, to],
        "rsync -aS": lambda to: ["rsync", "-aS", source.rstrip("/") + "/", to],
    }
    os.makedirs(folder, exist_ok=True)
    times = {name: ([], [], []) for name in tools}
    with tempfile.TemporaryDirectory(prefix="replicate-", dir=folder) as own:
        to = os.path.join(own, "copy")
        for _ in range(ROUNDS):
            for name, command in tools.items():
                whole, one, nothing = times[name]
                whole.append(timed(command(to), source))
                for path in newest(to):
                    if os.path.exists(path):
                        os.remove(path)
                one.append(timed(command(to), source, to))
                nothing.append(timed(command(to), source, to))
                shutil.rmtree(to)
    print(f"{'':24} {'all':>8} {'one new':>8} {'nothing':>8}  (seconds)")
    for name, columns in times.items():
        print(f"{name:24} " + " ".join(f"{statistics.median(c):8.2f}" for c in columns))


if __name__ == "__main__":
    main()
