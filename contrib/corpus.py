#!/usr/bin/env python3
"""Runs every case of an unpacked corpora directory through `fleecefs mount` and prints right/wrong.

corpus.py CORPORA [--fleecefs PROGRAM] [FOLDER...]

Each folder with a MANIFEST.json is copied to a temporary directory, mounted as one backup directory,
and each point's bytes are compared with the manifest's hashes. The rules:

  expect ok       the point is there and its bytes are right. Where its root names a backing file that
                  is not in the folder, or is marked corrupt, absence is right too.
  expect error    the point is absent, or reading it gives EIO.
  only `qemu`     (images of QEMU's tests, fuzzed images) refusing is right; what is served and what
                  qemu-img reads must be equal. A fuzzed image of mode `valid` must be served.

Everywhere: the mount lives on, answers in time, and stays below --max-mib of memory. Exits with 1 if
anything is wrong.

With --restore, each point that is to be right is also restored, to a raw file, whose bytes are compared
with the hashes, and to a qcow2 file, which has to pass `qemu-img check` and `qemu-img compare`. With
--verify, `fleecefs verify` runs over each folder: no point that is right may be unsound (no hashes are
recorded there, so that "could not tell" is the answer), and no point that is wrong may be sound.
"""

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

BLOCK = 64 * 1024
# Larger images are read by SEEK_DATA and compared by their sparse hash.
PLAIN_LIMIT = 1 << 30
READ_SECONDS = 120
FOLDERS = ["chains", "qmpbackup", "qcow2", "qcow2/iotests", "qcow2/image-fuzzer", "virtnbd",
           "vma", "vma/generated"]  # fmt: skip


class Want:
    """What one mounted file should be."""

    def __init__(self, case, source, expect, point, device=None):
        self.case = case
        self.source = source
        self.expect = expect  # ok, error, or any: refuse or be right
        self.size = point.get("stream_bytes", point.get("virtual_size", point.get("size")))
        self.sha256 = point.get("sha256")
        self.sparse = point.get("sparse_sha256")
        self.device = device
        self.may_refuse = expect == "any"

    def name(self):
        return f"{self.source}:{self.device}" if self.device else self.source


# --- manifests --------------------------------------------------------------------------------------


def wanted(folder, manifest):
    """All that a folder's manifest says, as Want values."""
    for entry in manifest:
        if "archive" in entry:
            yield from wanted_of_archive(entry)
        elif "points" in entry:
            yield from wanted_of_chain(folder, entry)
        else:
            yield wanted_of_image(entry)


def wanted_of_archive(entry):
    for device in entry["devices"]:
        if device["name"] == "vmstate":  # a guest's memory, not a disk: not shown
            continue
        expect = "any" if is_whole_in_damaged(entry, device) else entry["expect"]
        yield Want(entry["archive"], entry["archive"], expect, device, device["name"])


def is_whole_in_damaged(entry, device):
    """Whether an archive is damaged elsewhere: what is whole may be served. A reader that goes on after
    damage says which devices differ."""
    said = entry.get("readers", {}).get("dissect", "")
    went_on = said == "match" or said.startswith("differs: ")
    return entry["expect"] == "error" and went_on and f"'{device['name']}'" not in said


def wanted_of_chain(folder, entry):
    # A chain's files are relative to its own folder, or to the manifest's.
    base = {"chains": entry["chain"], "virtnbd": entry["chain"].split("/")[0]}.get(folder, "")
    for point in entry["points"]:
        source = os.path.join(base, point["file"])
        yield Want(entry["chain"], source, point["expect"], point)


def wanted_of_image(entry):
    served = entry.get("mode") == "valid"
    expect = "ok" if entry["qemu"] == "ok" and served else "any"
    # Without qemu's bytes there is nothing to compare with; living on is what counts.
    point = entry if entry["qemu"] == "ok" else {}
    return Want(entry["file"], entry["file"], expect, point)


# --- layout -----------------------------------------------------------------------------------------


