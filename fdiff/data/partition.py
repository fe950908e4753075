"""The three seeded splits of a data set among clients, as index arrays, from labels alone.

Every split draws from `np.random.RandomState(seed)`, whose sequence is that of NumPy's legacy global
generator after `np.random.seed(seed)`, without touching it: the published partitions come out exactly.
This module knows nothing of images, files or processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fdiff.errors import UserError

KINDS = ("iid", "label-skew", "quantity-skew")
MIN_IMAGES = 10  # what every client of a skewed split must get
MAX_DRAWS = 1000
MAX_BETA = 1e6  # with which all shares are alike to a thousandth; of the largest numbers they are no numbers


def iid(n: int, clients: int, seed: int) -> list[np.ndarray]:
    """Permute 0…n-1 and split in `clients` pieces whose sizes differ by at most one; int64 each."""
    _check_enough(n, clients, 1, "iid")
    return np.array_split(np.random.RandomState(seed).permutation(n), clients)


def label_skew(labels: np.ndarray, clients: int, beta: float, seed: int) -> list[np.ndarray]:
    """Each class is spread over the clients by Dirichlet(beta) proportions; int64 indices of each client.

    `labels` is (n,), integer. The draw is repeated until every client has at least 10 images; after 1,000
    draws, or where no draw could do it, UserError says what to change.
    """
    _check_enough(len(labels), clients, MIN_IMAGES, "label-skew")
    _check_beta(beta)
    random = np.random.RandomState(seed)
    for _ in range(MAX_DRAWS):
        shards = _draw_label_skew(labels, clients, beta, random)
        if min(map(len, shards)) >= MIN_IMAGES:
            return shards
    raise _gave_up("label-skew", clients, beta)


def quantity_skew(n: int, clients: int, beta: float, seed: int) -> list[np.ndarray]:
    """Permute 0…n-1, then cut it by Dirichlet(beta) shares; int64 indices of each client.

    The shares are drawn again until the smallest is at least 10 images; errors as for `label_skew`.
    """
    _check_enough(n, clients, MIN_IMAGES, "quantity-skew")
    _check_beta(beta)
    random = np.random.RandomState(seed)
    order = random.permutation(n)
    for _ in range(MAX_DRAWS):
        shares = random.dirichlet(np.repeat(beta, clients))
        if np.min(shares * n) >= MIN_IMAGES:  # false for the NaNs of an underflowing beta
            return _cut(order, shares)
    raise _gave_up("quantity-skew", clients, beta)


def partition_indices(labels: np.ndarray, kind: str, clients: int, beta: float, seed: int) -> list[np.ndarray]:
    """Split the images with these `labels` (n,) by `kind`, one of `KINDS`; int64 indices of each client.

    The shards are disjoint and together hold every index once. Only `label-skew` looks at the labels.
    """
    if kind == "iid":
        return iid(len(labels), clients, seed)
    if kind == "label-skew":
        return label_skew(labels, clients, beta, seed)
    if kind == "quantity-skew":
        return quantity_skew(len(labels), clients, beta, seed)
    raise UserError(f"data.partition: {kind!r} does not split a data set; use one of {', '.join(KINDS)}")


def label_counts(labels: np.ndarray, shards: Sequence[np.ndarray]) -> list[dict[int, int]]:
    """For each shard the images it holds of each label, labels ascending, those without an image left out."""
    counts = [np.unique(labels[shard], return_counts=True) for shard in shards]
    return [dict(zip(present.tolist(), images.tolist(), strict=True)) for present, images in counts]


def _draw_label_skew(
    labels: np.ndarray, clients: int, beta: float, random: np.random.RandomState
) -> list[np.ndarray]:
    """One draw, class by class in label order, since all classes share one generator; sizes unchecked."""
    pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients, dtype=np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        random.shuffle(of_class)
        shares = random.dirichlet(np.repeat(beta, clients))
        shares = shares * (sizes < len(labels) / clients)
        if not shares.sum() > 0:  # a tiny beta gave all to clients that are full, or underflowed to NaN
            return [np.empty(0, dtype=np.int64)] * clients
        for client, piece in enumerate(_cut(of_class, shares / shares.sum())):
            pieces[client].append(piece)
            sizes[client] += len(piece)
    return [np.concatenate(of_client) for of_client in pieces]


def _cut(indices: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    return np.split(indices, (np.cumsum(shares) * len(indices)).astype(int)[:-1])


def _check_enough(n: int, clients: int, each: int, kind: str) -> None:
    if clients < 1:
        raise UserError(f"federation.clients: {clients} is too few; use at least 1")
    if n < each * clients:
        raise UserError(
            f"federation.clients: {clients} clients need at least {each * clients} images ({each} each) for "
            f"data.partition {kind}, the training split has {n}; use at most {n // each} or more images"
        )


def _check_beta(beta: float) -> None:
    if not 0 < beta <= MAX_BETA:
        raise UserError(f"data.beta: {beta} is not valid; use a number above 0 and at most {MAX_BETA:.0f}, such as 0.5")


def _gave_up(kind: str, clients: int, beta: float) -> UserError:
    return UserError(
        f"data.partition: {kind} with data.beta {beta} left some of {clients} clients with fewer than "
        f"{MIN_IMAGES} images in each of {MAX_DRAWS} draws; use a larger data.beta, fewer federation.clients "
        "or more images"
    )
