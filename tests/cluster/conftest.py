"""Two nodes for the tests of this folder, and what one of them makes of the same training."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
from cluster.jobs import MODEL, SCRIPTS, STEPS, start
from cluster.nodes import Node, two_nodes

#: What nodes are made of, for a moment: namespaces, and a cable between them.
TRIAL = "unshare --net --mount --uts ip link add trial0 type veth peer name trial1".split()
PROGRAMS = ("ip", "ss", "unshare", "nsenter", "setpriv", "pgrep", "ssh", "ssh-keygen", "sshd")


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """Called with the names of programs, skips where one is not there, or nodes cannot be made."""

    def insist(*programs: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        if missing := [name for name in (*PROGRAMS, *programs) if shutil.which(name, path=path) is None]:
            pytest.skip(f"no {', '.join(missing)}: on Debian `bash tests/cluster/install.sh`, as root, installs them")
        if os.geteuid() != 0:
            pytest.skip("nodes within this machine are namespaces, which only root may make")
        trial = subprocess.run(TRIAL, capture_output=True, text=True)
        if trial.returncode != 0:
            pytest.skip(f"nodes within this machine cannot be made or joined here: {trial.stderr.strip()}")

    return insist


@pytest.fixture(scope="session")
def nodes(needs):
    needs()
    with two_nodes() as made:
        yield made


@pytest.fixture(autouse=True)
def nodes_are_cleared(request) -> Iterator[None]:
    """Ends what a test has left on the nodes, as one that fails does: the next would find it there."""
    yield
    left: tuple[Node, ...] = request.node.funcargs.get("nodes", ())
    for node in left:
        node.clear()


@pytest.fixture(scope="session")
def losses_of_one_node(nodes, tmp_path_factory) -> list[float]:
    """The first losses of the training, as two ranks of one node have them."""
    words = ["bash", SCRIPTS / "one_node.sh", *MODEL, "--train-iters", STEPS, "--save", "run"]
    job = start(words, tmp_path_factory.mktemp("one_node"), on=nodes[0], RANKS="2")
    assert job.wait(400) == 0, job.said()
    return job.losses()
