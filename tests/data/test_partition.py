"""The four splits: the published label counts, and what must hold for any labels, clients, beta and seed."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from fdiff.data.fashion_mnist import DEBIAN_ROOT, read_idx
from fdiff.data.partition import (
    BETAS,
    KINDS,
    iid,
    label_count,
    label_counts,
    label_skew,
    partition_indices,
    quantity_skew,
)
from fdiff.errors import UserError

needs_debian = pytest.mark.skipif(
    not DEBIAN_ROOT.is_dir(), reason="needs Debian's dataset-fashion-mnist: apt install dataset-fashion-mnist"
)
SEEDS = st.integers(0, 2**32 - 1)
SOME_BETAS = st.floats(0.3, 100)


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, str, int, float, int, int]:
    """Arguments of `partition_indices` with enough images for a skew to succeed in 1,000 draws, all but always."""
    clients = draw(st.integers(1, 8))
    n = draw(st.integers(40 * clients, 100 * clients))
    classes = draw(st.integers(1, 12))
    labels = np.random.RandomState(draw(SEEDS)).randint(0, classes, n)
    present = len(np.unique(labels))
    number = draw(st.integers(-(-present // clients), present))
    return labels, draw(st.sampled_from(KINDS)), clients, draw(SOME_BETAS), draw(SEEDS), number


def split(arguments: tuple[np.ndarray, str, int, float, int, int]) -> list[np.ndarray]:
    """The split; a skew that refuses because none of its 1,000 draws will do is right to, and shows nothing here.

    So is a label-count with a class or a client that has too few images.
    """
    try:
        return partition_indices(*arguments)
    except UserError as refusal:
        words = {"label-count": "shares the|leaves client"}.get(arguments[1], "1000 draws")
        assert arguments[1] != "iid" and re.search(words, str(refusal))
        reject()


@settings(max_examples=60)
@given(splits())
def test_a_split_holds_every_index_exactly_once(arguments):
    labels, kind, clients, *_ = arguments
    shards = split(arguments)
    assert len(shards) == clients
    assert all(shard.dtype == np.int64 for shard in shards)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1 if kind == "iid" else min(sizes) >= 10


@settings(max_examples=20)
@given(splits())
def test_a_split_depends_on_its_arguments_alone(arguments):
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    once = split(arguments)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # the global generator is not ours
    np.random.seed(2)
    for shard, again in zip(once, partition_indices(*arguments), strict=True):
        np.testing.assert_array_equal(shard, again)


@settings(max_examples=20)
@given(splits())
def test_label_counts_account_for_every_image(arguments):
    labels = arguments[0]
    counts = label_counts(labels, split(arguments))
    totals = [sum(of_client.get(label, 0) for of_client in counts) for label in range(labels.max() + 1)]
    assert totals == np.bincount(labels).tolist()
    assert all(list(of_client) == sorted(of_client) for of_client in counts)
    assert all(images > 0 for of_client in counts for images in of_client.values())


def test_seeds_differ():
    labels = np.arange(1000) % 10
    for kind in KINDS:
        first, second = (np.concatenate(partition_indices(labels, kind, 4, 0.5, seed, 5)) for seed in (1, 2))
        assert not np.array_equal(first, second)


def test_splits_follow_the_legacy_global_generator():
    np.random.seed(2023)
    order = np.random.permutation(103)
    for shard, expected in zip(iid(103, 4, 2023), np.array_split(order, 4), strict=True):
        np.testing.assert_array_equal(shard, expected)
    assert [len(shard) for shard in iid(103, 4, 2023)] == [26, 26, 26, 25]
    shares = np.random.dirichlet([5.0, 5.0])  # drawn after the permutation, accepted at once
    assert shares.min() * 103 >= 10
    shards = quantity_skew(103, 2, 5.0, 2023)
    np.testing.assert_array_equal(shards[0], order[: int(shares[0] * 103)])
    np.testing.assert_array_equal(shards[1], order[int(shares[0] * 103) :])


def test_quantity_skew_draws_shares_until_all_are_ten_images():
    random = np.random.RandomState(5)
    order = random.permutation(200)
    draws = 0
    smallest = 0.0
    while smallest < 10:
        shares = random.dirichlet([0.5] * 4)
        smallest, draws = shares.min() * 200, draws + 1
    assert draws > 1  # this seed's first draw leaves someone short
    cuts = np.cumsum(shares) * 200
    np.testing.assert_array_equal(quantity_skew(200, 4, 0.5, 5)[1], order[int(cuts[0]) : int(cuts[1])])


def test_label_skew_gives_no_more_to_a_client_that_has_its_share():
    labels = np.repeat(np.arange(10), 100)
    for seed in range(20):
        for client, counts in enumerate(label_counts(labels, label_skew(labels, 5, 0.1, seed))):
            left_over = int(client == 4)  # its pieces end with the class: truncated sums leave it one
            held = 0
            for label in range(10):
                assert held < 200 or counts.get(label, 0) <= left_over
                held += counts.get(label, 0)


@needs_debian
def test_label_skew_gives_the_published_counts():
    labels = read_idx(DEBIAN_ROOT / "train-labels-idx1-ubyte.gz", dims=1)
    shards = label_skew(labels, 5, 0.5, 2023)
    counts = label_counts(labels, shards)
    assert counts[0] == {0: 4888, 1: 1316, 2: 378, 3: 936, 4: 146, 5: 1177, 6: 96, 7: 2944, 8: 1565}
    assert counts[3] == {0: 2, 1: 3979, 2: 1959, 3: 149, 5: 2265, 6: 5484}
    assert sum(map(len, shards)) == 60_000


def test_a_huge_beta_is_nearly_even_and_a_small_one_is_not():
    def spread(beta: float) -> float:
        return float(np.std([len(shard) for shard in quantity_skew(10_000, 5, beta, 3)]))

    assert spread(1e6) < 10 < 500 < spread(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_gets_everything(kind):
    (shard,) = partition_indices(np.arange(30) % 3, kind, 1, 0.5, 2023, 3)
    np.testing.assert_array_equal(np.sort(shard), np.arange(30))


@pytest.mark.parametrize(
    ("kind", "n", "clients", "beta", "words"),
    [
        ("iid", 4, 5, 0.5, ["federation.clients", "5 clients", "at least 5 images", "has 4"]),
        ("label-skew", 49, 5, 0.5, ["federation.clients", "at least 50 images", "has 49", "at most 4"]),
        ("quantity-skew", 49, 5, 0.5, ["federation.clients", "at least 50 images", "has 49"]),
        ("iid", 100, 0, 0.5, ["federation.clients", "0", "at least 1"]),
        ("label-skew", 100, 2, 0.0, ["data.beta", "0.0", "above 0"]),
        ("quantity-skew", 100, 2, -1.0, ["data.beta", "-1.0", "above 0"]),
        ("quantity-skew", 100, 2, float("nan"), ["data.beta", "nan"]),
        ("label-skew", 100, 2, float("inf"), ["data.beta", "inf"]),
        ("quantity-skew", 100, 2, 1e308, ["data.beta: 1e+308", "at most 1000000"]),
        ("label-skew", 60, 6, 0.01, ["data.partition", "label-skew", "1000 draws", "works here is about 11, or"]),
        ("quantity-skew", 60, 6, 0.01, ["data.partition", "quantity-skew", "1000 draws", "up to 1000000, works"]),
        ("label-count", 19, 2, 0.5, ["federation.clients", "at least 20 images", "data.partition label-count"]),
        ("quantity-skew", 100, 2, 1e-320, ["data.partition", "1000 draws"]),
        ("label-skew", 100, 2, 1e-320, ["data.partition", "1000 draws"]),
        ("dirichlet", 100, 2, 0.5, ["data.partition", "'dirichlet'", *KINDS]),
        ("private", 100, 2, 0.5, ["data.partition", "'private'", *KINDS]),
    ],
)
def test_bad_requests_say_what_to_change(kind, n, clients, beta, words):
    with pytest.raises(UserError) as raised:
        partition_indices(np.arange(n) % 4, kind, clients, beta, 2023)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@st.composite
def dealt(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Labels of any values in any order, clients, a number of classes that there are, and a seed."""
    values = draw(st.lists(st.integers(-1000, 1000), min_size=1, max_size=12, unique=True))
    images = draw(st.lists(st.integers(1, 200), min_size=len(values), max_size=len(values)))
    labels = np.random.RandomState(draw(SEEDS)).permutation(np.repeat(values, images))
    assume(len(labels) >= 20)
    clients = draw(st.integers(1, min(100, len(labels) // 10)))
    return labels, clients, draw(st.integers(1, len(values))), draw(SEEDS)


@settings(max_examples=150)
@given(dealt())
def test_label_count_gives_each_client_its_classes_and_each_class_its_holders(arguments):
    labels, clients, number, seed = arguments
    classes, images = np.unique(labels, return_counts=True)
    try:
        shards = label_count(*arguments)
    except UserError as refusal:
        check_refusal(str(refusal), labels, clients, number, seed)
        return
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert len(shards) == clients and all(shard.dtype == np.int64 and len(shard) >= 10 for shard in shards)
    counts = label_counts(labels, shards)
    assert all(len(of_client) == number for of_client in counts)
    pieces = [[of_client[label] for of_client in counts if label in of_client] for label in classes.tolist()]
    assert all(max(of_class) - min(of_class) <= 1 for of_class in pieces)
    holders = [len(of_class) for of_class in pieces]
    assert 1 <= min(holders) and max(holders) - min(holders) <= 1
    for shard, again in zip(shards, label_count(*arguments), strict=True):
        np.testing.assert_array_equal(shard, again)


def check_refusal(said: str, labels: np.ndarray, clients: int, number: int, seed: int) -> None:
    """It is one line, it is true, and what it says will do does."""
    images = np.unique(labels, return_counts=True)[1]
    most = -(-clients * number // len(images))
    assert "\n" not in said
    if "to nobody" not in said:
        assert clients * number >= len(images)
        if found := re.search(r"shares the (\d+) images of label (-?\d+) among (\d+) clients", said):
            n, label, holders = map(int, found.groups())
            assert n == np.sum(labels == label) < holders in (most - 1, most)
        else:
            assert int(re.search(r"leaves client \d+ with (\d+) images", said)[1]) < 10
        return
    assert f"{len(images) - clients * number} of {len(images)} classes" in said and clients * number < len(images)
    more, others = re.search(r"labels_per_client (\d+)( or|$)", said), re.search(r"(\d+) federation.clients$", said)
    assert more or others
    if more:
        assert (int(more[1]) - 1) * clients < len(images) <= int(more[1]) * clients
    if others:
        assert (int(others[1]) - 1) * number < len(images) <= int(others[1]) * number
    for found, arguments in ((more, (clients, more and int(more[1]))), (others, (others and int(others[1]), number))):
        if found and "more images" not in said:
            label_count(labels, *arguments, seed)


def test_label_count_deals_ten_classes_to_a_hundred_clients():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(10) * 7 - 3, 600))
    counts = label_counts(labels, label_count(labels, 100, 2, 2023))
    assert all(list(of_client.values()) == [30, 30] for of_client in counts)
    assert len({tuple(of_client) for of_client in counts}) > 20  # pairs of classes, not the same five again and again
    assert counts != label_counts(labels, label_count(labels, 100, 2, 2024))


@pytest.mark.parametrize(
    ("images", "clients", "number", "words"),
    [
        ([20] * 10, 3, 2, "3 clients and data.labels_per_client 2 leaves the images of 4 of 10 classes to nobody; use "
         "at least data.labels_per_client 4 or 5 federation.clients"),
        ([6] * 10, 3, 1, "7 of 10 classes to nobody; use at least data.labels_per_client 4"),
        ([30] * 9 + [1], 3, 3, "to nobody; use more images, and at least data.labels_per_client 4 or 4 federation"),
        ([60] * 4, 3, 5, "data.labels_per_client: 5 is too many, the training images have 4 classes; use at most 4"),
        ([60] * 4, 3, 0, "data.labels_per_client: 0 is too few; use at least 1"),
        ([60, 60, 2], 3, 3, "shares the 2 images of label 2 among 3 clients; use fewer federation.clients"),
        ([60, 5], 2, 1, "with 5 images, and each needs 10; use a larger data.labels_per_client"),
    ],
)  # fmt: skip
def test_label_count_that_cannot_be_had_says_what_can(images, clients, number, words):
    with pytest.raises(UserError) as raised:
        label_count(np.repeat(np.arange(len(images)), images), clients, number, 2023)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def named(kind: str, labels: np.ndarray, clients: int, beta: float, seed: int) -> float:
    """The beta that the refusal names; rejects where the skew is met, or no beta is named."""
    try:
        partition_indices(labels, kind, clients, beta, seed)
    except UserError as refusal:
        if found := re.search(r"smallest data.beta that works here is about (\S+),", str(refusal)):
            return float(found[1])
    reject()


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["label-skew", "quantity-skew"]), st.integers(3, 12), st.integers(12, 40), SEEDS)
def test_the_named_beta_works_and_the_one_below_does_not(kind, clients, each, seed):
    labels = np.arange(clients * each) % 5
    beta = named(kind, labels, clients, 0.02, seed)
    assert beta in BETAS and min(map(len, partition_indices(labels, kind, clients, beta, seed))) >= 10
    below = BETAS[BETAS.index(beta) - 1]
    assert 0.88 < below / beta < 0.92
    below = max(below, 0.02)  # which was refused
    with pytest.raises(UserError):
        partition_indices(labels, kind, clients, below, seed)


@pytest.mark.parametrize(("kind", "beta"), [("label-skew", 0.01), ("quantity-skew", 0.5)])
def test_the_search_among_60_000_images_is_quick_and_what_it_names_works(kind, beta):
    labels = np.arange(60_000) % 10
    started = time.process_time()
    found = named(kind, labels, 100, beta, 2023)
    assert time.process_time() - started < 15  # 2 to 3 s, the draws that were asked for with it
    assert min(map(len, partition_indices(labels, kind, 100, found, 2023))) >= 10
