"""What carries the ranks' talk goes away: a link, for a while or for good, or the store that a launcher served."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from forked_jobs import free_port
from jobs import ROOT, TINY, arrays, clean_env, fdiff
from launchers import wait_for

from fdiff.bench.network import INTERFACE, Network, network, why_not
from fdiff.runtime import launcher

pytestmark = pytest.mark.slow
needs_networks = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
COMMON = [*TINY, "--runtime.reduction", "ordered", "--sample.every", "0", "--run.keep_checkpoints", "2"]
SERVE = "import sys, time, torch.distributed as d; s = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, "
SERVE += "wait_for_workers=False); print('serves', flush=True); time.sleep(600)"


@contextmanager
def ranks(
    commands: Sequence[list[str]], envs: Sequence[dict[str, str]], folder: Path
) -> Iterator[list[subprocess.Popen]]:
    """A process for each command, which prints into a file of its own; those that are left are killed."""
    with ExitStack() as stack:
        jobs = []
        for rank, (command, env) in enumerate(zip(commands, envs, strict=True)):
            out = stack.enter_context((folder / f"{rank}.out").open("wb"))
            jobs.append(subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out))
            stack.callback(jobs[-1].wait)
            stack.callback(jobs[-1].kill)
        yield jobs


@contextmanager
def two_networks(rounds: int, folder: Path) -> Iterator[tuple[Network, list[subprocess.Popen]]]:
    """A training of two ranks, each in a network of its own, and that network."""
    port = free_port()
    with network(2) as net:
        flags = ["--federation.rounds", str(rounds), "--run.dir", "run"]
        train = [sys.executable, "-m", "fdiff", "train", *COMMON, *flags]
        envs = [launcher.environment_of(r, 2, net.address(0), port, INTERFACE, clean_env()) for r in range(2)]
        commands = [net.inside(rank, *train) for rank in range(2)]
        with ranks(commands, [{**env, "PYTHONPATH": str(ROOT)} for env in envs], folder) as jobs:
            wait_for(lambda: (folder / "run/checkpoints/round-000002").exists(), 120, "two rounds")
            yield net, jobs


def set_link(net: Network, rank: int, state: str) -> None:
    subprocess.run(["ip", "-n", net.namespaces[rank], "link", "set", INTERFACE, state], check=True)


def errors(folder: Path, rank: int) -> list[str]:
    return [line for line in (folder / f"{rank}.out").read_text().splitlines() if line.startswith("fdiff: error")]


@needs_networks
@pytest.mark.rare  # TCP does what it has always done
def test_a_link_that_comes_back_changes_nothing(tmp_path):
    with two_networks(15, tmp_path) as (net, jobs):
        set_link(net, 0, "down")
        time.sleep(5)
        set_link(net, 0, "up")
        assert [job.wait(120) for job in jobs] == [0, 0], [errors(tmp_path, rank) for rank in range(2)]
    fdiff("train", *COMMON, "--federation.rounds", 15, "--run.dir", "whole", cwd=tmp_path).check()
    expected, found = arrays(tmp_path / "whole", 15), arrays(tmp_path / "run", 15)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.rare  # for a minute it waits
@needs_networks
def test_a_link_that_is_gone_for_good_ends_both_sides_in_about_a_minute(tmp_path):
    with two_networks(100_000, tmp_path) as (net, jobs):
        set_link(net, 0, "down")
        began = time.monotonic()
        assert [job.wait(120) for job in jobs] == [1, 1]
        assert 40 < time.monotonic() - began < 90
    assert [len(errors(tmp_path, rank)) for rank in range(2)] == [1, 1]
    assert "rank 1" in errors(tmp_path, 0)[0] and "rank 0 did not answer within 60 s" in errors(tmp_path, 1)[0]


def test_the_end_of_a_store_that_a_launcher_served_is_one_line_that_names_it(tmp_path):
    """By what torchrun's agent sets; the rank lives whose number the store's place would have named."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout and server.stdout.readline() == "serves\n"
        agent = {"TORCHELASTIC_RUN_ID": "a-job", "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
        envs = [
            clean_env(**agent, **{n: str(v) for n, v in place.items()})
            for place in (
                {"RANK": r, "WORLD_SIZE": 2, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port} for r in range(2)
            )
        ]  # fmt: skip
        train = [sys.executable, "-m", "fdiff", "train", *COMMON, "--federation.rounds", "100000", "--run.dir", "run"]
        with ranks([train] * 2, envs, tmp_path) as jobs:
            wait_for(lambda: (tmp_path / "run/checkpoints/round-000002").exists(), 120, "two rounds")
            server.kill()
            assert [job.wait(60) for job in jobs] == [1, 1]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    for rank in range(2):
        (said,) = errors(tmp_path, rank)
        where = f"the store through which the ranks talk is gone: that of torchrun's agent at 127.0.0.1:{port}"
        assert where in said or "Connection" in said, said
        assert "frame #" not in (tmp_path / f"{rank}.out").read_text()
