"""Unequal clients on few ranks: where they are, how long ranks wait, and that the result does not follow from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import TINY, arrays, fdiff, largest_difference, on_ranks, rows

from fdiff.config import Config, FederationConfig
from fdiff.federation import idle_note
from fdiff.plan import balanced, hosted_at, idle_share, neighbours

sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


def most(images: dict[int, int], placement: tuple[int, ...]) -> int:
    return max(sum(images[c] for c in hosted_at(placement, rank)) for rank in range(max(placement) + 1))


@given(sizes, st.integers(1, 12))
def test_every_client_is_on_one_rank_no_rank_is_empty_and_none_waits_longer_than_for_neighbours(found, ranks):
    ranks, images = min(ranks, len(found)), dict(enumerate(found))
    placement, plain = balanced(images, ranks), neighbours(len(found), ranks)
    assert len(placement) == len(found) and set(placement) == set(range(ranks))
    assert sorted(sum((hosted_at(placement, rank) for rank in range(ranks)), [])) == list(images)
    assert most(images, placement) <= most(images, plain)
    assert 0 <= idle_share([list(images)], images, placement) <= idle_share([list(images)], images, plain) + 1e-12


def test_equal_clients_stay_neighbours():
    assert balanced(dict.fromkeys(range(10), 7), 4) == neighbours(10, 4)


def test_the_longest_come_first():
    images = {0: 10, 1: 9, 2: 1, 3: 1, 4: 1}
    assert balanced(images, 2) == (0, 1, 1, 0, 1)
    assert neighbours(5, 2) == (0, 0, 0, 1, 1)
    assert idle_share([range(5)], images, neighbours(5, 2)) == pytest.approx(1 - 22 / 40)
    assert idle_share([range(5)], images, balanced(images, 2)) == pytest.approx(0)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_result_is_the_same_wherever_clients_are_and_private_parts_stay_theirs(tmp_path: Path) -> None:
    skewed = ["--data.partition", "quantity-skew", "--data.beta", 2, "--data.limit", 200, "--method", "udec"]
    request = ["train", *TINY, *skewed, "--compression.kind", "quantize", "--sample.every", 3, "--run.dir"]
    fdiff(*request, "one", cwd=tmp_path).check()
    for rank in on_ranks(2, *request, "two", "--federation.rounds", 2, cwd=tmp_path):
        rank.check()
    for rank in on_ranks(2, *request, "two", "--resume", cwd=tmp_path):
        rank.check()
    one, two = (arrays(tmp_path / run, 3) for run in ("one", "two"))
    assert largest_difference(one, two) == 0 and np.array_equal(one["global/samples"], two["global/samples"])
    assert [row["client"] for row in rows(tmp_path / "two", "clients")] == [0, 1, 2, 3] * 3
    told = json.loads(fdiff("plan", *TINY, *skewed, "--ranks", 2, "--json", cwd=tmp_path).check().out)
    assert told["idle"]["balanced"] < told["idle"]["neighbours"]


@pytest.mark.slow
def test_clients_that_nobody_selects_are_told_and_left_out(tmp_path: Path) -> None:
    few = ["--federation.fraction", 0.25, "--federation.rounds", 2, "--method", "udec", "--sample.every", 0]
    fdiff("train", *TINY, *few, "--run.dir", "run", cwd=tmp_path).check()
    never = json.loads(fdiff("plan", *TINY, *few, "--json", cwd=tmp_path).out)["never_selected"]
    assert 2 <= len(never) <= 3
    scored = json.loads(
        fdiff("evaluate", "run", "--images", 8, "--steps", 2, "--metrics", "classes", "--json", cwd=tmp_path).out
    )
    assert any("never selected" in line and all(str(c) in line for c in never) for line in scored["warnings"])
    values = {row["client"]: row["total_variation"] for row in scored["scores"]}
    trained = [value for client, value in values.items() if client not in never]
    assert scored["summary"]["raw"]["total_variation"]["mean"] == pytest.approx(sum(trained) / len(trained))


def test_growth_is_a_table_without_a_model(tmp_path: Path) -> None:
    done = fdiff("plan", "--preset", "celeba", "--clients", "1,100,1000", "--ranks", 8, cwd=tmp_path).check()
    lines = done.out.splitlines()
    assert len(lines) == 1 + 3 * 4 and lines[-1].split()[:3] == ["1000", "8", "udec"]
    refused = fdiff("plan", "--preset", "celeba", "--clients", "1,many", cwd=tmp_path)
    assert refused.status == 2 and "--clients: '1,many' is not valid; give numbers" in refused.err
    for more in (["--ranks", -1], ["--json"]):
        refused = fdiff("plan", "--preset", "celeba", "--clients", "1,10", *more, cwd=tmp_path)
        assert refused.status == 2 and refused.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("skew", ["label-skew --data.beta 0.5", "label-count --data.labels_per_client 2"])
def test_many_skewed_clients_on_two_ranks_with_every_method(tmp_path: Path, skew: str) -> None:
    many = ["--federation.clients", 20, "--data.limit", 1600, "--optim.batch_size", 64, "--federation.rounds", 2]
    request = ["train", *TINY, *many, "--sample.every", 0, "--data.partition", *skew.split()]
    for method, fraction in (("full", 0.1), ("usplit", 0.5), ("ulatdec", 1.0), ("udec", 0.3)):
        more = ["--method", method, "--federation.fraction", fraction]
        for rank in on_ranks(2, *request, *more, "--run.dir", method, cwd=tmp_path):
            rank.check()
        told = json.loads(fdiff("plan", *request[1:], *more, "--ranks", 2, "--json", cwd=tmp_path).check().out)
        log = rows(tmp_path / method)
        assert [row["wire_bytes"] for row in log] == [row["wire_bytes"] for row in told["rounds"]]
        assert [row["communicated_parameters"] for row in log] == [row["parameters"] for row in told["rounds"]]
        assert [row["reporters"] for row in log] == [row["reporters"] for row in told["rounds"]]


# --- ranks that wait -------------------------------------------------------------------------------------------------


def idle(clients: int, ranks: int, fraction: float = 1.0, images: dict[int, int] | None = None) -> str:
    config = Config(federation=FederationConfig(clients=clients, fraction=fraction, rounds=20))
    return idle_note(config, neighbours(clients, ranks), images)


def test_five_clients_on_four_ranks_leave_three_idle_for_half_of_each_round():
    assert idle(5, 4) == (
        "5 clients on 4 ranks: ranks wait for the slowest for 38% of the training time; ranks with nothing to do for "
        "1/2 of each round: 3; it would take 3 ranks as long, 5 ranks 1/2 of the time"
    )
    assert idle(5, 4, images={0: 7, 1: 7, 2: 7, 3: 7, 4: 6}).endswith("5 ranks 1/2 of the time")


def test_clients_that_divide_among_the_ranks_leave_none_idle():
    assert not any(idle(clients, ranks) for clients, ranks in ((1, 1), (4, 4), (8, 4), (100, 10), (3, 1)))


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_other_numbers_of_ranks_are_as_told(clients, ranks):
    """The most clients on a rank, which a round lasts, by the numbers of ranks that the line names."""
    note = idle(clients, min(clients, ranks))
    alike, ranks = dict.fromkeys(range(clients), 1), min(clients, ranks)
    most = -(-clients // ranks)
    told = [int(n) for n in re.findall(r"(\d+) ranks", note.partition("it would take")[2])]
    if told:
        assert -(-clients // told[-1]) < -(-clients // (told[-1] - 1)) == most
        assert note.endswith(f"{told[-1]} ranks {-(-clients // told[-1])}/{most} of the time")
        assert len(told) == 1 or (told[0] < ranks and -(-clients // told[0]) == most)
    else:
        assert idle_share([range(clients)], alike, neighbours(clients, ranks)) < 0.005


def test_ranks_wait_for_unequal_clients_and_for_those_that_are_not_selected():
    assert idle(4, 4, fraction=0.5).endswith("ranks wait for the slowest for 50% of the training time")
    assert idle(2, 2, images={0: 30, 1: 10}).endswith("ranks wait for the slowest for 33% of the training time")
