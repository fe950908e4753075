"""What really crosses the wire: four ranks in four network namespaces, the kernel's counters against the plan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT, clean_env, execute
from mpis import find

from fdiff.config import FederationConfig, preset
from fdiff.forecast import forecast
from fdiff.plan import SHARED_PARTS

RANKS = 4
GATE = "10.213.0.254"  # this end of the bridge, at which mpirun's ranks find it
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs the program ip: apt install iproute2"),
]
FLAGS = """--preset fmnist --federation.clients 4 --federation.rounds 3 --federation.local_epochs 1
    --data.dataset embedded --data.limit 8 --data.image_side 8 --sample.every 0 --run.checkpoint_every 3
    --runtime.threads 1 --runtime.timeout_s 120""".split()


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[list[str]]:
    """Four namespaces, each with one interface `eth0` at 10.213.0.(1+i), joined by a bridge."""
    tag = f"fd{os.getpid() % 10_000}"
    names = [f"{tag}n{i}" for i in range(RANKS)]
    try:
        ip("link", "add", f"{tag}br", "type", "bridge")
        ip("link", "set", f"{tag}br", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{tag}v{i}", "master", f"{tag}br", "up")
            ip("-n", name, "addr", "add", f"10.213.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        ip("addr", "add", f"{GATE}/24", "dev", f"{tag}br")
    except subprocess.CalledProcessError as error:
        _remove(tag, names)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield names
    _remove(tag, names)


def _remove(tag: str, names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    subprocess.run(["ip", "link", "del", f"{tag}br"], check=False, capture_output=True)


def sent(name: str) -> int:
    """Bytes that the namespace's interface has sent, headers included."""
    counter = ["ip", "netns", "exec", name, "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
    return int(subprocess.run(counter, check=True, capture_output=True, text=True).stdout)


def run_in(network: list[str], method: str, port: int, cwd: Path) -> int:
    """Train with one rank in each namespace; the bytes that all interfaces together sent."""
    before = sum(map(sent, network))
    ranks = []
    for rank, name in enumerate(network):
        place = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        env = clean_env(**{k: str(v) for k, v in place.items()}, MASTER_ADDR="10.213.0.1", MASTER_PORT=str(port))
        env |= {"GLOO_SOCKET_IFNAME": "eth0"}
        command = [sys.executable, "-m", "fdiff", "train", *FLAGS, "--method", method, "--run.dir", method]
        inside = ["ip", "netns", "exec", name, *command]
        ranks.append(subprocess.Popen(inside, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    printed = [rank.communicate(timeout=240)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, printed
    return sum(map(sent, network)) - before


@pytest.fixture(scope="module")
def measured(network, tmp_path_factory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("wire")
    return {method: run_in(network, method, 29_700 + i, folder) for i, method in enumerate(SHARED_PARTS)}


def planned(method: str) -> int:
    from dataclasses import replace

    federation = FederationConfig(clients=4, rounds=3, local_epochs=1)
    return forecast(replace(preset("fmnist"), method=method, federation=federation), RANKS)["wire_bytes"]


@pytest.mark.parametrize("method", SHARED_PARTS)
def test_the_interfaces_count_what_the_plan_says(measured, method):
    print(f"{method}: {measured[method]:,} bytes sent, {planned(method):,} planned")
    assert planned(method) <= measured[method] <= 1.03 * planned(method)


def test_usplit_moves_two_thirds_of_full(measured):
    assert abs(measured["usplit"] / measured["full"] - 2 / 3) < 0.02


# --- the same under mpirun, whose ranks go into the namespaces one by one --------------------------------------------

MPI_CASES = [("openmpi", "usplit"), ("mpich", "full")]
INTO_NAMESPACE = """#!/bin/sh
exec ip netns exec {prefix}${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} "$@"
"""
TCP_ONLY = {  # neither may notice that its ranks share a node, and use its memory
    "openmpi": ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0", "--pmixmca", "ptl_tcp_if_include"],
    "mpich": ["-genv", "MPIR_CVAR_NOLOCAL", "1", "-genv", "UCX_TLS", "tcp,self", "-genv", "UCX_NET_DEVICES", "eth0"],
}


@pytest.mark.parametrize("name, method", MPI_CASES)
def test_under_mpirun_over_tcp_the_interfaces_count_what_the_plan_says(name, method, network, tmp_path):
    mpi = find(name)
    wrapper = tmp_path / "into-namespace"
    wrapper.write_text(INTO_NAMESPACE.format(prefix=network[0][:-1]))
    wrapper.chmod(0o755)
    options = [*TCP_ONLY[name], *([network[0][:-2] + "br"] if name == "openmpi" else [])]
    train = [mpi.python, "-m", "fdiff", "train", *FLAGS, "--method", method, "--run.dir", "run"]
    before = sum(map(sent, network))
    command = [*mpi.mpirun, *options, "-n", RANKS, wrapper, *train]
    execute(command, tmp_path, env=clean_env(PYTHONPATH=str(ROOT))).check()
    measured = sum(map(sent, network)) - before
    print(f"{name}, {method}: {measured:,} bytes sent, {planned(method):,} planned")
    assert planned(method) <= measured <= 1.03 * planned(method)
