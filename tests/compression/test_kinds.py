"""Each kind of compression by itself: what it lets through on average, what it leaves out, how words are packed."""

from __future__ import annotations

from math import ceil, log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor

from fdiff.comm import SoloCommunicator
from fdiff.compression import Exchange, Share, average_updates, first_factors, payload_for
from fdiff.compression import quantize as q
from fdiff.compression.sparsify import kept_of
from fdiff.config import CompressionConfig, Config, FederationConfig
from fdiff.errors import UserError
from fdiff.model import Slot


def summed(config, updates, round=1, layout=(), factors=None, keep=None, parts=None) -> Tensor:
    """What arrives of these weighted updates, of clients 0, 1, …"""
    out = torch.full_like(updates[0], float("nan"))
    share = Share(
        parts or {"part": slice(0, len(out))}, out, dict.fromkeys(range(len(updates)), 0), 0, updates.__getitem__, keep
    )
    average_updates(Exchange(SoloCommunicator(), config, layout, 0, round, factors=factors), [share])
    return out


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- quantize --------------------------------------------------------------------------------------------------------


@given(st.integers(2, 2**40), st.integers(1, 100_000), st.integers(1, 200), st.data())
def test_packed_fields_never_overflow_into_each_other(levels, reporters, count, data):
    bits = q.bits_of(levels, reporters)
    assert bits == ceil(log2(reporters * (levels - 1) + 1)) or reporters * (levels - 1) > 2**50
    if bits > 63:
        return
    seed = data.draw(st.integers(0, 2**30))
    words = torch.zeros(q.words_of(count, bits), dtype=torch.int64)
    most = torch.full((count,), float(reporters * (levels - 1)), dtype=torch.float64)
    some = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, count)) * (levels - 1)
    q.pack(some.double(), bits, words)  # of one of them, and of all others together the largest that they can have
    rest = most - (levels - 1)
    q.pack(rest, bits, words)
    if reporters * (levels - 1) < 2**53:
        assert torch.equal(q.unpack(words, bits, count, torch.float64), rest + some)


@pytest.mark.parametrize(("reporters", "share"), [(4, 0.200), (2, 0.167), (10, 0.25), (100, 0.40)])
def test_sixteen_levels_take_these_shares_of_float32(reporters, share):
    layout = [Slot("w", "part", 0, (1024 * 840,))]
    payload = payload_for(CompressionConfig(kind="quantize"), layout, 4)
    words = payload.of_one("part", reporters) - 840 * 4
    assert words / (4 * 1024 * 840) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 16])
def test_the_sum_is_unbiased_and_its_variance_within_the_papers_bound(levels, rotate):
    config, reporters, draws = CompressionConfig(kind="quantize", levels=levels, block=64, rotate=rotate), 3, 400
    updates = [normal(150, seed=client) for client in range(reporters)]
    true = sum(updates)
    found = torch.stack([summed(config, updates, round) for round in range(draws)]).double()
    s = torch.stack(updates).abs().max() * (8 if rotate else 1)  # a rotated block's largest is at most √64 times that
    bound = reporters * s.double() ** 2 / (levels - 1) ** 2
    assert (found.var(0) <= bound * 1.35).all()
    error = (found.mean(0) - true).abs() / (bound / draws).sqrt()
    assert error.max() < 5


def test_the_bound_holds_in_each_block_by_its_own_scale():
    config, draws = CompressionConfig(kind="quantize", levels=4, block=8), 400
    update = torch.cat([normal(8) * size for size in (1e-6, 1, 1e6)])
    found = torch.stack([summed(config, [update], round) for round in range(draws)]).double()
    scale = update.view(3, 8).abs().amax(1).repeat_interleave(8).double()
    assert (found.var(0) <= 1.35 * scale**2 / 9).all()
    assert ((found.mean(0) - update).abs() <= 5 * (scale**2 / 9 / draws).sqrt()).all()


