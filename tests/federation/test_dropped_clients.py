"""The policy `drop`: the round is as if the clients that failed had not been selected, and they keep what is theirs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.injections import fail_client
from faults.processes import Job
from faults.runs import train
from jobs import arrays, rows
from ranks import run_ranks

from fdiff.comm import Communicator, SoloCommunicator
from fdiff.federation.aggregate import Aggregation
from fdiff.plan import RoundPlan, host_of, hosted_by, neighbours, plan_round, wire_bytes

WEIGHTS = {0: 3, 1: 11, 2: 7, 3: 2, 4: 5, 5: 13}
SLICES = {"bottleneck": slice(0, 10), "decoder": slice(10, 37)}
PLANS = {
    "all": {"bottleneck": (0, 1, 2, 3, 4, 5), "decoder": (0, 1, 2, 3, 4, 5)},
    "halves": {"bottleneck": (0, 3, 4), "decoder": (1, 2, 5)},
}
DROPPED = [(1,), (0, 5), (0, 3, 4), (0, 1, 2, 3, 4), (2, 3)]


def parameters(client: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(client).normal(size=37))


def expected(reporters: dict[str, tuple[int, ...]], dropped: tuple[int, ...]) -> np.ndarray:
    """The weighted means of those left, by NumPy; the first client's where no reporter is left."""
    mean = np.empty(37)
    for part, span in SLICES.items():
        left = [c for c in reporters[part] if c not in dropped] or [min(set(WEIGHTS) - set(dropped))]
        total = sum(WEIGHTS[c] for c in left)
        mean[span] = sum(WEIGHTS[c] * parameters(c).numpy()[span] for c in left) / total
    return mean


def averaged(comm: Communicator, name: str, dropped: tuple[int, ...], ordered: bool) -> np.ndarray:
    """This rank's average where its clients, in place if it has one only, train and those dropped do not report."""
    plan = RoundPlan(1, tuple(WEIGHTS), PLANS[name])
    hosted = hosted_by(comm.rank, len(WEIGHTS), comm.size)
    out = torch.full((37,), torch.nan, dtype=torch.float64)  # what training that failed may leave
    average = Aggregation(plan, WEIGHTS, out, SLICES, neighbours(len(WEIGHTS), comm.size), comm, ordered, reserve=True)
    for client in hosted:
        if client in dropped:
            continue
        if len(hosted) == 1:
            out.copy_(parameters(client))
            average.add(client, out)
        else:
            average.add(client, parameters(client))
    average.finish(dropped)
    sent = comm.ledger.take().get("parameters", 0)
    return np.append(out.numpy(), sent)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dropped", DROPPED)
def test_those_left_are_averaged_as_if_alone(name, dropped, ordered):
    result = averaged(SoloCommunicator(), name, dropped, ordered)[:-1]
    np.testing.assert_allclose(result, expected(PLANS[name], dropped), rtol=1e-12)


def all_cases(comm: Communicator) -> list[np.ndarray]:
    cases = [(n, d, o) for n in PLANS for d in DROPPED for o in (False, True)]
    return [averaged(comm, *case) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 6])
def test_on_several_ranks_all_get_the_same_and_the_plan_counts_the_bytes(tmp_path, ranks):
    found = run_ranks(all_cases, ranks, tmp_path)
    sizes = {part: s.stop - s.start for part, s in SLICES.items()}
    for i, (name, dropped, _) in enumerate((n, d, o) for n in PLANS for d in DROPPED for o in (False, True)):
        for of_rank in found:
            assert np.array_equal(of_rank[i][:-1], found[0][i][:-1]), "bit-equal on all ranks"
            np.testing.assert_allclose(of_rank[i][:-1], expected(PLANS[name], dropped), rtol=1e-12)
        plan = RoundPlan(1, tuple(WEIGHTS), PLANS[name]).without(dropped)
        planned = wire_bytes(plan, sizes, neighbours(len(WEIGHTS), ranks), 8)
        assert sum(r[i][-1] for r in found) == pytest.approx(planned)


def test_a_plan_without_some_clients():
    plan = plan_round("usplit", 6, 3, 0)
    less = plan.without({1, 4})
    assert less.selected == (0, 2, 3, 5) and less.round == 3
    assert all(set(less.reporters[p]) == set(plan.reporters[p]) - {1, 4} for p in plan.reporters)
    alone = plan.without(plan.reporters["encoder"])
    assert alone.reporters["encoder"] == alone.selected[:1]
    assert plan.without(()) == plan
    nobody = plan.without(range(6))
    assert wire_bytes(nobody, dict.fromkeys(plan.reporters, 7), neighbours(6, 6)) == 0
    assert host_of(5, 6, 6) == 5


# --- whole runs ----------------------------------------------------------------------------------------------------

DROP = ("--federation.on_client_failure", "drop", "--optim.ema", 0.9, "--federation.keep_optimizer", "true")


def job(folder: Path, run: str, method: str, ranks: int, failing: tuple[int, ...], how: str = "loss") -> Job:
    fault = partial(fail_client, how, failing, 2)
    started = Job(train(run, method, 3, *DROP, "--run.keep_checkpoints", 9), ranks, folder, fault)
    assert started.wait(120)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("method", ["usplit", "ulatdec"])
def test_a_dropped_client_keeps_its_state_and_the_round_is_the_same_on_any_number_of_ranks(tmp_path, method):
    for ranks in (1, 2, 4):
        ended = job(tmp_path, f"run-{ranks}", method, ranks, (1, 2))
        assert set(ended.statuses()) == {0}
        said = [line for line in ended.said().splitlines() if "goes on without" in line]
        assert [line.partition(":")[0] for line in said] == [f"round 2 goes on without client {c}" for c in (1, 2)]
        assert all("not a finite number" in line for line in said)
    one = [arrays(tmp_path / "run-1", round) for round in (1, 2, 3)]
    for ranks in (2, 4):
        many = [arrays(tmp_path / f"run-{ranks}", round) for round in (1, 2, 3)]
        assert all(a.keys() == b.keys() for a, b in zip(one, many, strict=True))
        assert all(np.array_equal(a[n], b[n]) for a, b in zip(one, many, strict=True) for n in a)
    for name in (n for n in one[0] if n.startswith("client-")):
        same = np.array_equal(one[0][name], one[1][name])
        assert same == (name.startswith(("client-0001", "client-0002"))), name
    assert all(np.isfinite(a).all() for a in one[2].values())
    assert [sorted(row["dropped"]) for row in rows(tmp_path / "run-4")] == [[], ["1", "2"], []]
    assert "not a finite number" in rows(tmp_path / "run-4")[1]["dropped"]["1"]
    assert [row["client"] for row in rows(tmp_path / "run-4", "clients") if row["round"] == 2] == [0, 3]


@pytest.mark.slow
def test_if_all_fail_the_run_stops_and_says_why(tmp_path):
    ended = job(tmp_path, "run", "full", 2, (0, 1, 2, 3), "exception")
    assert ended.statuses() == [1, 1]
    said = "every selected client failed; client 0: images/0001.png: Input/output error"
    assert len(ended.errors()) == 1 and said in ended.errors()[0]
    assert [row["round"] for row in rows(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_the_default_is_to_stop(tmp_path):
    fault = partial(fail_client, "allocator", (3,), 2)
    stopped = Job(train("run", "full", 3), 2, tmp_path, fault)
    assert stopped.wait(120) and stopped.statuses() == [1, 1]
    assert len(stopped.errors()) == 1 and "client 3, round 2: RuntimeError" in stopped.errors()[0]
