#!/usr/bin/env python3
"""Measures reads through `fleecefs mount` beside qemu-storage-daemon's FUSE export of the same chain.

Both serve the same files, in tmpfs, and are measured turn about, for some rounds; so is the chain's FULL
as a plain file by a server that does nothing but read it (--plain: one pread and one reply for each read,
with the same settings of fuser, threads and buffers), which is what FUSE allows. What counts is the median
over the rounds of ours/theirs, and of ours/FUSE: a noisy machine disturbs all. Prints a table
(to standard output) and writes JSON where --json says.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import chains

MIB = chains.MIB
# What the project promises: metric, depth, least ratio ours/theirs.
PROMISES = [
    ("seq 1M direct", 10, 2.0),
    ("seq 1M direct", 200, 10.0),
    ("rand 4k direct, 1 job", 10, 2.0),
    ("rand 4k direct, 1 job", 200, 20.0),
    ("rand 4k direct, 8 jobs", 10, 3.0),
    ("buffered, first read", 10, 2.0),
]
BUFFERED = ["buffered, first read", "buffered, second read"]
METRICS = [
    *BUFFERED,
    "seq 1M direct",
    "rand 4k direct, 1 job",
    "rand 4k direct, 8 jobs",
]
# Eight readers on the newest eight points of one chain, of which theirs serves one.
EIGHT = ["seq 1M direct, 8 points", "rand 4k direct, 8 points"]
FUSE_SHARE = 0.9  # of what FUSE allows, of each direct read
WRITABLE_SHARE = 0.95  # of a plain mount, where nothing was written
BEFORE_SHARE = 0.97  # of another build, where nothing is to become slower
DEPTH_RATIO = 0.8  # ours, deepest chain over a single file
SECOND_READ_RATIO = 0.9  # over a raw file in the page cache
PEAK_MIB = 100
MOUNT_365_SECONDS = 0.5
LIST_10000_SECONDS = 2.0


def wait_until(condition, what, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"bench: {what}: process ended with {process.returncode}")
        if time.monotonic() > end:
            raise SystemExit(f"bench: {what}: not ready after {seconds} s")
        time.sleep(0.01)


def end(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def peak_mib(process):
    """The most memory that a server has had: of the process and of those that it started, since `fleecefs
    mount` serves from a child without privileges."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        pids = [process.pid, *map(int, children.read().split())]
    return sum(peak_kib(pid) for pid in pids) / 1024


def peak_kib(pid):
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1])


@contextlib.contextmanager
def ours(args, files, work, name="mnt", options=(), program=None):
    """The chain's newest point through `fleecefs mount`: yields its path and the process."""
    mount_point = os.path.join(work, name)
    os.makedirs(mount_point, exist_ok=True)
    backups = os.path.dirname(os.path.dirname(files[0]))
    process = subprocess.Popen(
        [program or args.fleecefs, "mount", "--foreground", *options, backups, mount_point]
    )
    point = os.path.join(mount_point, "vda.qcow2", os.path.basename(files[-1]) + ".raw")
    try:
        wait_until(lambda: os.path.exists(point), "fleecefs mount", process)
        yield point, process
    finally:
        end(process)


@contextlib.contextmanager
def writable(args, files, work):
    """The same through `fleecefs mount --writable`, after the last 4 KiB were written to."""
    with ours(args, files, work, "mnt-writable", ["--writable"]) as (point, process):
        with open(point, "r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(bytes(4096))
        yield point, process


def before(args, files, work):
    """The same through another build of the program (--before)."""
    return ours(args, files, work, name="mnt-before", program=args.before)


@contextlib.contextmanager
def theirs(_args, files, work):
    """The same point through qemu-storage-daemon: one node per file, `backing` set by hand."""
    point = os.path.join(work, "export.raw")
    open(point, "w").close()
    command = ["qemu-storage-daemon"]
    for index, path in enumerate(files):
        node = {
            "driver": "qcow2",
            "node-name": f"n{index}",
            "read-only": True,
            "file": {"driver": "file", "filename": path},
            "backing": f"n{index - 1}" if index else None,
        }
        command += ["--blockdev", json.dumps(node)]
    command += ["--export", f"type=fuse,id=e,node-name=n{len(files) - 1},mountpoint={point}"]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: os.path.getsize(point) > 0, "qemu-storage-daemon", process)
        yield point, process
    finally:
        end(process)
        subprocess.run(["umount", "-q", point], check=False)