def copy_folder(source, target):
    """Copies a folder as it is, without the corpora inside it that have a manifest of their own."""
    os.makedirs(target)
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if name != "MANIFEST.json" and not os.path.exists(os.path.join(path, "MANIFEST.json")):
            subprocess.run(["cp", "-a", "--sparse=always", path, target], check=True)
    subprocess.run(["chmod", "-R", "u+w", target], check=True)


def name_overlays(folder, manifest, target, wants):
    """Files of one chain that fit no layout get names that say the order."""
    if folder != "qcow2":
        return
    for entry in manifest:
        if len(entry["points"]) < 2:
            continue
        for index, point in enumerate(entry["points"]):
            directory, name = os.path.split(point["file"])
            level = "FULL" if index == 0 else "INC"
            new = os.path.join(directory, f"{level}-{1700000000 + index}-{entry['chain']}")
            os.rename(os.path.join(target, point["file"]), os.path.join(target, new))
            for want in wants:
                if want.source == point["file"]:
                    want.source = new


def backing_name(path):
    """The backing file's name in a qcow2 header, or None."""
    with open(path, "rb") as file:
        header = file.read(20)
        if header[:4] != b"QFI\xfb" or len(header) < 20:
            return None
        offset = int.from_bytes(header[8:16], "big")
        if offset == 0:
            return None
        if offset > os.path.getsize(path):
            return None
        file.seek(offset)
        return os.fsdecode(file.read(min(int.from_bytes(header[16:20], "big"), 1023)))


def is_marked_corrupt(path):
    """Whether QEMU has set the corrupt bit (incompatible feature 1 of version 3)."""
    with open(path, "rb") as file:
        header = file.read(80)
    version_3 = header[:4] == b"QFI\xfb" and header[7:8] == b"\3"
    return version_3 and len(header) == 80 and bool(header[79] & 2)


def allow_refusal(wants, target):
    """Marks the points of chains whose root lies on an image that is not there, or is marked corrupt."""
    roots = {}
    for want in wants:
        path = os.path.join(target, want.source)
        if want.case not in roots and want.device is None and os.path.isfile(path):
            name = backing_name(path)
            inside = name and os.path.exists(os.path.join(os.path.dirname(path), name))
            missing = bool(name) and (os.path.isabs(name) or not inside)
            roots[want.case] = missing or is_marked_corrupt(path)
        want.may_refuse |= roots.get(want.case, False)


# --- reading ----------------------------------------------------------------------------------------


def hash_plain(fd):
    digest = hashlib.sha256()
    os.lseek(fd, 0, os.SEEK_SET)
    while data := os.read(fd, 1 << 20):
        digest.update(data)
    return digest.hexdigest()


def hash_sparse(fd, size):
    """sha256 over each non-zero 64 KiB block's offset (8 bytes, big-endian) and its bytes."""
    digest, zero, at = hashlib.sha256(), bytes(BLOCK), 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK
        except OSError as error:
            if error.errno != errno.ENXIO:  # a range that cannot be read
                raise
            break  # no data from here to the end
        data = os.pread(fd, BLOCK, at)
        if data != zero[: len(data)]:
            digest.update(at.to_bytes(8, "big") + data)
        at += BLOCK
    return digest.hexdigest()


def read_point(path, want, answer):
    """Runs in a process of its own: what is wrong with the point, or None. EIO comes as an OSError."""
    try:
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        if want.size is not None and size != want.size:
            answer.send(("bytes", f"size {size}, not {want.size}"))
            return
        if want.sparse is not None:
            if hash_sparse(fd, size) != want.sparse:
                answer.send(("bytes", "wrong bytes (by SEEK_DATA)"))
                return
        if size <= PLAIN_LIMIT or want.sparse is None and want.expect == "ok":
            if want.sha256 not in (None, hash_plain(fd)):
                answer.send(("bytes", "wrong bytes"))
                return
            if want.sha256 is None:
                hash_plain(fd)
        elif want.sparse is None:
            hash_sparse(fd, size)
        answer.send(("right", None))
    except OSError as error:
        answer.send(("error", str(error)))


def timed_read(path, want):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=read_point, args=(path, want, sender))
    process.start()
    try:
        if receiver.poll(READ_SECONDS):
            return receiver.recv()
        return ("hang", f"no answer within {READ_SECONDS} s")
    except EOFError:
        return ("hang", "the reader died")
    finally:
        process.kill()
        process.join()