def test_what_is_nothing_stays_exactly_nothing():
    update = torch.cat([torch.zeros(64), normal(64)])
    out = summed(CompressionConfig(kind="quantize", block=64), [update, -torch.zeros(128)])
    assert (out[:64] == 0).all() and (out[64:] != 0).any()


def test_a_block_next_to_nothing_is_no_nan():
    update = torch.zeros(64)
    update[3] = 1e-42
    assert summed(CompressionConfig(kind="quantize", levels=300, block=64), [update]).isfinite().all()


@pytest.mark.parametrize("levels", [2**16, 2**30])
def test_many_levels_tend_to_no_compression(levels):
    updates = [normal(3000, seed=client) for client in range(4)]
    out = summed(CompressionConfig(kind="quantize", levels=levels), updates)
    assert (out - sum(updates)).abs().max() < 4 * 8 / levels + 2e-6


def test_each_part_has_blocks_of_its_own():
    update = torch.cat([normal(100), 1e6 * normal(30, seed=1)])
    out = summed(
        CompressionConfig(kind="quantize", levels=2**16), [update], parts={"a": slice(0, 100), "b": slice(100, 130)}
    )
    assert (out[:100] - update[:100]).abs().max() < 1e-3  # a scale of b's would leave 30 and more


@pytest.mark.parametrize("width", [8, 64, 1024, 2048])
def test_the_rotation_is_the_orthonormal_hadamard_transform(width):
    blocks = normal(3, width).double()
    expected = blocks @ torch.from_numpy(scipy_hadamard(width) / width**0.5)
    assert torch.allclose(q.hadamard(blocks), expected, atol=1e-12)
    assert torch.allclose(q.hadamard(q.hadamard(blocks)), blocks, atol=1e-12)


def test_rotating_helps_where_one_value_is_large():
    update = normal(1024) * 1e-2
    update[7] = 10
    errors = []
    for rotate in (False, True):
        config = CompressionConfig(kind="quantize", levels=16, rotate=rotate)
        errors.append(sum((summed(config, [update], round) - update).norm() for round in range(20)))
    assert errors[1] < 0.5 * errors[0]


# --- the others ------------------------------------------------------------------------------------------------------


def test_random_positions_are_the_same_for_all_new_each_round_and_unbiased():
    config, updates = CompressionConfig(kind="random-k", fraction=0.1), [normal(200), normal(200, seed=1)]
    found = torch.stack([summed(config, updates, round) for round in range(1000)])
    assert ((found != 0).sum(1) == 20).all() and not torch.equal(found[0] != 0, found[1] != 0)
    deviation = (sum(updates) ** 2 * 9 / 1000).sqrt()
    assert ((found.mean(0) - sum(updates)).abs() <= 5 * deviation + 1e-6).all()
    with_feedback = summed(CompressionConfig(kind="random-k", error_feedback=True), updates, keep=lambda c, sent: None)
    assert torch.allclose(with_feedback[with_feedback != 0], sum(updates)[with_feedback != 0])


def test_the_largest_of_each_are_what_arrives():
    updates = [normal(100), normal(100, seed=1)]
    kept = {}
    out = summed(CompressionConfig(kind="top-k", fraction=0.07), updates, keep=kept.__setitem__)
    for client, update in enumerate(updates):
        largest = update.abs().topk(7).indices
        assert torch.equal(kept[client].nonzero().view(-1), largest.sort().values)
        assert torch.equal(kept[client][largest], update[largest])
    assert torch.equal(out, kept[0] + kept[1])
    double = [update.double() for update in updates]
    assert torch.equal(summed(CompressionConfig(kind="top-k", fraction=1), double), double[0] + double[1])


@pytest.mark.parametrize(
    ("fraction", "values", "kept"), [(0.1, 30, 3), (0.1, 31, 4), (1, 7, 7), (1e-9, 5, 1), (0.3, 10, 3)]
)
def test_a_share_is_rounded_up(fraction, values, kept):
    assert kept_of(values, fraction) == kept


LAYOUT = [Slot("m", "part", 0, (12, 3, 2, 2)), Slot("b", "part", 144, (12,)), Slot("thin", "part", 156, (12, 2))]