@contextlib.contextmanager
def plain(args, files, work):
    """The FULL's own bytes as files of the disk's size, with the settings of a mount: yields the first and
    the process."""
    mount_point = os.path.join(work, "plain")
    os.makedirs(mount_point, exist_ok=True)
    process = subprocess.Popen([args.plain, mount_point, files[0], str(args.size_mib * MIB)])
    try:
        wait_until(lambda: os.path.ismount(mount_point), "plain", process)
        with contextlib.suppress(OSError), open(read_ahead(mount_point), "w") as setting:
            setting.write("4096")  # as a mount does
        yield os.path.join(mount_point, "0"), process
    finally:
        subprocess.run(["umount", "-q", mount_point], check=False)
        end(process)


def read_ahead(mount_point):
    device = os.stat(mount_point).st_dev
    return f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"


def eight_points(who, path, files):
    """The files that eight readers read."""
    folder = os.path.dirname(path)
    if who == "fuse":
        return [os.path.join(folder, str(i)) for i in range(8)]
    names = [os.path.basename(file) + ".raw" for file in files[-8:]]
    return [os.path.join(folder, names[i % len(names)]) for i in range(8)]


def fio(paths, size, seconds, *options):
    # In milliseconds: fio takes "0.3" for none at all.
    command = [
        "fio", f"--size={size}", "--readonly",
        "--ioengine=psync", "--direct=1", "--time_based", f"--runtime={seconds * 1000:.0f}ms",
        "--ramp_time=300ms", "--group_reporting", "--output-format=json", *options,
    ]  # fmt: skip
    for number, path in enumerate(paths):
        command += [f"--name=read{number}", f"--filename={path}"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    # fio may print notes before its JSON.
    read = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]["read"]
    return read["bw_bytes"] / 1e6, read["iops"]