def verdict(want, path):
    """None if the point is as it should be, else the reason why not."""
    if path is None:
        return None if want.expect == "error" or want.may_refuse else "absent"
    kind, reason = timed_read(path, want)
    if kind == "hang":
        return reason
    if want.expect == "error":
        return "served" if kind != "error" else None
    if kind == "error" and want.may_refuse:
        return None
    return reason


# --- mount ------------------------------------------------------------------------------------------


class Mount:
    def __init__(self, program, directory, mount_point, log):
        os.makedirs(mount_point)
        self.point = mount_point
        command = [program, "mount", "--foreground", directory, mount_point]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + READ_SECONDS
        while not os.path.ismount(mount_point):
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"corpus: fleecefs mount did not come up; see {log.name}")
            time.sleep(0.01)

    def files(self):
        """{source: [paths]} of all points."""
        found = {}
        for directory, _, names in os.walk(self.point):
            for name in names:
                path = os.path.join(directory, name)
                if name.endswith(".raw") and not os.path.islink(path):
                    source = os.fsdecode(os.getxattr(path, "user.fleecefs.source"))
                    found.setdefault(source, []).append(path)
        return found

    def peak_mib(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        return 0.0

    def end(self):
        alive = self.process.poll() is None
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            alive = False
        subprocess.run(["umount", "-q", "-l", self.point], check=False)
        return alive


def pick(want, paths):
    """The mounted file of a wanted point: a file may hold several (devices, snapshots)."""
    if want.device:
        return next((p for p in paths if os.path.basename(os.path.dirname(p)) == want.device), None)
    own = os.path.basename(want.source) + ".raw"
    return next((p for p in paths if os.path.basename(p) == own), None)


# --- restore and verify -----------------------------------------------------------------------------


# Restored to qcow2 too up to here, and to raw at all up to there (file systems end somewhere).
QCOW2_LIMIT = 1 << 30
RAW_LIMIT = 1 << 42


def failed(command):
    """What a command said when it failed, or None."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{command[1]}: {done.stderr.strip()[-300:]}"


def restored(args, want, path, mount, target, work):
    """None if the point is restored right, else the reason why not."""
    size = os.stat(path).st_size
    if want.expect != "ok" or size > RAW_LIMIT or want.sha256 is None and want.sparse is None:
        return None
    point = os.path.relpath(path, mount)
    raw, qcow2 = os.path.join(work, "r.raw"), os.path.join(work, "r.qcow2")
    restore = [args.fleecefs, "restore", "--force", target, point]
    try:
        if reason := failed([*restore, raw]):
            return None if want.may_refuse else reason
        with open(raw, "rb") as file:
            fd = file.fileno()
            if want.sparse is not None:
                right = hash_sparse(fd, size) == want.sparse
            else:
                right = size > PLAIN_LIMIT or hash_plain(fd) == want.sha256
        if not right:
            return "restore to raw: wrong bytes"
        if size > QCOW2_LIMIT:
            return None
        return (
            failed([*restore, qcow2])
            or failed(["qemu-img", "check", "-f", "qcow2", qcow2])
            or failed(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2])
        )
    finally:
        for made in (raw, qcow2):
            if os.path.exists(made):
                os.unlink(made)


def restore_all(args, wants, paths, mount, target, work):
    """(wrong, number of points tried)."""
    wrong, tried = [], 0
    for want, path in zip(wants, paths):
        if path is not None and want.expect == "ok":
            tried += 1
            if reason := restored(args, want, path, mount, target, work):
                wrong.append((want.name(), reason))
    return wrong, tried


def verify_all(args, wants, target):
    """(wrong, number of points that verify spoke of)."""
    command = [args.fleecefs, "-q", "verify", "--json", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        points = json.loads(done.stdout)["points"]
    except (ValueError, KeyError):
        # 3: there is no point at all.
        return ([] if done.returncode == 3 else [("verify", done.stderr.strip()[-300:])]), 0
    outcomes = {}
    for point in points:
        # Of an image with internal snapshots the point that goes by the file's own name.
        if point["point"] == os.path.basename(point["file"]) or point["file"] not in outcomes:
            outcomes[point["file"]] = (point["outcome"], point.get("reason"))
    wrong = []
    for want in wants:
        path = os.path.realpath(os.path.join(target, want.source))
        outcome, reason = outcomes.get(path, (None, None))
        if want.expect == "ok" and outcome == "unsound" and not want.may_refuse:
            wrong.append((want.name(), f"verify: false alarm: {reason}"))
        if want.expect == "error" and outcome == "sound":
            wrong.append((want.name(), "verify: called sound"))
    return wrong, len(points)


# --- folders ----------------------------------------------------------------------------------------


def unexpected(folder, wants, found):
    """Points that nobody should see: of partial files, of what is no image."""
    if folder not in ("chains", "qmpbackup", "virtnbd"):
        return []
    known = {want.source for want in wants}
    return [(source, "unexpected point") for source in sorted(found) if source not in known]


def run_folder(args, folder, work):
    """Returns (right, wrong): a number and a list of (name, reason)."""
    source = os.path.join(args.corpora, folder)
    with open(os.path.join(source, "MANIFEST.json")) as file:
        manifest = json.load(file)
    target, log_path = os.path.join(work, "backups"), os.path.join(work, "log")
    copy_folder(source, target)
    wants = list(wanted(folder, manifest))
    name_overlays(folder, manifest, target, wants)
    allow_refusal(wants, target)
    with open(log_path, "w") as log:
        mount = Mount(args.fleecefs, target, os.path.join(work, "mnt"), log)
        try:
            found = mount.files()
            wrong = unexpected(folder, wants, found)
            paths = [pick(want, found.get(want.source, [])) for want in wants]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                reasons = list(pool.map(verdict, wants, paths))
            served = sum(path is not None for path in paths)
            if args.restore:
                more, tried = restore_all(args, wants, paths, mount.point, target, work)
                wrong += more
            peak = mount.peak_mib()
        finally:
            alive = mount.end()
    wrong += [(want.name(), reason) for want, reason in zip(wants, reasons) if reason]
    right = reasons.count(None)
    if not alive:
        wrong.append(("the mount", "crashed or did not end when told to"))
    if peak > args.max_mib:
        wrong.append(("the mount", f"used {peak:.0f} MiB"))
    note = f"{served} served, peak {peak:.0f} MiB"
    if args.restore:
        note += f", {tried} restored"
    if args.verify:
        more, told = verify_all(args, wants, target)
        wrong += more
        note += f", {told} verified"
    if wrong and args.keep_log:
        shutil.copy(log_path, os.path.join(args.keep_log, folder.replace("/", "-") + ".log"))
    return right, wrong, note


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("corpora", help="the unpacked directory")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="only these")
    parser.add_argument("--fleecefs", default="target/release/fleecefs", metavar="PROGRAM")
    parser.add_argument("--max-mib", type=int, default=300, help="memory of one mount (%(default)s)")
    parser.add_argument("--restore", action="store_true", help="also restore each point")
    parser.add_argument("--verify", action="store_true", help="also verify each folder")
    parser.add_argument("--keep-log", metavar="DIR", help="keep the mount's log of folders that fail")
    args = parser.parse_intermixed_args()
    args.fleecefs = os.path.abspath(args.fleecefs)
    total = failed = 0
    for folder in args.folders or FOLDERS:
        if not os.path.exists(os.path.join(args.corpora, folder, "MANIFEST.json")):
            print(f"{folder}: no MANIFEST.json", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="fleecefs-corpus.") as work:
            begin = time.monotonic()
            right, wrong, note = run_folder(args, folder, work)
            seconds = time.monotonic() - begin
        print(f"{folder:20} {right:4} right {len(wrong):4} wrong   ({note}, {seconds:.0f} s)")
        for name, reason in wrong:
            print(f"    {name}: {reason}")
        total, failed = total + right, failed + len(wrong)
    print(f"{total} right, {failed} wrong")
    sys.exit(1 if failed or not total else 0)


if __name__ == "__main__":
    main()
