"""A cable between two nodes that is pulled: the ranks of both say so, and end."""

from __future__ import annotations

import subprocess

from cluster.jobs import FOR_EVER, MODEL, PYTHON, ROOT, start
from cluster.nodes import ADDRESSES


def test_a_link_that_goes_down_is_a_hang_between_two_nodes(nodes, tmp_path):
    jobs = [
        start(
            [PYTHON, ROOT / "pretrain_gpt.py", *MODEL, *FOR_EVER, "--save", "run", "--hang-limit-minutes", "0.2"],
            tmp_path / "job",
            on=node,
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=ADDRESSES[0],
            MASTER_PORT="29511",
        )
        for rank, node in enumerate(nodes)
    ]
    jobs[0].first_losses()
    cable = ("ip", "link", "set", "eth0")
    subprocess.run(nodes[0].command(*cable, "down"), check=True)
    try:
        assert [job.wait(400) for job in jobs] == [4, 4], jobs[0].said()
    finally:
        subprocess.run(nodes[0].command(*cable, "up"), check=True)
    told = jobs[0].told()
    (page,) = (path.read_text() for path in jobs[0].run.glob("hang-*/page.txt"))
    assert (told["cause"], told["code"]) == ("hang", 4) and "nothing gets through" in told["message"], page
    # Each is in the same collective, or one has had its end of it already.
    assert "ranks 0 and 1: training step" in page or ("rank 0: " in page and "rank 1: " in page), page
    assert "node-" in page.partition("behind:\n")[2].splitlines()[0], page