def test_a_sum_of_low_rank_comes_through_whole_and_vectors_always_do():
    config = CompressionConfig(kind="low-rank", rank=2)
    factors = first_factors(LAYOUT, 2, 0)
    assert len(factors) == 12 * 2  # of m alone: 2 (12 + 2) is more than 12 × 2
    left, right = normal(12, 2), normal(2, 12, seed=1)
    updates = [torch.cat([(left @ right * w).view(-1), normal(36, seed=9)]) for w in (0.3, 0.7)]
    out = summed(config, updates, layout=LAYOUT, factors=factors)
    assert torch.allclose(out, sum(updates), atol=1e-5)


def test_what_low_rank_leaves_out_of_a_client_is_what_its_projection_lacks():
    config, updates, kept = CompressionConfig(kind="low-rank", rank=1), [normal(180), normal(180, seed=1)], {}
    factors = first_factors(LAYOUT, 1, 0)
    before = factors.clone()
    out = summed(config, updates, layout=LAYOUT, factors=factors, keep=kept.__setitem__)
    matrices = [u[:144].view(12, 12).double() for u in updates]
    p = torch.linalg.qr(sum(matrices) @ before[:12, None].double())[0]
    for client, matrix in enumerate(matrices):
        assert torch.allclose(kept[client][:144].double().view(12, 12), p @ (matrix.T @ p).T, atol=1e-5)
        assert torch.equal(kept[client][144:156], updates[client][144:156])
    assert torch.allclose(out[:144].double().view(12, 12), p @ p.T @ sum(matrices), atol=1e-5)
    assert not torch.equal(factors, before)


def test_factors_of_nothing_do_not_stay_nothing():
    config, factors = CompressionConfig(kind="low-rank", rank=1), first_factors(LAYOUT, 1, 0)
    before = factors.clone()
    assert (summed(config, [torch.zeros(180)], layout=LAYOUT, factors=factors) == 0).all()
    assert torch.equal(factors, before)


def test_with_error_feedback_top_k_finds_the_minimum_of_a_quadratic_and_without_it_does_not():
    """Two clients whose gradients cancel in their largest coordinate: alone that one is sent, for ever."""
    targets = [torch.tensor([10.0, 1.0, 1.0]), torch.tensor([-10.0, 1.0, 1.0])]

    def descend(feeds_back: bool) -> Tensor:
        config, x = CompressionConfig(kind="top-k", fraction=0.3, error_feedback=feeds_back), torch.zeros(3)
        left = [torch.zeros(3), torch.zeros(3)]
        for round in range(1, 400):
            updates = [0.5 * (-0.05 * (x - target)) + left[c] for c, target in enumerate(targets)]

            def keep(client, sent, updates=updates):
                left[client] = updates[client] - sent

            x = x + summed(config, updates, round, keep=keep if feeds_back else None)
        return x

    best = torch.tensor([0.0, 1.0, 1.0])
    assert (descend(True) - best).norm() < 0.2 < 1 < (descend(False) - best).norm()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "gzip"}, "compression.kind: 'gzip' is not valid; choose one of none, quantize, random-k"),
        ({"levels": 1}, "compression.levels: 1 is not valid; it must be between 2 and"),
        ({"fraction": 0.0}, r"compression.fraction: 0.0 is not valid; it must be in \(0, 1\]"),
        ({"fraction": 1.5}, "compression.fraction: 1.5 is not valid"),
        ({"rank": 0}, "compression.rank: 0 is not valid"),
        ({"block": 1000}, "compression.block: 1000 is not valid; it must be a power of two"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        Config(compression=CompressionConfig(**changes))


def test_levels_whose_sum_is_more_than_a_word_are_refused():
    with pytest.raises(UserError, match=r"compression.levels: 9007199254740992 .* 2048 clients; .* take 64 bits"):
        Config(compression=CompressionConfig(kind="quantize", levels=2**53), federation=FederationConfig(clients=2048))
