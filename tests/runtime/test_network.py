"""Interfaces of any host, and of this one: which of them a backend will use."""

from __future__ import annotations

import os

import pytest

from fdiff.runtime import network
from fdiff.runtime.network import chosen_by_gloo, chosen_by_nccl, ranges, steering_variables

HOST = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5", "eth1": "10.0.1.5", "ib0": "10.1.0.5"}


@pytest.mark.parametrize(
    ("asked", "one_node", "own", "expected"),
    [
        (None, True, "10.0.0.5", "lo"),
        (None, False, "10.0.0.5", "eth0"),
        (None, False, "127.0.1.1", ""),  # as Debian's installer has it in /etc/hosts
        (None, False, "127.0.0.1", ""),
        (None, False, None, ""),
        (None, False, "10.9.9.9", ""),
        ("eth1", True, "10.0.0.5", "eth1"),
        ("eth0,ib0", False, None, "eth0,ib0"),
        ("eth9", False, "10.0.0.5", ""),
        ("eth0,eth9", False, "10.0.0.5", ""),
    ],
)
def test_the_interface_of_gloo(asked, one_node, own, expected):
    name, why = chosen_by_gloo(HOST, one_node, own, {"GLOO_SOCKET_IFNAME": asked} if asked else {})
    assert name == expected
    assert why == (f"GLOO_SOCKET_IFNAME={asked}" if asked else why)
    if not asked and not one_node:
        assert (own or "no address") in why


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["ib0"]),
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth1,ib0", ["eth1", "ib0"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "docker0", "eth1", "ib0"]),
        ("hsn", []),
    ],
)
def test_the_interfaces_of_nccl(asked, expected):
    assert chosen_by_nccl(HOST, False, {"NCCL_SOCKET_IFNAME": asked} if asked else {})[0] == expected


def test_the_interfaces_of_nccl_where_nothing_is_asked():
    assert chosen_by_nccl(HOST, True, {})[0] == ["lo"]
    assert chosen_by_nccl(["lo", "docker0", "eth0"], False, {})[0] == ["eth0"]
    assert chosen_by_nccl(["lo", "docker0"], False, {})[0] == ["docker0"]
    assert chosen_by_nccl(["lo"], False, {})[0] == ["lo"]


def test_the_variables_that_steer_are_told_and_those_of_a_rank_are_not():
    told = {"NCCL_DEBUG": "INFO", "OMPI_MCA_btl": "self,tcp", "UCX_TLS": "all", "OMP_NUM_THREADS": "2"}
    others = {"OMPI_COMM_WORLD_RANK": "0", "PATH": "/bin", "HOME": "/", "MY_NCCL_KEY": "secret", "OMPI_ARGV": "x"}
    assert steering_variables({**others, **told}) == told
    assert steering_variables(others) == {}


def test_cores_as_taskset_writes_them():
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([8, 0, 1, 2, 3, 10]) == "0-3,8,10"


def test_this_host():
    assert network.interfaces()["lo"] == "127.0.0.1"
    cores = network.own_cores()
    first, *_ = sorted(os.sched_getaffinity(0))
    assert cores.startswith(str(first))
