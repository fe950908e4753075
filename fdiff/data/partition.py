"""The four seeded splits of a data set among clients, as index arrays, from labels alone.

Every split draws from `np.random.RandomState(seed)`, whose sequence is that of NumPy's legacy global
generator after `np.random.seed(seed)`, without touching it: the published partitions come out exactly.
This module knows nothing of images, files or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fdiff.errors import UserError

KINDS = ("iid", "label-skew", "quantity-skew", "label-count")
MIN_IMAGES = 10  # what every client of a skewed split must get
MAX_DRAWS = 1000
MAX_BETA = 1e6  # with which all shares are alike to a thousandth; of the largest numbers they are no numbers
BETAS = [float(f"{10 ** (i / 24):.3g}") for i in range(-144, 145)]  # a refusal may name: 10 % apart, up to MAX_BETA

Draws = Callable[[float, int], "list[np.ndarray] | None"]  # the split by a beta in so many draws, or None


def iid(n: int, clients: int, seed: int) -> list[np.ndarray]:
    """Permute 0…n-1 and split in `clients` pieces whose sizes differ by at most one; int64 each."""
    _check_enough(n, clients, 1, "iid")
    return np.array_split(np.random.RandomState(seed).permutation(n), clients)


def label_skew(labels: np.ndarray, clients: int, beta: float, seed: int) -> list[np.ndarray]:
    """Each class is spread over the clients by Dirichlet(beta) proportions; int64 indices of each client.

    `labels` is (n,), integer. The draw is repeated until every client has at least 10 images; after 1,000
    draws, or where no draw could do it, UserError says what to change, and the smallest beta that works.
    """
    _check_enough(len(labels), clients, MIN_IMAGES, "label-skew")
    _check_beta(beta)
    draw = partial(_label_skew, _by_class(labels)[2], clients, seed)
    # To shuffle many images a thousand times takes seconds; half as many draws change the beta found by about 10 %.
    return _drawn(draw, "label-skew", clients, beta, MAX_DRAWS if len(labels) <= 20_000 else MAX_DRAWS // 2)


def quantity_skew(n: int, clients: int, beta: float, seed: int) -> list[np.ndarray]:
    """Permute 0…n-1, then cut it by Dirichlet(beta) shares; int64 indices of each client.

    The shares are drawn again until the smallest is at least 10 images; errors as for `label_skew`.
    """
    _check_enough(n, clients, MIN_IMAGES, "quantity-skew")
    _check_beta(beta)
    return _drawn(partial(_quantity_skew, n, clients, seed), "quantity-skew", clients, beta, MAX_DRAWS)


def label_count(labels: np.ndarray, clients: int, number: int, seed: int) -> list[np.ndarray]:
    """Each client has images of `number` classes, dealt at random; int64 indices of each client.

    `labels` is (n,), integer. The classes are held by equally many clients, but for one, and the images of a class
    are cut at random into equal pieces, but for one, among its holders. UserError says what to change where a class
    would belong to nobody, has fewer images than holders, or a client would have fewer than 10 images.
    """
    _check_enough(len(labels), clients, MIN_IMAGES, "label-count")
    classes, images, by_class = _by_class(labels)
    _check_number(images, clients, number, seed)
    random = np.random.RandomState(seed)
    dealt = _deal(images, clients, number, random)
    if short := _shortfall(classes, images, dealt, clients):
        raise UserError(f"data.partition: label-count with data.labels_per_client {number} {short}")
    pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for of_class, (holders, sizes) in zip(by_class, dealt, strict=True):
        cut = np.split(random.permutation(of_class), np.cumsum(sizes)[:-1])
        for client, piece in zip(holders, cut, strict=True):
            pieces[client].append(piece)
    return [np.concatenate(of_client) for of_client in pieces]


def partition_indices(
    labels: np.ndarray, kind: str, clients: int, beta: float, seed: int, labels_per_client: int = 2
) -> list[np.ndarray]:
    """Split the images with these `labels` (n,) by `kind`, one of `KINDS`; int64 indices of each client.

    The shards are disjoint and together hold every index once. Only `label-skew` and
    `label-count` look at the labels, only the two skews at `beta`.
    """
    if kind == "iid":
        return iid(len(labels), clients, seed)
    if kind == "label-skew":
        return label_skew(labels, clients, beta, seed)
    if kind == "quantity-skew":
        return quantity_skew(len(labels), clients, beta, seed)
    if kind == "label-count":
        return label_count(labels, clients, labels_per_client, seed)
    raise UserError(f"data.partition: {kind!r} does not split a data set; use one of {', '.join(KINDS)}")


def label_counts(labels: np.ndarray, shards: Sequence[np.ndarray]) -> list[dict[int, int]]:
    """For each shard the images it holds of each label, labels ascending, those without an image left out."""
    counts = [np.unique(labels[shard], return_counts=True) for shard in shards]
    return [dict(zip(present.tolist(), images.tolist(), strict=True)) for present, images in counts]


def _by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The labels there are (C,), ascending, how many images each has (C,), and the indices of these, ascending."""
    classes, images = np.unique(labels, return_counts=True)
    return classes, images, np.split(np.argsort(labels, kind="stable"), np.cumsum(images)[:-1])