def buffered(path, length):
    """MB/s of one dd through the page cache."""
    begin = time.monotonic()
    command = ["dd", f"if={path}", "of=/dev/null", "bs=1M", f"count={length // MIB}"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return length / 1e6 / (time.monotonic() - begin)


def buffered_reads(server, args, files, work):
    """MB/s of a buffered read through a fresh mount, and of the next, which the page cache serves. A mount
    of its own for each round: where its pages lie in memory counts for more than whose they are."""
    length = min(args.size_mib, args.buffered_mib) * MIB
    with server(args, files, work) as (path, _):
        first = buffered(path, length)
        return first, max(buffered(path, length) for _ in range(2))


def warm_figure(metric, path, args, eight=()):
    """One figure of a mount that has been read before."""
    size = args.size_mib * MIB
    paths = eight if metric in EIGHT else [path]
    if metric.startswith("seq 1M direct"):
        return fio(paths, size, args.seconds, "--rw=read", "--bs=1M")[0]
    jobs = 8 if metric.endswith("8 jobs") else 1
    options = ["--rw=randread", "--bs=4k", f"--numjobs={jobs}", "--norandommap", "--randrepeat=0"]
    return fio(paths, size, args.seconds, *options)[1]


def same_bytes(args, files, work):
    """A fast wrong answer is worth nothing: both must serve the same bytes."""
    with ours(args, files, work) as (mine, _), theirs(args, files, work) as (other, _):
        length = min(args.size_mib, 1024) * MIB
        return subprocess.run(["cmp", "-n", str(length), mine, other], check=False).returncode == 0


@contextlib.contextmanager
def raw_files(args, work):
    """Raw files of the length that dd reads: in tmpfs, whose pages are as small as FUSE's, and on a
    disk's file system, which may have larger ones. Both are in the page cache. Yields {where: path}."""
    length = min(args.size_mib, args.buffered_mib) * MIB
    paths = {"tmpfs": os.path.join(work, "raw"), "disk": os.path.join(args.raw_dir, "fleecefs-bench.raw")}
    try:
        block = os.urandom(MIB)
        for path in paths.values():
            with open(path, "wb") as file:
                for _ in range(length // MIB):
                    file.write(block)
        yield paths
    finally:
        for path in paths.values():
            os.unlink(path)


def second_read(args, files, work, raw):
    """Ours, from the page cache, over each raw file: {where: ratio}."""
    length = min(args.size_mib, args.buffered_mib) * MIB
    with ours(args, files, work) as (path, _):
        best = max(buffered(path, length) for _ in range(4))
        return {where: best / max(buffered(p, length) for _ in range(3)) for where, p in raw.items()}


def turn_about(servers, number):
    """Who goes first changes from round to round."""
    return list(servers.items())[:: 1 if number % 2 == 0 else -1]


def measure_depth(args, servers, files, work):
    """figures[who][metric] = one figure per round. The two measurements of a pair are seconds apart,
    so that what else the machine does hits both."""
    figures = {who: {metric: [] for metric in METRICS} for who in servers}
    for who in servers.keys() - {"theirs"}:
        figures[who] |= {metric: [] for metric in EIGHT}
    for number in range(args.rounds):
        for who, server in turn_about(servers, number):
            for metric, figure in zip(BUFFERED, buffered_reads(server, args, files, work)):
                figures[who][metric].append(figure)
    with contextlib.ExitStack() as stack:
        mounts = {w: stack.enter_context(s(args, files, work)) for w, s in servers.items()}
        for metric in METRICS[2:] + EIGHT:
            for number in range(args.rounds):
                for who, (path, _) in turn_about(mounts, number):
                    if metric in figures[who]:
                        eight = eight_points(who, path, files)
                        figures[who][metric].append(warm_figure(metric, path, args, eight))
        for who, (_, process) in mounts.items():
            figures[who]["peak MiB"] = [peak_mib(process)]
    return figures


def pair_ratios(args, pair, work):
    """The first over the second of two mounts, {name: (server, files)}: {metric: ratio}. Measured turn about."""
    folders = {name: os.path.join(work, f"pair-{name}") for name in pair}
    for folder in folders.values():
        os.makedirs(folder, exist_ok=True)
    figures = {name: {metric: [] for metric in METRICS} for name in pair}
    for number in range(args.rounds):
        for name, (server, files) in turn_about(pair, number):
            for metric, figure in zip(BUFFERED, buffered_reads(server, args, files, folders[name])):
                figures[name][metric].append(figure)
    with contextlib.ExitStack() as stack:
        mounts = {n: stack.enter_context(s(args, f, folders[n]))[0] for n, (s, f) in pair.items()}
        for metric in METRICS[2:]:
            for number in range(args.rounds):
                for name, path in turn_about(mounts, number):
                    figures[name][metric].append(warm_figure(metric, path, args))
    first, second = figures.values()
    return {metric: ratio(first[metric], second[metric]) for metric in METRICS}


def compared(args, files_by_depth, work, out):
    """Two of our mounts turn about: with --writable (and nothing written) and without; or this program and
    another build of it."""
    if args.writable:
        pair, what, least = {"writable": writable, "plain": ours}, "writable / plain mount", WRITABLE_SHARE
    else:
        pair, what, least = {"now": ours, "before": before}, "now / before", BEFORE_SHARE
    for depth, files in files_by_depth.items():
        servers = {name: (server, files) for name, server in pair.items()}
        for metric, value in pair_ratios(args, servers, work).items():
            promise(out, f"{what}, depth {depth}: {metric}", value, least, True)


def measure(args, files_by_depth, work):
    """results[depth][who][metric] = one figure per round."""
    servers = {"ours": ours, "theirs": theirs}
    if args.only:
        servers = {args.only: servers[args.only]}
    if os.path.exists(args.plain):
        servers["fuse"] = plain
    else:
        print(f"bench: no {args.plain}: what FUSE allows is not measured", file=sys.stderr)
    results = {}
    for depth, files in files_by_depth.items():
        results[depth] = measure_depth(args, servers, files, work)
        print(f"bench: depth {depth} done", file=sys.stderr)
    return results


def timed(*command):
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def mount_many(args, work):
    """Seconds until 365 points of a 1 TiB disk are mounted, from the command to its return."""
    directory, mount_point = os.path.join(work, "year"), os.path.join(work, "mnt")
    chains.make_many(directory, 1, 365, 1 << 40)
    os.makedirs(mount_point, exist_ok=True)
    times = []
    for _ in range(args.rounds):
        times.append(timed(args.fleecefs, "mount", directory, mount_point))
        found = len([n for n in os.listdir(mount_point + "/disk0000.qcow2") if "C-" in n or "L-" in n])
        timed(args.fleecefs, "umount", mount_point)
        if found != 365:
            raise SystemExit(f"bench: {found} of 365 points are mounted")
    shutil.rmtree(directory)
    return statistics.median(times)


def list_many(args, work):
    """Seconds of `list` over 10,000 point files."""
    directory = os.path.join(work, "many")
    chains.make_many(directory, 100, 100, 1 << 30)
    times = [timed(args.fleecefs, "list", directory) for _ in range(args.rounds)]
    shutil.rmtree(directory)
    return statistics.median(times)


def ratio(mine, other):
    return statistics.median(a / b for a, b in zip(mine, other))


def table(results, out):
    """Prints the medians of each metric and depth, with the median of the rounds' ratios."""
    promised = {(metric, depth): least for metric, depth, least in PROMISES}
    out["ratios"] = []
    head = f"{'':24} {'depth':>5} {'ours':>10} {'theirs':>10} {'FUSE':>10} {'/theirs':>7} {'/FUSE':>6}"
    print(head + "  promised")
    for depth, whos in results.items():
        for metric in next(iter(whos.values())):
            there = {who: values[metric] for who, values in whos.items() if metric in values}
            medians = {who: statistics.median(values) for who, values in there.items()}
            row = {"metric": metric, "depth": depth, **medians}
            order = ("ours", "theirs", "fuse")
            cells = [f"{medians[w]:10.0f}" if w in medians else " " * 10 for w in order]
            verdict = " " * 7
            if "ours" in there and "theirs" in there:
                row["ratio"] = ratio(there["ours"], there["theirs"])
                verdict = f"{row['ratio']:7.2f}"
            if "ours" in there and "fuse" in there and metric != "peak MiB":
                row["of fuse"] = ratio(there["ours"], there["fuse"])
                verdict += f" {row['of fuse']:6.2f}"
            if "ratio" in row:
                least = promised.get((metric, depth))
                if least:
                    row |= {"promised": least, "kept": row["ratio"] >= least}
                    verdict += f"  >= {least:g} {'ok' if row['kept'] else 'MISSED'}"
            print(f"{metric:24} {depth:5} {' '.join(cells)} {verdict}")
            out["ratios"].append(row)


def promise(out, name, value, limit, at_least):
    kept = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"{name:62} {value:8.2f}  {sign} {limit:g} {'ok' if kept else 'MISSED'}")
    out["others"].append({"metric": name, "value": value, "promised": limit, "kept": kept})


def other_promises(args, results, files, work, out):
    """Promises that are not a ratio to the other server."""
    out["others"] = []
    if args.only == "theirs":
        return
    for row in out["ratios"]:
        if "of fuse" in row and "direct" in row["metric"]:
            name = f"of what FUSE allows, depth {row['depth']}: {row['metric']}"
            promise(out, name, row["of fuse"], FUSE_SHARE, True)
    shallow, deep = min(results), max(results)
    if deep != shallow:
        pair = {depth: (ours, files[depth]) for depth in (deep, shallow)}
        for metric, value in pair_ratios(args, pair, work).items():
            promise(out, f"ours, depth {deep}/{shallow}: {metric}", value, DEPTH_RATIO, True)
    with raw_files(args, work) as raw:
        second = [second_read(args, files[deep], work, raw) for _ in range(args.rounds)]
    for where in raw:
        name = f"second read / raw file in page cache, {where}"
        value = statistics.median(r[where] for r in second)
        if where == "tmpfs":
            promise(out, name, value, SECOND_READ_RATIO, True)
        else:
            # Told, not promised: such file systems copy out of folios of many pages, and the kernel
            # has none for FUSE.
            print(f"{name:62} {value:8.2f}")
            out["others"].append({"metric": name, "value": value})
    promise(out, f"peak MiB, depth {deep}", max(results[deep]["ours"]["peak MiB"]), PEAK_MIB, False)
    promise(out, "365 points of 1 TiB: mount, s", mount_many(args, work), MOUNT_365_SECONDS, False)
    promise(out, "10,000 point files: list, s", list_many(args, work), LIST_10000_SECONDS, False)


def arguments():
    parser = chains.parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--plain", default="target/release/examples/plain", type=os.path.abspath,
                        help="what FUSE allows")  # fmt: skip
    parser.add_argument("--size-mib", type=int, default=4096, help="virtual disk (%(default)s)")
    parser.add_argument("--depths", default="1,10,200", help="files per chain (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="each fio run (%(default)s)")
    parser.add_argument("--buffered-mib", type=int, default=1024, help="length of dd (%(default)s)")
    parser.add_argument("--raw-dir", default="/var/tmp", help="where the raw file goes (%(default)s)")
    parser.add_argument("--only", choices=["ours", "theirs"], help="measure one server")
    parser.add_argument("--writable", action="store_true",
                        help="compare a mount with --writable with one without, and nothing else")  # fmt: skip
    parser.add_argument("--before", metavar="PROGRAM", type=chains.program,
                        help="compare with another build of fleecefs, and nothing else")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small disk, one round, one second")
    args = parser.parse_args()
    if args.quick:
        args.size_mib, args.rounds, args.seconds, args.buffered_mib = 512, 1, 1, 256
    return args


def make_chains(args, work):
    size = args.size_mib * MIB
    full = os.path.join(work, "full")
    chains.make_full(full, size)
    files = {}
    for depth in (int(word) for word in args.depths.split(",")):
        # Each chain's increments hold about half of the disk together, at most.
        clusters = max(16, min(size // chains.CLUSTER // 64, size // chains.CLUSTER // 2 // depth))
        directory = os.path.join(work, f"chain{depth}")
        files[depth] = chains.make_chain(directory, full, size, depth, clusters)
    return files


def main():
    args = arguments()
    out = {"size_mib": args.size_mib, "rounds": args.rounds}
    with chains.workplace(args, "mount") as work:
        begin = time.monotonic()
        files = make_chains(args, work)
        print(f"bench: chains made in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        if args.writable or args.before:
            out |= {"ratios": [], "others": []}
            compared(args, files, work, out)
            return finish(args, out)
        if not args.only and not all(same_bytes(args, f, work) for f in files.values()):
            raise SystemExit("bench: ours and theirs serve different bytes")
        results = measure(args, files, work)
        print("MB/s (seq, buffered), reads/s (rand), MiB (peak)")
        table(results, out)
        other_promises(args, results, files, work, out)
    return finish(args, out)


def finish(args, out):
    chains.write_json(args, out)
    rows = out["ratios"] + out["others"]
    print(f"{sum(r.get('kept', False) for r in rows)} promises kept, "
          f"{sum(not r.get('kept', True) for r in rows)} missed")  # fmt: skip


if __name__ == "__main__":
    main()
