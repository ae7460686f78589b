"""Backup chains for the benchmarks, made with QEMU's tools, in tmpfs if that is where they are put; and what
the benchmarks' command lines share."""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile

MIB = 1 << 20
CLUSTER = 64 * 1024
# 2023-11-14; one point an hour.
FIRST_POINT = 1700000000
# qemu-io holds a whole write in memory.
FULL_WRITE = 64 * MIB


def program(path):
    """A program for an option; a bench that begins without one may wait for it for ever."""
    path = os.path.abspath(path)
    if not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{path} is no program")
    return path


def parser(description, *, upstream=False):
    """Arguments that benchmarks share."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--fleecefs", default="target/release/fleecefs", type=program)
    found.add_argument("--dir", default="/dev/shm", help="where all that is needed is put (%(default)s)")
    found.add_argument("--json", help="write the figures to this file")
    if upstream:
        found.add_argument("--qmpbackup", required=True, help="upstream's program, with arguments if need be")
    return found


@contextlib.contextmanager
def workplace(args, name):
    """A folder of its own below --dir, which goes at the end."""
    work = tempfile.mkdtemp(prefix=f"bench-{name}-", dir=args.dir)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_json(args, figures):
    """Writes the figures where --json says."""
    if args.json:
        with open(args.json, "w") as out:
            json.dump(figures, out, indent=1)


def run(*command):
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def point_name(index, disk):
    level = "FULL" if index == 0 else "INC"
    return f"{level}-{FIRST_POINT + 3600 * index}-{disk}"


def create(path, size):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, size)


def write(path, writes):
    """Applies (offset, length, byte) writes in one process."""
    commands = []
    for offset, length, byte in writes:
        commands += ["-c", f"write -q -P {byte} {offset} {length}"]
    run("qemu-io", "-f", "qcow2", *commands, path)


def make_full(path, size):
    """A disk that is mostly filled: every sixteenth part stays a hole."""
    create(path, size)
    part = min(FULL_WRITE, size // 16)
    offsets = [offset for offset in range(0, size, part) if offset // part % 16 != 15]
    write(path, [(offset, part, 1 + i % 255) for i, offset in enumerate(offsets)])


def make_increment(path, size, clusters, seed):
    """What an incremental backup copies of a guest that wrote at random."""
    create(path, size)
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(size // CLUSTER), min(clusters, size // CLUSTER)))
    write(path, [(c * CLUSTER, CLUSTER, rng.randrange(1, 256)) for c in chosen])


def make_chain(directory, full, size, depth, clusters):
    """A chain of `depth` files; the FULL is a hard link to `full`. Returns the files in order."""
    disk = os.path.join(directory, "vda.qcow2")
    os.makedirs(disk)
    files = [os.path.join(disk, point_name(i, "vda.qcow2")) for i in range(depth)]
    os.link(full, files[0])
    for index, path in enumerate(files[1:], 1):
        make_increment(path, size, clusters, index * 1000 + depth)
    return files


def sparse_copy(data, path):
    """Writes only the pages of `data` that are not zero."""
    zero = bytes(4096)
    with open(path, "wb") as out:
        for at in range(0, len(data), 4096):
            page = data[at : at + 4096]
            if page != zero[: len(page)]:
                out.seek(at)
                out.write(page)
        out.truncate(len(data))


def templates(directory, size, count, clusters):
    """Bytes of `count` different small images of one virtual size."""
    images = []
    for index in range(count):
        path = os.path.join(directory, f"template{index}")
        make_increment(path, size, clusters, index)
        with open(path, "rb") as file:
            images.append(file.read())
        os.unlink(path)
    return images


def make_many(directory, disks, points, size, clusters=4):
    """`disks` disks of `points` points each, as many different files."""
    os.makedirs(directory)
    images = templates(directory, size, 4, clusters)
    for number in range(disks):
        name = f"disk{number:04}.qcow2"
        os.makedirs(os.path.join(directory, name))
        for index in range(points):
            sparse_copy(images[index % 4], os.path.join(directory, name, point_name(index, name)))