def _drawn(draw: Draws, kind: str, clients: int, beta: float, search: int) -> list[np.ndarray]:
    """The split; a refusal names the smallest beta that works in `search` draws."""
    shards = draw(beta, MAX_DRAWS)
    if shards is None:
        raise _gave_up(kind, clients, beta, _smallest_beta(draw, beta, search))
    return shards


def _label_skew(
    by_class: list[np.ndarray], clients: int, seed: int, beta: float, draws: int
) -> list[np.ndarray] | None:
    """The first of so many draws that gives every client enough images; None if none does."""
    random = np.random.RandomState(seed)
    n = sum(map(len, by_class))
    for _ in range(draws):
        drawn = _draw_label_skew(by_class, n, clients, beta, random)
        if drawn is not None:
            pieces = [np.split(of_class, cuts) for of_class, cuts in drawn]
            return [np.concatenate(of_client) for of_client in zip(*pieces, strict=True)]
    return None


def _draw_label_skew(
    by_class: list[np.ndarray], n: int, clients: int, beta: float, random: np.random.RandomState
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """One draw: each class shuffled, and where it is cut (clients - 1,); None if a client got too few images.

    Class by class in label order, since all classes share one generator.
    """
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    sizes = np.zeros(clients, dtype=np.int64)
    for of_class in by_class:
        of_class = of_class.copy()
        random.shuffle(of_class)
        shares = random.dirichlet(np.repeat(beta, clients))
        if not np.isfinite(shares).all():  # a tiny beta underflowed
            return None
        shares = shares * (sizes < n / clients)
        total = shares.sum()
        if not total > 0:  # a small beta gave all to clients that are full
            return None
        cuts = _cuts(len(of_class), shares / total)
        drawn.append((of_class, cuts))
        sizes[:-1] += cuts  # less the cuts before, at the client behind each
        sizes[1:] -= cuts
        sizes[-1] += len(of_class)
    return drawn if sizes.min() >= MIN_IMAGES else None


def _quantity_skew(n: int, clients: int, seed: int, beta: float, draws: int) -> list[np.ndarray] | None:
    """The first of so many draws whose smallest share is enough images; None if none is."""
    random = np.random.RandomState(seed)
    order = random.permutation(n)
    for _ in range(draws):
        shares = random.dirichlet(np.repeat(beta, clients))
        if MIN_IMAGES <= np.min(shares * n) < np.inf:  # false for the NaNs and infinities of an underflowing beta
            return np.split(order, _cuts(n, shares))
    return None


def _cuts(n: int, shares: np.ndarray) -> np.ndarray:
    """Where to cut n images so that the pieces have these shares (k,); int64 (k - 1,)."""
    return (np.cumsum(shares) * n).astype(int)[:-1]


def _smallest_beta(draw: Draws, beta: float, search: int) -> float | None:
    """The smallest of `BETAS` above `beta` that gives a split in `search` draws while the one below does not.

    None if none is found.
    """
    betas = [other for other in BETAS if other > beta]
    found = None
    last = len(betas) - 1
    # A beta that fails costs all its draws: a few find one that works, and `search` draws the way down from it. Where
    # even the best hardly ever works, a few may find none.
    for draws, step in ((30, 7), (search, 24)):
        if found is None:
            found = next((i for i in (*range(0, last, step), last) if i >= 0 and draw(betas[i], draws)), None)
    while found and draw(betas[found - 1], search):
        found -= 1
    return None if found is None else betas[found]


def _deal(
    images: np.ndarray, clients: int, number: int, random: np.random.RandomState
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each class, of so many `images` (C,), the clients that hold it (h,), and how many images each gets (h,).

    `number` is at most C, and so many classes are held by each client; h may be larger than a class.
    """
    hands = np.empty((clients, number), dtype=np.int64)
    held = np.zeros(len(images), dtype=np.int64)
    for client in range(clients):
        # Those held by the fewest, drawn by lot where there are more of them: counts never differ by more than one.
        hands[client] = np.lexsort((random.permutation(len(images)), held))[:number]
        held[hands[client]] += 1
    by_class = np.split(np.argsort(hands, axis=None, kind="stable") // number, np.cumsum(held)[:-1])
    sizes = np.zeros(clients, dtype=np.int64)
    dealt = []
    for n, holders in zip(images, by_class, strict=True):
        holders = holders[np.argsort(sizes[holders], kind="stable")]  # one image more for those who have the fewest
        pieces = n // len(holders) + (np.arange(len(holders)) < n % len(holders))
        sizes[holders] += pieces
        dealt.append((holders, pieces))
    return dealt


def _shortfall(
    classes: np.ndarray, images: np.ndarray, dealt: list[tuple[np.ndarray, np.ndarray]], clients: int
) -> str:
    """What is wrong with the pieces dealt, and what to change; "" if nothing is."""
    sizes = np.zeros(clients, dtype=np.int64)
    for label, n, (holders, pieces) in zip(classes, images, dealt, strict=True):
        if n < len(holders):
            return (
                f"shares the {n} images of label {label} among {len(holders)} clients; use fewer federation.clients "
                "or more images"
            )
        sizes[holders] += pieces
    if sizes.min() < MIN_IMAGES:
        return (
            f"leaves client {sizes.argmin()} with {sizes.min()} images, and each needs {MIN_IMAGES}; use a larger "
            "data.labels_per_client, fewer federation.clients or more images"
        )
    return ""


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


def _check_number(images: np.ndarray, clients: int, number: int, seed: int) -> None:
    classes = len(images)
    if number < 1:
        raise UserError(f"data.labels_per_client: {number} is too few; use at least 1")
    if number > classes:
        raise UserError(
            f"data.labels_per_client: {number} is too many, the training images have {classes} classes; use at most "
            f"{classes}"
        )
    if clients * number >= classes:
        return
    more, others = -(-classes // clients), -(-classes // number)
    remedies = {f"data.labels_per_client {more}": (clients, more), f"{others} federation.clients": (others, number)}
    that_work = [remedy for remedy, (k, each) in remedies.items() if _works(images, k, each, seed)]
    raise UserError(
        f"data.partition: label-count with {clients} clients and data.labels_per_client {number} leaves the images of "
        f"{classes - clients * number} of {classes} classes to nobody; use {'' if that_work else 'more images, and '}"
        f"at least {' or '.join(that_work or remedies)}"
    )


def _works(images: np.ndarray, clients: int, number: int, seed: int) -> bool:
    if images.sum() < MIN_IMAGES * clients:
        return False
    dealt = _deal(images, clients, number, np.random.RandomState(seed))
    return not _shortfall(images, images, dealt, clients)


def _gave_up(kind: str, clients: int, beta: float, smallest: float | None) -> UserError:
    remedy = (
        f"no larger data.beta that was tried, up to {MAX_BETA:.0f}, works here; use"
        if smallest is None
        else f"the smallest data.beta that works here is about {smallest:.10g}, or use"
    )
    return UserError(
        f"data.partition: {kind} with data.beta {beta} left some of {clients} clients with fewer than "
        f"{MIN_IMAGES} images in each of {MAX_DRAWS} draws; {remedy} fewer federation.clients or more images"
    )
