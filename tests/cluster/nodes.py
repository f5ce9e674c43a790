"""Two machines in one: network, host name and files under /etc of their own, joined by a cable, an `sshd` in each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

#: A node's first process: ssh's client and the names of nodes are set for it and its offspring alone, then it is sshd,
#: which dies with the tests.
_BEGIN = """
mount --bind "$1/hosts-$2" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
hostname "$2"
ip link set lo up
exec setpriv --pdeathsig KILL /usr/sbin/sshd -D -e -f "$1/sshd_config"
"""


@dataclasses.dataclass(frozen=True)
class Node:
    """One of the machines; it lives as long as its sshd."""

    name: str
    address: str
    sshd: subprocess.Popen

    def command(self, *words: object, folder: Path | str = "/") -> list[str]:
        """`words` as a command that runs on this node, in that folder."""
        enter = ["nsenter", "--target", str(self.sshd.pid), "--net", "--mount", "--uts", f"--wdns={folder}", "--"]
        return [*enter, *map(str, words)]

    def processes(self) -> list[psutil.Process]:
        """All that runs here, sshd among it."""
        here = os.readlink(f"/proc/{self.sshd.pid}/ns/net")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.readlink(f"/proc/{process.pid}/ns/net") == here:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes of pretrain_gpt.py itself, not of launchers that name it."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if (
                    words
                    and Path(words[0]).name.startswith("python")
                    and any(word.endswith("pretrain_gpt.py") for word in words[1:3])
                ):
                    found.append(process)
        return found

    def clear(self) -> None:
        """Kill all that runs here but its first process."""
        for process in self.processes():
            if process.pid != self.sshd.pid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def listening(self) -> str:
        """The sockets that processes here listen on, a line each."""
        return subprocess.run(self.command("ss", "-ltnpH"), capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """The machines, taken down at the end with all that still runs on them."""
    with contextlib.ExitStack() as held:
        folder = Path(tempfile.mkdtemp(prefix="nodes-"))
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        _write_settings(folder)
        nodes = []
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            log = held.enter_context(open(folder / f"sshd-{name}.log", "w"))
            sshd = subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "sh", "-euc", _BEGIN, "sh", folder, name],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
            nodes.append(Node(name, address, sshd))
            held.callback(_take_down, nodes[-1])
        own = os.readlink("/proc/self/ns/net")
        wait_for(lambda: all(os.readlink(f"/proc/{node.sshd.pid}/ns/net") != own for node in nodes), 80, "unshare")
        first, second = nodes
        cable = f"link add eth0 netns {first.sshd.pid} type veth peer name eth0 netns {second.sshd.pid}"
        subprocess.run(["ip", *cable.split()], check=True)
        for node in nodes:
            subprocess.run(node.command("ip", "address", "add", f"{node.address}/24", "dev", "eth0"), check=True)
            subprocess.run(node.command("ip", "link", "set", "eth0", "up"), check=True)
        for node in nodes:
            wait_for(lambda node=node: ":22 " in node.listening(), 80, f"sshd of {node.name}")
        yield first, second


def _write_settings(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
        f"PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder}/user_key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        f"LogLevel ERROR\nBatchMode yes\n"
    )
    for name in NAMES:
        # As Debian has it: a node's own name leads to itself alone.
        others = [f"{ADDRESSES[NAMES.index(other)]} {other}" for other in NAMES if other != name]
        (folder / f"hosts-{name}").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]) + "\n")


def _take_down(node: Node) -> None:
    with contextlib.suppress(OSError):
        node.clear()
    node.sshd.kill()
    node.sshd.wait()


def wait_for(condition, seconds: float, what: str, tell=lambda: "") -> None:
    """Return once `condition()` is true; AssertionError with `what` and `tell()` where it does not become so."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if condition():
                return
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{tell()}"
        time.sleep(0.1)
