"""Ranks each on a network of its own: namespaces joined by a bridge, over links as slow as wanted. Needs root.

The kernel counts what each rank sends. A link is as slow in one direction as in the other, as a cable is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

INTERFACE = "eth0"
BURST_S = 2e-3  # what a link lets through at once, in time at its bandwidth
SMALLEST_BURST = 65_536  # a packet before it is cut into frames

_made = count()


def why_not() -> str | None:
    """Why no such network can be made here, and what to do; or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    return f"not found: {', '.join(missing)} (apt install iproute2)" if missing else None


@dataclass(frozen=True)
class Network:
    """Its namespaces, one a rank, and the bridge that joins them, whose end here has the address `gate`.

    Networks of several processes have subnets of their own, as far as process ids tell.
    """

    namespaces: tuple[str, ...]
    bridge: str
    subnet: str

    @property
    def gate(self) -> str:
        """The address by which this side of the bridge is reached."""
        return f"{self.subnet}.254"

    def address(self, rank: int) -> str:
        """Where the others find a rank."""
        return f"{self.subnet}.{rank + 1}"

    def inside(self, rank: int, *command: object) -> list[str]:
        """A command to be run in a rank's namespace."""
        return ["ip", "netns", "exec", self.namespaces[rank], *map(str, command)]

    def sent(self, rank: int) -> int:
        """Bytes that a rank's interface has sent, headers included."""
        counter = Path("/sys/class/net") / INTERFACE / "statistics" / "tx_bytes"
        return int(_output(self.inside(rank, "cat", counter)))


@contextmanager
def network(ranks: int, mbit_per_s: float | None = None) -> Iterator[Network]:
    """A network of so many ranks, gone at the end of the block; OSError with `ip`'s words if it cannot be made."""
    number = next(_made)
    tag, place = f"fd{os.getpid() % 10_000}x{number}", (os.getpid() + number) % (50 * 256)  # a name has 15 letters
    subnet = f"10.{200 + place // 256}.{place % 256}"
    made = Network(tuple(f"{tag}n{rank}" for rank in range(ranks)), f"{tag}br", subnet)
    try:
        _ip("link", "add", made.bridge, "type", "bridge")
        _ip("link", "set", made.bridge, "up")
        _ip("addr", "add", f"{made.gate}/24", "dev", made.bridge)
        for rank, name in enumerate(made.namespaces):
            _join(made, rank, name, f"{tag}v{rank}", mbit_per_s)
        yield made
    finally:
        for name in made.namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", made.bridge], capture_output=True)


def _join(made: Network, rank: int, name: str, here: str, mbit_per_s: float | None) -> None:
    _ip("netns", "add", name)
    _ip("link", "add", here, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _ip("link", "set", here, "master", made.bridge, "up")
    _ip("-n", name, "addr", "add", f"{made.address(rank)}/24", "dev", INTERFACE)
    _ip("-n", name, "link", "set", INTERFACE, "up")
    _ip("-n", name, "link", "set", "lo", "up")
    if mbit_per_s is not None:
        burst = max(SMALLEST_BURST, int(mbit_per_s * 1e6 / 8 * BURST_S))
        limit = ["root", "tbf", "rate", f"{mbit_per_s}mbit", "burst", burst, "latency", "100ms"]
        _output(["tc", "-n", name, "qdisc", "add", "dev", INTERFACE, *map(str, limit)])
        _output(["tc", "qdisc", "add", "dev", here, *map(str, limit)])


def _ip(*words: str) -> None:
    _output(["ip", *words])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
