#!/usr/bin/env python3
"""Runs one command in a guest through its QEMU guest agent, prints its output, returns its status.

agent.py SOCKET COMMAND [ARGUMENT...]
"""

import base64
import json
import random
import socket
import sys
import time

# Under emulation a guest needs seconds to boot; the agent answers when it is up.
SYNC_TRIES = 60


class Agent:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.settimeout(2)
        self.buffer = b""

    def line(self):
        while b"\n" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise SystemExit("agent.py: the agent's socket was closed")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.lstrip(b"\xff")

    def send(self, name, **arguments):
        message = {"execute": name, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def sync(self):
        """Drops answers meant for whoever spoke before us, and waits until the agent is up."""
        for _ in range(SYNC_TRIES):
            token = random.randrange(1 << 31)
            self.socket.sendall(b"\xff")
            self.send("guest-sync-delimited", id=token)
            try:
                while json.loads(self.line() or b"{}").get("return") != token:
                    pass
                self.socket.settimeout(60)
                return
            except (TimeoutError, ValueError):
                continue
        raise SystemExit("agent.py: the agent does not answer")

    def call(self, name, **arguments):
        self.send(name, **arguments)
        answer = json.loads(self.line())
        if "error" in answer:
            raise SystemExit(f"agent.py: {name}: {answer['error']['desc']}")
        return answer["return"]


def main():
    path, command, *arguments = sys.argv[1:]
    agent = Agent(path)
    agent.sync()
    call = {"path": command, "arg": arguments, "capture-output": True}
    pid = agent.call("guest-exec", **call)["pid"]
    while not (status := agent.call("guest-exec-status", pid=pid))["exited"]:
        time.sleep(0.05)
    sys.stdout.buffer.write(base64.b64decode(status.get("out-data", "")))
    sys.stdout.flush()
    sys.stderr.buffer.write(base64.b64decode(status.get("err-data", "")))
    sys.exit(status.get("exitcode", 1))


if __name__ == "__main__":
    main()
