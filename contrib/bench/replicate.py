#!/usr/bin/env python3
"""How long a second copy takes: `fleecefs replicate` beside `rsync -aS`, from empty and with one new point.

usage: replicate.py FLEECEFS SOURCE FOLDER    (FOLDER: where the copies go, emptied afterwards)
"""

import os
import shutil
import subprocess
import sys
import time


def timed(args):
    """Seconds that a command takes, with what it wrote on its disk."""
    os.sync()
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
    print(f"{'':24} {'all':>8} {'one new':>8} {'nothing':>8}  (seconds)")
    for name, command in tools.items():
        to = os.path.join(folder, "copy")
        shutil.rmtree(to, ignore_errors=True)
        whole = timed(command(to))
        for path in newest(to):
            if os.path.exists(path):
                os.remove(path)
        one, nothing = timed(command(to)), timed(command(to))
        print(f"{name:24} {whole:8.2f} {one:8.2f} {nothing:8.2f}")
        shutil.rmtree(to)


if __name__ == "__main__":
    main()
