#!/usr/bin/env python3
"""Runs upstream's own test suite twice, with upstream's programs and with ours, and compares step by step.

Usage: contrib/qmpbackup-suite.py CHECKOUT [--fleecefs PROGRAM] [--python PYTHON]

CHECKOUT is a checkout of qmpbackup (it is in no package registry): its t/runtest is read, nothing of it is kept.
PYTHON is one that has what upstream's requirements.txt names. Needs qemu-system-x86_64, qemu-img, bash.

The suite wants a guest that is downloaded. Here it is a QEMU without an operating system: what the guest's files
would have changed is written to its disk through QEMU's monitor, a small server answers as the guest agent, and
the suite's virt-ls and virt-diff look for those writes. Each command of the suite is a step; what a step returned
stands in the table. Exit code 1 if a step differs that REASONS does not explain.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib

# Steps in which we differ on purpose: a part of the step, and why.
REASONS = {
    "rebase --dir @/partial_backup": "points beside another program's .partial stay usable: nothing is built on it",
    "--level inc --include disk2 --target @/partial_backup/": "the next backup is made, with a warning about the .partial",
    "grep Arguments": "our log has a format of its own",
    "grep INFO": "our log has a format of its own",
    'grep "qmpbackup"': "info blockdev lists disks; their bitmaps are in info bitmaps",
    'grep "recording.*true"': "info bitmaps prints a table; with --json there is \"recording\": true",
    'grep "Removing bitmap: qmpbackup"': "cleanup says it in other words",
    'grep "Snapshot"': "the step wants one file in the folder; the image's manifest is there, too",
    "grep incdata3": "the step wants one file in the folder; the image's manifest is there, too",
}
# Commands that only look at what a program did.
CHECKS = ("grep ", "exist_files ", "diff ")
BEGIN = "Executing qmpbackup tests"
DISKS = {"disk1.qcow2": "qcow2", "disk2.qcow2": "qcow2", "disk3.raw": "raw", "disk4.qcow2": "qcow2",
         "file.qcow2": "qcow2"}

TRANSLATE = '''#!/usr/bin/env python3
import os, subprocess, sys
program, state, args = os.environ["SUITE_FLEECEFS"], os.environ["SUITE_STATE"], sys.argv[1:]
def take(flags):
    found = {}
    while args and args[0].startswith("--"):
        name = args.pop(0)
        found[name] = True if name in flags else args.pop(0)
    return found
'''
QMPBACKUP = TRANSLATE + '''
top = take(())
verb = args.pop(0)
out = [program, verb, "--qmp", top["--socket"]]
if verb == "backup":
    if "--quiesce" in args and "--agent-socket" in top:
        out += ["--agent", top["--agent-socket"]]
    # Raw disks are always backed up.
    args = [a for a in args if a != "--include-raw"]
    target = args[args.index("--target") + 1]
    # A new target is asked for.
    if not os.path.exists(os.path.join(target, "uuid")):
        args.append("--init")
elif verb == "info":
    out.insert(2, args[args.index("--show") + 1])
    args = []
elif verb == "cleanup":
    args = ["--all"]
if verb != "info":
    args += ["--state-dir", state]
ended = subprocess.run(out + args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print(ended.stdout, end="")
if "--logfile" in top:
    open(top["--logfile"], "w").write(ended.stdout)
sys.exit(ended.returncode)
'''
QMPRESTORE = TRANSLATE + '''
check = ["--skip-check"] if take(("--skip-check",)) else []
verb = {"snapshotrebase": "snapshot-rebase"}.get(args[0], args[0])
del args[0]
named = take(("--dry-run",))
out = [program, verb, named["--dir"]]
out += [named["--targetfile"]] if "--targetfile" in named else []
out += ["--rate-limit", named["--rate-limit"]] if "--rate-limit" in named else []
out += ["--dry-run"] if "--dry-run" in named else []
sys.exit(subprocess.run(out + check).returncode)
'''


def data(number):
    """What stands for the file incdataN: where on the disk, and which byte."""
    return number << 20, zlib.crc32(b"incdata%d" % number) % 200 + 20


def look(image, work):
    """Prints the names of the writes that an image has, as virt-ls would those of files."""
    raw = os.path.join(work, "look.raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    with open(raw, "rb") as f:
        content = f.read()
    for number in (1, 2, 3):
        at, byte = data(number)
        if content[at:at + (512 << 10)] == bytes([byte]) * (512 << 10):
            print(f"incdata{number}")


class Monitor:
    """A QMP connection."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                raise OSError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]


