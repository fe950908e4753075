"""What a run says of itself before its first round: where it runs, what it trains on, what it will send and need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdiff.config import Config
from fdiff.federation.assemble import RankSetup
from fdiff.federation.forecast import bytes_by_purpose
from fdiff.federation.memory import GIB, Memory, memory_of_rank
from fdiff.federation.validate import shared_parts
from fdiff.plan import hosted_at

MOST_PARTS, MOST_HOSTS = 6, 4  # more are summed up
END = "end: an estimate follows the first round"


def header_of(rank: RankSetup, last_round: int) -> list[str]:
    """The header of a run that goes on after this round, 0 for a new one, as a rank sees it."""
    config, comm = rank.config, rank.comm
    if last_round >= config.federation.rounds:
        return [_folder(config.run_dir, last_round, config.federation.rounds), *_data(rank.opened.notes)]
    sent = bytes_by_purpose(rank.plan(last_round + 1), config, rank.payload, rank.placement)
    memory = memory_of_rank(config, comm.rank, comm.size, len(hosted_at(rank.placement, comm.rank)))
    on_gpu = rank.host.trainer.device.type == "cuda"
    return header_lines(config, rank.setting, rank.opened.notes, rank.sizes, sent, memory, on_gpu, last_round)


def header_lines(
    config: Config,
    setting: Mapping[str, Any],
    notes: Sequence[str],
    sizes: Mapping[str, int],
    sent: Mapping[str, int],
    memory: Memory,
    on_gpu: bool,
    last_round: int,
) -> list[str]:
    """The lines: of a run's setting, the notes on its images, parameters by part, bytes of a round by purpose.

    `memory` is that of a rank, whose device is a GPU or the host itself.
    """
    fed = config.federation
    return [
        _folder(config.run_dir, last_round, fed.rounds),
        f"ranks: {_ranks(setting['ranks'])}, communicator {setting['communicator']}",
        *_data(notes),
        f"clients: {_clients(setting['clients'])}",
        f"model: {config.model.kind}, {_parameters(sizes)}",
        f"method: {config.method}, shares {', '.join(shared_parts(config))}",
        f"round: local epochs {fed.local_epochs}, on the wire {_bytes(sent)}",
        f"memory: at least {_memory(memory, on_gpu)}",
        *[END] * (fed.rounds - last_round > 1),
    ]


def _folder(folder: Path, last_round: int, rounds: int) -> str:
    if not last_round:
        return f"run: {folder}, {rounds} round{'s' * (rounds > 1)}"
    if last_round >= rounds:
        return f"run: {folder} has all its {rounds} rounds already"
    return f"run: {folder} goes on with round {last_round + 1} of {rounds}"


def _data(notes: Sequence[str]) -> list[str]:
    return [f"data: {note}" for note in notes]


def _ranks(ranks: Sequence[Mapping[str, str]]) -> str:
    hosts = Counter((rank["host"], rank["device"]) for rank in ranks)
    shown = [f"{n} × {device} on {host}" for (host, device), n in list(hosts.items())[:MOST_HOSTS]]
    more = sum(list(hosts.values())[MOST_HOSTS:])
    return f"{len(ranks)} ({', '.join(shown)}{f', {more} on other nodes' if more else ''})"


def _clients(clients: Sequence[Mapping[str, Any]]) -> str:
    by_size = sorted(clients, key=lambda row: row["images"])
    small, large = by_size[0], by_size[-1]
    classes = {label for row in clients for label, n in row.get("labels", {}).items() if n}
    told = f"{len(clients)}, each with {small['images']:,} images"
    if small["images"] < large["images"]:
        ends = (f"{row['images']:,} images (client {row['client']})" for row in (small, large))
        told = f"{len(clients)}, with {' to '.join(ends)}"
    return told + (f"; {len(classes)} classes" if len(classes) > 1 else "")


def _parameters(sizes: Mapping[str, int]) -> str:
    by_part = ", ".join(f"{part} {n:,}" for part, n in sizes.items())
    return f"{sum(sizes.values()):,} parameters" + (f" ({by_part})" if 1 < len(sizes) <= MOST_PARTS else "")


def _bytes(sent: Mapping[str, int]) -> str:
    total = sum(sent.values())
    return f"{total / 1e6:,.1f} MB" if total else "nothing"


def _memory(memory: Memory, on_gpu: bool) -> str:
    if on_gpu:
        return f"{memory.device / GIB:.2f} GiB of a rank's GPU and {memory.host / GIB:.2f} GiB of the host"
    return f"{(memory.device + memory.host) / GIB:.2f} GiB a rank, beside the libraries and the images"
