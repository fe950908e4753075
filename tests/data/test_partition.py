"""The three splits: the published label counts, and what must hold for any labels, clients, beta and seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fdiff.data.fashion_mnist import DEBIAN_ROOT, read_idx
from fdiff.data.partition import KINDS, iid, label_counts, label_skew, partition_indices, quantity_skew
from fdiff.errors import UserError

needs_debian = pytest.mark.skipif(
    not DEBIAN_ROOT.is_dir(), reason="needs Debian's dataset-fashion-mnist: apt install dataset-fashion-mnist"
)
SEEDS = st.integers(0, 2**32 - 1)
BETAS = st.floats(0.3, 100)


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, str, int, float, int]:
    """Arguments of `partition_indices` with enough images for a skew to succeed in 1,000 draws, all but always."""
    clients = draw(st.integers(1, 8))
    n = draw(st.integers(40 * clients, 100 * clients))
    classes = draw(st.integers(1, 12))
    labels = np.random.RandomState(draw(SEEDS)).randint(0, classes, n)
    return labels, draw(st.sampled_from(KINDS)), clients, draw(BETAS), draw(SEEDS)


def split(arguments: tuple[np.ndarray, str, int, float, int]) -> list[np.ndarray]:
    """The split; a skew that refuses because none of its 1,000 draws will do is right to, and shows nothing here."""
    try:
        return partition_indices(*arguments)
    except UserError as refusal:
        assert arguments[1] != "iid" and "1000 draws" in str(refusal)
        reject()


@settings(max_examples=60)
@given(splits())
def test_a_split_holds_every_index_exactly_once(arguments):
    labels, kind, clients, _, _ = arguments
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
        first, second = (np.concatenate(partition_indices(labels, kind, 4, 0.5, seed)) for seed in (1, 2))
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
    (shard,) = partition_indices(np.arange(30) % 3, kind, 1, 0.5, 2023)
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
        ("label-skew", 60, 6, 0.01, ["data.partition", "label-skew", "1000 draws", "larger data.beta"]),
        ("quantity-skew", 60, 6, 0.01, ["data.partition", "quantity-skew", "1000 draws", "larger data.beta"]),
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