def write_data(path, number):
    at, byte = data(number)
    line = f'qemu-io ide0-hd0 "write -P {byte} {at} 512k"'
    Monitor(path).call("human-monitor-command", **{"command-line": line})


def serve_agent(path):
    """Answers as the guest agent of a guest with one file system."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(5)
    frozen = [False]
    names = ["guest-ping", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"]

    def answer(request):
        name = request["execute"]
        if name in ("guest-sync", "guest-sync-delimited"):
            return request["arguments"]["id"]
        if name == "guest-fsfreeze-status":
            return "frozen" if frozen[0] else "thawed"
        if name.startswith("guest-fsfreeze-"):
            frozen[0] = name != "guest-fsfreeze-thaw"
            return 1
        if name == "guest-info":
            commands = [{"name": n, "enabled": True, "success-response": True} for n in names]
            return {"version": "1", "supported_commands": commands}
        return {}

    def talk(client):
        decoder, text = json.JSONDecoder(), ""
        while chunk := client.recv(65536):
            text += chunk.replace(b"\xff", b"").decode()
            while text.strip():
                try:
                    request, used = decoder.raw_decode(text.lstrip())
                except ValueError:
                    break
                text = text.lstrip()[used:]
                before = b"\xff" if request["execute"] == "guest-sync-delimited" else b""
                client.sendall(before + json.dumps({"return": answer(request)}).encode() + b"\n")

    def accept():
        while True:
            client, _ = server.accept()
            try:
                talk(client)
            except OSError:
                pass
            client.close()

    threading.Thread(target=accept, daemon=True).start()


def start_qemu(work):
    for name, form in DISKS.items():
        path = os.path.join(work, name)
        subprocess.run(["qemu-img", "create", "-q", "-f", form, path, "10M"], check=True)
    raw, top = os.path.join(work, "disk5.raw"), os.path.join(work, "disk5.qcow2")
    options = f"data_file={raw},data_file_raw=on"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, top, "10M"], check=True)
    p = lambda name: os.path.join(work, name)
    command = [
        "qemu-system-x86_64", "-name", "testvm", "-accel", "tcg", "-m", "64", "-display", "none", "-S",
        "-drive", f"node-name=disk1,file={p('disk1.qcow2')},format=qcow2",
        "-drive", f"node-name=disk2,file={p('disk2.qcow2')},format=qcow2",
        "-drive", f"node-name=disk3,file={p('disk3.raw')},format=raw",
        "-drive", f"file={p('disk4.qcow2')},format=qcow2",
        "-qmp", f"unix:{p('socket')},server=on,wait=off", "-qmp", f"unix:{p('socket2')},server=on,wait=off",
        "-device", "virtio-scsi-pci,id=scsi",
        "-blockdev", f"driver=qcow2,node-name=disk.0,file.driver=file,file.filename={p('file.qcow2')}",
        "-device", "scsi-hd,drive=disk.0,bus=scsi.0",
        "-blockdev", f"driver=qcow2,node-name=datafile,file.driver=file,file.filename={p('disk5.qcow2')}",
        "-device", "scsi-hd,drive=datafile,bus=scsi.0",
    ]
    qemu = subprocess.Popen(command)
    Monitor(p("socket2")).call("cont")
    return qemu


def script(runtest, work):
    """The suite's steps, for a guest that runs already, in `work`; each step's exit code is written to steps."""
    with open(runtest) as f:
        lines = f.read().splitlines()
    helpers = []
    for i, line in enumerate(lines):
        if re.match(r"\w+\(\) \{", line) and "files" in line:
            helpers += lines[i:lines.index("}", i) + 1]
    steps = lines[next(i for i, line in enumerate(lines) if BEGIN in line) + 2:]
    text = "\n".join(helpers + [TRAP] + steps)
    text = text.replace("/tmp/", work + "/").replace("exit 1", "false")
    head = f'QMP_SOCKET={work}/socket AGENT_SOCKET={work}/qga.sock\nexport PATH={work}/bin:$PATH\n'
    return head + text + "\n:\n"


# Before each command: what the one before it returned. (Commands of helper functions are not told apart.)
TRAP = '''before=""
trap 'rc=$?; [ -z "$before" ] || printf "%s\\t%s\\n" "$rc" "${before//$'"'\\n'"'/ }" >>"$SUITE_STEPS"; before=$BASH_COMMAND' DEBUG'''


def piped(runtest):
    """The commands whose output goes to another: what they return is lost."""
    with open(runtest) as f:
        found = [line.strip().split(" | ") for line in f if " | " in line]
    return {squeezed(part).replace("/tmp/", "@/") for parts in found for part in parts[:-1]}


def squeezed(command):
    return " ".join(command.split())


def executable(path, text):
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, 0o755)


def run(checkout, ours, python):
    """Steps as (exit code, command)."""
    work = tempfile.mkdtemp(prefix="fleecefs-suite.")
    qemu = None
    try:
        os.makedirs(os.path.join(work, "bin"))
        os.makedirs(os.path.join(work, "suite/t"))
        me = os.path.realpath(__file__)
        program = lambda name: os.path.join(work, "suite", name)
        if ours:
            executable(program("qmpbackup"), QMPBACKUP)
            executable(program("qmprestore"), QMPRESTORE)
        else:
            for name in ("qmpbackup", "qmprestore"):
                executable(program(name), f'#!/bin/sh\nexec "{python}" "{checkout}/{name}" "$@"\n')
        executable(os.path.join(work, "suite/t/agent.py"), AGENT.format(me=me))
        executable(os.path.join(work, "bin/virt-ls"), f'#!/bin/sh\n[ "$1" = -a ] && shift\nexec "{me}" --look "$1"\n')
        executable(os.path.join(work, "bin/virt-diff"), f'#!/bin/sh\nexec "{me}" --look "$4"\n')
        serve_agent(os.path.join(work, "qga.sock"))
        qemu = start_qemu(work)
        steps = os.path.join(work, "steps")
        env = dict(os.environ, SUITE_WORK=work, SUITE_STEPS=steps, SUITE_STATE=os.path.join(work, "state"))
        if ours:
            env["SUITE_FLEECEFS"] = ours
        log = os.path.join(work, "log")
        with open(log, "w") as out:
            subprocess.run(["bash", "-c", script(os.path.join(checkout, "t/runtest"), work)], env=env, stdout=out,
                           stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=os.path.join(work, "suite/t"))
        with open(steps) as f:
            lines = [line.rstrip("\n").split("\t", 1) for line in f]
        return [(int(code), squeezed(command.replace(work, "@"))) for code, command in lines]
    finally:
        if qemu:
            qemu.kill()
            qemu.wait()
        shutil.rmtree(work, ignore_errors=True)


AGENT = '''import subprocess, sys
if len(sys.argv) > 1:
    subprocess.run(["{me}", "--write", sys.argv[1]], check=True)
'''


def main():
    if sys.argv[1:2] == ["--look"]:
        return look(sys.argv[2], os.environ["SUITE_WORK"])
    if sys.argv[1:2] == ["--write"]:
        return write_data(os.path.join(os.environ["SUITE_WORK"], "socket2"), int(sys.argv[2][-1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout")
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    parser.add_argument("--fleecefs", default=os.path.join(root, "target/debug/fleecefs"))
    parser.add_argument("--python", default=sys.executable)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    theirs = run(asked.checkout, None, asked.python)
    ours = run(asked.checkout, os.path.realpath(asked.fleecefs), asked.python)
    passed_over, pipes = ("rm ", "echo", ":"), piped(os.path.join(asked.checkout, "t/runtest"))
    commands = [c for _, c in theirs if not c.startswith(passed_over) and c not in pipes]
    unexplained = 0
    print("step | upstream | ours | command")
    left = list(ours)
    same = 0
    for number, (code, command) in enumerate((s for s in theirs if s[1] in commands), 1):
        found = next((i for i, s in enumerate(left) if s[1] == command), None)
        mine = None if found is None else left.pop(found)[0]
        if found is not None:
            del left[:found]
        equal = mine is not None and (code == 0) == (mine == 0)
        same += equal
        reason = next((why for part, why in REASONS.items() if part in command), None)
        if mine == 0 and command.startswith(CHECKS):
            reason = "a check that upstream did not pass this time"
        unexplained += not equal and reason is None
        note = "" if equal else f"  <- {reason or 'NOT EXPLAINED'}"
        print(f"{number:3} | {code} | {mine} | {command}{note}")
    print(f"{same} of {len(commands)} steps alike, {unexplained} differ without a reason")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
