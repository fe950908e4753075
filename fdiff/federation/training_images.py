"""The images of a run, found and looked at by all ranks together, before there is a model.

Ranks that split one data set see the same one; private silos number classes alike; side and channels that are not given
are those of the images. What all ranks are told of images are names of classes, counts, sizes and checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blake3 import blake3

from fdiff.comm import Communicator, SoloCommunicator, exchange_json
from fdiff.config import Config, DataConfig, stages_of
from fdiff.data import (
    Findings,
    Source,
    Split,
    as_source,
    colours,
    fingerprint,
    first_difference,
    infer_shape,
    inspect,
    list_split,
    merge,
    merge_classes,
    read_client_split,
    read_split,
    split_source,
    without_unfit,
)
from fdiff.errors import UserError
from fdiff.federation.voting import together
from fdiff.plan import hosted_by

Fingerprint = dict[str, str]


@dataclass(frozen=True)
class OpenedData:
    """The training images: `config` with their shape; `sources` of this rank's clients, or the one that is split.

    `fingerprints` are those of all clients' silos in turn, or that of the data set; `notes` are lines for the log.
    """

    config: Config
    sources: list[Source]
    fingerprints: list[Fingerprint]
    notes: list[str]


def open_data(config: Config, comm: Communicator) -> OpenedData:
    """Every rank opens the training images that it may see. UserError, on all ranks, where they are unfit."""
    data, private = config.data, config.data.partition == "private"
    clients = hosted_by(comm.rank, config.federation.clients, comm.size) if private else range(1)
    splits = together(comm, lambda: [_read(data, client) for client in clients])
    if not private:
        _check_same_data(comm, splits[0], data.root)
    names = exchange_json(comm, [list(split.classes) for split in splits])
    if private:
        classes = together(comm, lambda: merge_classes(of_split for of_rank in names for of_split in of_rank))
        splits = [split.numbered_by(classes) for split in splits]

    def look(split: Split) -> Findings:
        ends = [len(split) * rank // comm.size for rank in (comm.rank, comm.rank + 1)]  # neighbours lie together
        return inspect(split, range(len(split)) if private else range(*ends), data)

    own = together(comm, lambda: [look(split) for split in splits])
    everyone = [[Findings(**found) for found in rank] for rank in exchange_json(comm, [vars(found) for found in own])]
    found = merge([of_split for of_rank in everyone for of_split in of_rank])
    unfit = [one.unfit for one in own] if private else [found.unfit]
    splits = together(comm, lambda: [without_unfit(*pair) for pair in zip(splits, unfit, strict=True)])
    together(comm, lambda: _check_range(data, found))
    config = together(comm, lambda: replace(config, data=infer_shape(data, found, stages_of(config.model))))
    sources = together(comm, lambda: [as_source(split, config.data) for split in splits])
    prints = _fingerprints(comm, data, splits, clients)
    left_out = sum(len(one.unfit) for of_rank in everyone for one in of_rank)
    return OpenedData(config, sources, prints, _notes(config, found, left_out, prints))


def infer_image_shape(config: Config, comm: Communicator) -> Config:
    """The configuration with side and channels of the images, which are opened only if they are not given or known."""
    try:
        channels, side, _ = config.data.shape
    except UserError:
        return open_data(config, comm).config
    return replace(config, data=replace(config.data, channels=channels, image_side=side))


def count_images(config: Config) -> dict[int, int]:
    """Training images of each client, counted by this process alone; UserError where it cannot see them all."""
    opened = open_data(config, SoloCommunicator())
    if config.data.partition == "private":
        return {client: len(source) for client, source in enumerate(opened.sources)}
    split = split_source(opened.sources[0], opened.config.data, config.federation.clients)
    return {client: len(indices) for client, indices in enumerate(split)}


def _read(data: DataConfig, client: int) -> Split:
    return read_client_split(data, client, "train") if data.partition == "private" else read_split(data, "train")


def _check_range(data: DataConfig, found: Findings) -> None:
    """UserError if a range is given of images that have none of their own to give."""
    if data.range is not None and found.images and not found.deep:
        low, high = data.range
        raise UserError(
            f"data.range: [{low:g},{high:g}] is not valid with images of 8 bits a channel, whose values go from 0 to "
            "255; leave it out"
        )


def _check_same_data(comm: Communicator, split: Split, root: str | None) -> None:
    """UserError on every rank if they are about to split different images; it names the first that differs."""
    if comm.size == 1:
        return
    lines = together(comm, lambda: list_split(split, root))
    if len(set(exchange_json(comm, blake3("\n".join(lines).encode()).hexdigest()))) == 1:
        return
    lists = [json.loads(zlib.decompress(sent)) for sent in comm.exchange(zlib.compress(json.dumps(lines).encode()))]
    error = UserError(f"data.root: the ranks see different images: {first_difference(lists)}; give all the same")
    error.agreed = True
    raise error


def _fingerprints(
    comm: Communicator, data: DataConfig, splits: Sequence[Split], clients: Sequence[int]
) -> list[Fingerprint]:
    """Of each client's silo, or of the data set, which rank 0 reads."""
    private = data.partition == "private"

    def own() -> list[Fingerprint]:
        roots = [(data.root or "").replace("{client}", str(client)) if private else data.root for client in clients]
        return [fingerprint(*pair) for pair in zip(splits, roots, strict=True)] if private or comm.rank == 0 else []

    return [one for of_rank in exchange_json(comm, together(comm, own)) for one in of_rank]


def _notes(config: Config, found: Findings, unfit: int, prints: Sequence[Fingerprint]) -> list[str]:
    """What a person is to know of the images: a line of what they are, and one of each thing not taken as it is."""
    data = config.data
    channels, side, _ = data.shape
    notes = [
        f"{data.dataset}, {found.images} training images of {found.sizes}, {colours(max(found.numbers, default=1))}; "
        f"the model sees {side}x{side} {colours(channels)}"
    ]
    if data.range is not None:
        eight = f", {found.images - found.deep} of them in 8 bits" if found.deep < found.images else ""
        notes.append(f"the images have values from {data.range[0]:g} to {data.range[1]:g}{eight}, kept as float32")
    if found.transparent:
        notes.append(f"{found.transparent} images may be transparent; behind them is {data.background}")
    if found.frames:
        notes.append(f"{found.frames} images have several frames or pages; the first is taken")
    if unfit:
        notes.append(f"{unfit} image files are unfit and left out, e.g. {next(iter(found.unfit.values()))}")
    first: dict[str, int] = {}
    for client, one in enumerate(prints):
        if (twin := first.setdefault(one["contents"] + one["labels"], client)) != client:
            return [*notes, f"clients {twin} and {client} have the same images; is that meant?"]
    return notes
