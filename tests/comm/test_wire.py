"""What really crosses the wire: four ranks in four network namespaces, the kernel's counters against the plan."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from jobs import ROOT, clean_env, execute, on_ranks
from mpi_libraries import find

from fdiff.bench import wire
from fdiff.bench.network import INTERFACE, Network, network, why_not
from fdiff.comm import SoloCommunicator
from fdiff.config import FederationConfig, to_dict
from fdiff.federation.forecast import forecast_run
from fdiff.presets import preset
from fdiff.registry import BUILT_IN
from fdiff.runtime import launcher

RANKS = 4
CLONE_NEWNET = 0x40000000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
FLAGS = """--preset fmnist --federation.clients 4 --federation.rounds 3 --federation.local_epochs 1
    --data.dataset embedded --data.limit 8 --data.image_side 8 --sample.every 0 --run.checkpoint_every 3
    --runtime.threads 1 --runtime.timeout_s 120""".split()


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """Four namespaces, joined by a bridge."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(network(RANKS))
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made


def sent(net: Network) -> int:
    """Bytes that all interfaces together have sent, headers included."""
    return sum(net.sent(rank) for rank in range(RANKS))


def run_in(net: Network, method: str, port: int, cwd: Path) -> int:
    """Train with one rank in each namespace; the bytes that all interfaces together sent."""
    before = sent(net)
    go_in = partial(enter, tuple(net.namespaces), net.address(0), port)
    words = ["train", *FLAGS, "--method", method, "--run.dir", method]
    for rank in on_ranks(RANKS, *words, cwd=cwd, before=go_in):
        rank.check()
    return sent(net) - before


def enter(namespaces: tuple[str, ...], address: str, port: int, rank: int) -> None:
    """This process goes into its rank's namespace, as `ip netns exec` would start it there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespaces[rank]}") as namespace:
        assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    os.environ.update(launcher.environment_of(rank, RANKS, address, port, INTERFACE, clean_env()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs go."""
    return tmp_path_factory.mktemp("wire")


@pytest.fixture(scope="module")
def measured(net, folder) -> dict[str, int]:
    """Bytes sent by method."""
    return {method: run_in(net, method, 29_700 + i, folder) for i, method in enumerate(BUILT_IN["method"])}


def planned(method: str) -> int:
    federation = FederationConfig(clients=4, rounds=3, local_epochs=1)
    return forecast_run(replace(preset("fmnist"), method=method, federation=federation), RANKS)["wire_bytes"]


@pytest.mark.parametrize("method", BUILT_IN["method"])
def test_the_interfaces_count_what_the_plan_says(measured, method):
    print(f"{method}: {measured[method]:,} bytes sent, {planned(method):,} planned")
    assert planned(method) <= measured[method] <= 1.03 * planned(method)


def test_usplit_moves_two_thirds_of_full(measured):
    assert abs(measured["usplit"] / measured["full"] - 2 / 3) < 0.02


# --- the same under mpirun, whose ranks go into the namespaces one by one --------------------------------------------

INTO_NAMESPACE = """#!/bin/sh
exec ip netns exec {prefix}${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} "$@"
"""
TCP_ONLY = {  # neither may notice that its ranks share a node, and use its memory
    "openmpi": ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0", "--pmixmca", "ptl_tcp_if_include"],
    "mpich": ["-genv", "MPIR_CVAR_NOLOCAL", "1", "-genv", "UCX_TLS", "tcp,self", "-genv", "UCX_NET_DEVICES", "eth0"],
}


# The ring and the calls are ours, whichever library carries them out: gloo does in the tests above.
@pytest.mark.rare
@pytest.mark.parametrize("name", ["openmpi", "mpich"])
def test_under_mpirun_over_tcp_the_interfaces_count(name, net, tmp_path):
    """Headers apart, what the plan says: round the ring, and by the library's own all-reduce."""
    mpi, config = find(name), preset("fmnist")
    wrapper, file = tmp_path / "into-namespace", tmp_path / "config.yaml"
    wrapper.write_text(INTO_NAMESPACE.format(prefix=net.namespaces[0][:-1]))
    wrapper.chmod(0o755)
    runtime = replace(config.runtime, comm="mpi", device="cpu", threads=1, timeout_s=120.0)
    file.write_text(yaml.safe_dump(to_dict(replace(config, runtime=runtime))))
    options = [*TCP_ONLY[name], *([net.bridge] if name == "openmpi" else [])]
    command = [*mpi.mpirun, *options, "-n", RANKS, wrapper, mpi.python, "-m", "fdiff.bench.wire_rank", file, 1000]
    done = execute(command, tmp_path, env=clean_env(PYTHONPATH=str(ROOT))).check()
    rows = next(json.loads(line) for line in done.out.splitlines() if line.startswith("["))
    ratios = {r["name"].split(",")[0]: r["median"] / r["beside"] for r in rows if r["name"].endswith("bytes a round")}
    print(name, {method: round(ratio, 3) for method, ratio in ratios.items()})
    assert ratios.keys() == set(BUILT_IN["method"]) and all(1 <= ratio <= 1.03 for ratio in ratios.values())


# --- over slow links -------------------------------------------------------------------------------------------------


def test_bench_wire_counts_the_plans_bytes_on_a_slow_network(monkeypatch):
    """Headers apart, and votes and reports included. What its clocks say decides nothing here."""
    monkeypatch.setattr(wire, "RANKS", (2,))
    monkeypatch.setattr(wire, "MBIT_PER_S", (1000.0,))
    results = wire.run(preset("fmnist"), SoloCommunicator(), torch.device("cpu"))
    assert len(results) == 3 * len(BUILT_IN["method"])
    sizes = {r.name: r.ratio for r in results if r.name.endswith("bytes a round")}
    assert len(sizes) == len(BUILT_IN["method"]) and all(1 <= ratio <= 1.01 for ratio in sizes.values()), sizes
