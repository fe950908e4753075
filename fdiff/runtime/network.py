"""Which network interfaces a backend will use, which variables steer it, which cores this process is bound to.

What is set, and which interfaces there are, are parameters of the decisions, so that they can be tested anywhere.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

STEERING = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_GLOO_", "UCX_", "OMPI_")
BESIDES = ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
OF_A_RANK = ("OMPI_COMM_WORLD_", "OMPI_APP_", "OMPI_ARGV", "OMPI_COMMAND", "OMPI_FILE_LOCATION", "OMPI_FIRST_RANKS")
SIOCGIFADDR = 0x8915  # of Linux's sockios.h
INFINIBAND = Path("/sys/class/infiniband")


def steering_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What is set of the variables that steer NCCL, gloo, UCX and Open MPI; also threads and meeting place.

    Not of those by which mpirun tells a rank its place.
    """
    found = {n: v for n, v in environment.items() if n.startswith(STEERING) and not n.startswith(OF_A_RANK)}
    return dict(sorted(found.items())) | {n: environment[n] for n in BESIDES if n in environment}


def interfaces() -> dict[str, str]:
    """The IPv4 address of each interface of this host that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", os.fsencode(name)[:15]))
            try:
                fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(request.tobytes()[20:24])
    return found


def address_of_host() -> str | None:
    """The address to which this host's own name resolves; None if it does not."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def infiniband() -> list[str]:
    """The InfiniBand and RoCE devices."""
    return sorted(device.name for device in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []


def chosen_by_gloo(
    found: Mapping[str, str], one_node: bool, own_address: str | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str]:
    """(interface, why) that gloo's sockets will be on; no interface where it has none that other nodes reach."""
    if asked := environment.get("GLOO_SOCKET_IFNAME"):
        names = [name for name in asked.split(",") if name in found]
        missing = [name for name in asked.split(",") if name not in found]
        return ("" if missing else ",".join(names)), f"GLOO_SOCKET_IFNAME={asked}"
    if one_node:
        return "lo", "all ranks are on this node"
    name = next((name for name, address in found.items() if address == own_address), "")
    resolved = f"this host's name resolves to {own_address or 'no address'}"
    return ("" if name == "lo" or (own_address or "127.").startswith("127.") else name), resolved


def chosen_by_nccl(
    found: Iterable[str], one_node: bool, environment: Mapping[str, str] = os.environ
) -> tuple[list[str], str]:
    """(interfaces, why) from which NCCL takes its sockets: see NCCL_SOCKET_IFNAME in NVIDIA's documentation.

    The names of the variable are beginnings of names, exact after `=`, those to be left out after `^`.
    """
    names = list(found)
    if asked := environment.get("NCCL_SOCKET_IFNAME"):
        leave_out, exact = asked.startswith("^"), asked.lstrip("^").startswith("=")
        words = asked.lstrip("^=").split(",")
        hits = [n for n in names if any(n == w if exact else n.startswith(w) for w in words)]
        return [n for n in names if (n in hits) != leave_out], f"NCCL_SOCKET_IFNAME={asked}"
    if one_node:
        return ["lo"], "all ranks are on this node"
    others = [n for n in names if n != "lo" and not n.startswith("docker")]
    first = [n for n in others if n.startswith("ib")]
    return first or others or [n for n in names if n.startswith("docker")] or ["lo"], "NCCL's own choice"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as `taskset` writes them: 0-3,8."""
    text, left = [], sorted(numbers)
    while left:
        first = last = left.pop(0)
        while left and left[0] == last + 1:
            last = left.pop(0)
        text.append(f"{first}" if first == last else f"{first}-{last}")
    return ",".join(text)


def own_cores() -> str:
    """The cores that this process may run on."""
    return ranges(os.sched_getaffinity(0))
