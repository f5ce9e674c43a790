"""A batch job under Slurm: it saves before its time is over, goes on from there, and ends with a rank that dies."""

from __future__ import annotations

import subprocess

import pytest
from cluster.jobs import ENVIRONMENT, FOR_EVER, MODEL, ROOT, SCRIPTS, Job
from cluster.nodes import wait_for
from cluster.slurm import DAEMONS, cluster


@pytest.fixture
def slurm(nodes, needs):
    needs(*DAEMONS)
    with cluster(nodes) as ready:
        yield ready


def test_a_job_saves_in_time_goes_on_from_there_and_ends_with_a_rank(slurm, nodes, losses_of_one_node, tmp_path):
    environment = {**ENVIRONMENT, **slurm.environment, "RUN": str(tmp_path / "run")}
    submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=10", f"--output={tmp_path}/output"]
    words = nodes[0].command(*submit, SCRIPTS / "slurm.sbatch", *MODEL, *FOR_EVER, folder=ROOT)
    submitted = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240)
    number = submitted.stdout.strip()
    assert number.isdecimal(), submitted.stderr
    # srun is of the batch script: there is no launcher to be waited for here.
    job = Job(tmp_path / "run", tmp_path / "output", subprocess.Popen(["sleep", "300"]))
    try:
        assert job.first_losses() == losses_of_one_node
        # What --signal does before the time limit.
        slurm.ask("scancel", "--signal=TERM", f"{number}.0")
        told = job.told()
        assert (told["cause"], told["code"]) == ("signal_SIGTERM", 0), job.said()
        # Back in the queue, it would wait two minutes for the credentials of its first start to expire.
        wait_for(lambda: slurm.state_of(number) == "PENDING", 240, "the job in the queue again", job.said)
        slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
        wait_for(lambda: len(job.losses()) > told["step"] + 3, 240, "the job going on", job.said)
        assert f"going on with this run from step {told['step']}" in job.output.read_text()
        ranks = [node.ranks()[0] for node in nodes]
        ranks[1].kill()
        told = job.told()
        assert (told["cause"], told["code"]) == ("lost_rank", 5), job.said()
        assert "lost rank 1 on node-b: " in told["message"]
        wait_for(lambda: slurm.state_of(number) == "FAILED", 240, "the end of the job", lambda: slurm.ask("squeue"))
        wait_for(lambda: not any(node.ranks() for node in nodes), 120, "the end of the ranks", job.said)
        log = (job.run / "logs" / "rank-00001.log").read_text()
        assert log.count("=====") == 2 and log.count("rank 1 of 2 on node-b") == 2
    finally:
        job.launcher.kill()
        job.launcher.wait()
