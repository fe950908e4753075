"""Whole runs on several ranks: the same numbers on any number of them, private parts that stay, real Fashion-MNIST."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from jobs import TINY, arrays, fdiff, largest_difference, on_ranks, rows
from ranks import run_ranks, train_in_turn

from fdiff import checkpoint, federation
from fdiff import config as cfg
from fdiff.comm import Communicator, SoloCommunicator
from fdiff.commands.flags import parse
from fdiff.config import from_dict
from fdiff.data.fashion_mnist import DEBIAN_ROOT
from fdiff.errors import RunError
from fdiff.federation import federator, record, snapshot
from fdiff.federation.forecast import forecast_run
from fdiff.federation.rounds import Federation
from fdiff.model.unet import PARTS
from fdiff.plan import plan_round, shared_parts
from fdiff.registry import BUILT_IN
from fdiff.runtime.signals import Stop

pytestmark = pytest.mark.slow
METHODS = BUILT_IN["method"]
FIVE = "--federation.clients 5 --federation.fraction 0.6 --optim.ema 0.9 --method ulatdec --run.keep_checkpoints 3"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """Each method in ordered reduction on 1 and 4 ranks, in fast on 2; five clients in ordered on 1 and 2.

    Fast reduction on one rank is what test_parity.py holds against the oracle, and on 4.
    """
    folder = tmp_path_factory.mktemp("jobs")
    train_each_method("ordered", (1, 4), ("--runtime.reduction", "ordered"), folder)
    train_each_method("fast", (2,), ("--runtime.reduction", "fast"), folder)
    for ranks in (1, 2):
        flags = [*FIVE.split(), "--runtime.reduction", "ordered", "--run.dir", f"five-{ranks}"]
        for rank in on_ranks(ranks, "train", *TINY, *flags, cwd=folder):
            rank.check()
    return folder


@pytest.fixture(scope="module")
def jobs_in_float64(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float64")
    train_each_method("float64", (1, 2, 4), ("--runtime.precision", "float64"), folder)
    return folder


def train_each_method(kind: str, on: Sequence[int], flags: Sequence[str], folder: Path) -> None:
    """On so many ranks each; one alone is a command of its own."""
    for ranks in on:
        runs = {method: folder / f"{method}-{kind}-{ranks}" for method in METHODS}
        requests = [["train", *TINY, "--method", method, *flags, f"--run.dir={run}"] for method, run in runs.items()]
        if ranks > 1:
            train_in_turn([parse(request).arguments["config"] for request in requests], ranks, folder)
            continue
        for request in requests:
            fdiff(*request, cwd=folder).check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [2])
def test_equal_to_1e_6_on_any_number_of_ranks(jobs, method, ranks):
    """Of each part's norm: a single element whose gradient is all but zero may move by a learning rate either way."""
    one, many = (arrays(jobs / f"{method}-{job}", 3) for job in ("ordered-1", f"fast-{ranks}"))
    assert largest_difference(one, many) <= 1e-6


@pytest.mark.rare  # test_parity.py holds such runs on 2 and 4 ranks against the oracle, to 1e-10
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_element_equal_to_1e_9_in_float64(jobs_in_float64, method, ranks):
    one, many = (arrays(jobs_in_float64 / f"{method}-float64-{n}", 3) for n in (1, ranks))
    assert one.keys() == many.keys()
    assert max(float(np.abs(one[n] - many[n]).max()) for n in one if "samples" not in n) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [4])
def test_bit_equal_in_ordered_reduction(jobs, method, ranks):
    one, many = (arrays(jobs / f"{method}-ordered-{n}", 3) for n in (1, ranks))
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one), method
    losses = [[row["loss"] for row in rows(jobs / f"{method}-ordered-{n}")] for n in (1, ranks)]
    assert losses[0] == losses[1]


def test_the_methods_differ(jobs):
    decoders = [arrays(jobs / f"{method}-ordered-1", 3)["global/parts/decoder"] for method in METHODS]
    assert len({d.tobytes() for d in decoders}) == len(METHODS)


@pytest.mark.parametrize("ranks", [2])
def test_private_parts_of_five_clients_survive_three_rounds(jobs, ranks):
    for round in (1, 2, 3):
        one, many = (arrays(jobs / f"five-{n}", round) for n in (1, ranks))
        assert one.keys() == many.keys() and len([n for n in one if n.endswith("private/encoder")]) == 5
        assert all(np.array_equal(one[name], many[name]) for name in one)


def test_a_client_that_is_not_selected_keeps_its_private_parts(jobs):
    initial = None
    for round in (1, 2, 3):
        now, selected = arrays(jobs / "five-2", round), plan_round("ulatdec", 5, round, 0, 0.6).selected
        assert len(selected) == 3
        for client in range(5):
            name = f"client-{client:04d}/private/encoder"
            if initial is not None:
                assert np.array_equal(now[name], initial[name]) == (client not in selected)
        initial = now


def test_the_log_holds_every_round_and_client(jobs):
    run = jobs / "usplit-fast-2"
    assert [row["round"] for row in rows(run)] == [1, 2, 3]
    clients = rows(run, "clients")
    assert [(row["round"], row["client"]) for row in clients] == [(r, c) for r in (1, 2, 3) for c in range(4)]
    for row in clients:
        assert row["images"] == 16 and row["seconds"]["train"] > 0 and row["images_per_s"] > 0
        plan = plan_round("usplit", 4, row["round"], 0)
        reported = sum(_sizes(run)[part] for part in PARTS if row["client"] in plan.reporters[part])
        assert row["parameters_sent"] == reported and row["bytes_sent"] == 4 * reported
    for name, ranks in (("usplit-fast-2", 2), ("usplit-ordered-1", 1)):  # all that was sent is what was planned
        planned = forecast_run(from_dict(yaml.safe_load((jobs / name / "config.yaml").read_text())), ranks)
        log = rows(jobs / name)
        assert [row["wire_bytes"] for row in log] == [row["wire_bytes"] for row in planned["rounds"]]
        by_purpose = {p: sum(row["bytes_by_purpose"][p] for row in log) for p in planned["bytes_by_purpose"]}
        assert by_purpose == planned["bytes_by_purpose"] and sum(by_purpose.values()) == planned["wire_bytes"]
        assert (ranks == 2) == (by_purpose["parameters"] > 0) == (by_purpose["pictures"] > 0)
    assert list((run / "tensorboard").glob("events.*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["method"] == "usplit"


def _sizes(run: Path) -> dict[str, int]:
    shared = arrays(run, 3)
    return {part: shared[f"global/parts/{part}"].size for part in PARTS}


# --- what the ranks hold, looked at from inside --------------------------------------------------------------------

INSIDE = cfg.Config(
    federation=cfg.FederationConfig(clients=4, rounds=2, local_epochs=1),
    data=cfg.DataConfig(image_side=8, limit=64),
    model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
    optim=cfg.OptimConfig(batch_size=8),
    sample=cfg.SampleConfig(every=0),
)


def two_rounds(comm: Communicator) -> dict[str, dict[str, bytes]]:
    """The bytes of each part on this rank after two rounds of each method, one client a rank; pointers checked."""
    found = {}
    for method in METHODS:
        config = replace(INSIDE, method=method, run=cfg.RunConfig(dir=f"{Path.cwd()}/{comm.size}-{method}"))
        federation = Federation(config, comm, torch.device("cpu"), Stop())
        federation.start(resume=False)
        for round in (1, 2):
            federation.round(round)
        federation.commits.finish()
        buckets = federation.rank.host.trainer.buckets
        buckets.check_shared()
        found[method] = {part: buckets.part(part).numpy().tobytes() for part in PARTS}
        federation.close()
        if comm.rank == 0:
            federator._leave_locks_to_parent()  # as the end of its process would
        _resumed(config, comm, found[method])
    return found


def _resumed(config: cfg.Config, comm: Communicator, before: dict[str, bytes]) -> None:
    """The same bytes are back in the buckets, whose views the parameters still are, then and after one more round."""
    config = replace(config, federation=replace(config.federation, rounds=3))
    federation = Federation(config, comm, torch.device("cpu"), Stop())
    assert federation.start(resume=True) == 2
    buckets = federation.rank.host.trainer.buckets
    buckets.check_shared()
    assert {part: buckets.part(part).numpy().tobytes() for part in PARTS} == before
    federation.round(3)
    federation.commits.finish()
    buckets.check_shared()
    federation.close()


def test_shared_parts_agree_on_all_ranks_and_private_ones_on_no_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_ranks(two_rounds, 4, tmp_path, timeout_s=120)
    for method in METHODS:
        shared = shared_parts(method)
        for part in PARTS:
            different = len({of_rank[method][part] for of_rank in found})
            assert different == (1 if part in shared else 4), (method, part)


def failing_in_the_last_commit(comm: Communicator) -> tuple[str, list[int]]:
    """The error that ends a run in whose last round one rank cannot copy what it is to write; the rounds there are."""
    config = replace(INSIDE, method="udec", run=cfg.RunConfig(dir=f"{Path.cwd()}/failing"))
    contents = snapshot.contents

    def fails(host, images, metrics, *more):
        if comm.rank == 1 and metrics["round"] == 2:
            raise MemoryError("no room for a copy")
        return contents(host, images, metrics, *more)

    snapshot.contents = fails
    try:
        federation.run(config, comm, torch.device("cpu"))
    except RunError as error:
        return str(error), [g.round for g in checkpoint.generations(config.run_dir)]
    finally:
        snapshot.contents = contents
    raise AssertionError("the run ended well")


def test_a_rank_that_fails_before_the_last_commit_is_heard_on_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = run_ranks(failing_in_the_last_commit, 2, tmp_path, timeout_s=120)
    assert {error for error, _ in ends} == {"checkpoint: MemoryError: no room for a copy"}
    assert ends[0][1] == [1]


def a_ledger_that_differs(comm: Communicator) -> str:
    config = replace(INSIDE, run=cfg.RunConfig(dir=f"{Path.cwd()}/differs"))
    record.bytes_by_purpose = lambda *_: {"parameters": 17, "ema": 0}
    with pytest.raises(RunError) as error:
        federation.run(config, comm, torch.device("cpu"))
    assert error.value.agreed  # or every rank would say it
    return str(error.value)


def test_bytes_that_differ_from_the_plan_end_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run_ranks(a_ledger_that_differs, 2, tmp_path, timeout_s=120)
    assert len(set(said)) == 1 and said[0].endswith("bytes of parameters were sent, the plan says 17")


def test_uniform_weights_every_reporter_alike_and_grids_come_every_n_rounds(tmp_path):
    """Two clients of 48 and 16 images train alone from the same start; their mean is what the run goes on with."""
    data = replace(INSIDE.data, partition="quantity-skew", seed=5)
    base = replace(INSIDE, data=data, federation=cfg.FederationConfig(clients=2, rounds=1, local_epochs=1))
    trained = {}
    for weighting in ("uniform", "size"):
        config = replace(base, federation=replace(base.federation, weighting=weighting))
        config = replace(config, run=cfg.RunConfig(dir=str(tmp_path / weighting), keep_local=True))
        federation.run(config, SoloCommunicator(), torch.device("cpu"))
        trained[weighting] = arrays(tmp_path / weighting, 1)
    images = [row["images"] for row in rows(tmp_path / "size", "clients")]
    assert max(images) > 1.5 * min(images)
    for weighting, weights in (("uniform", [0.5, 0.5]), ("size", [n / sum(images) for n in images])):
        found = trained[weighting]
        mean = sum(w * found[f"client-{c:04d}/local"] for c, w in enumerate(weights))
        averaged = np.concatenate([found[f"global/parts/{part}"] for part in PARTS])
        np.testing.assert_allclose(averaged, mean, rtol=1e-6, atol=1e-7)


def test_a_grid_every_second_round_and_after_the_last(tmp_path):
    config = replace(
        INSIDE,
        federation=cfg.FederationConfig(clients=1, rounds=5, local_epochs=1),
        data=replace(INSIDE.data, limit=8),
        sample=cfg.SampleConfig(sampler="ddim", steps=2, images=1, every=2),
        run=cfg.RunConfig(dir=str(tmp_path / "run")),
    )
    federation.run(config, SoloCommunicator(), torch.device("cpu"))
    grids = sorted(f.name for f in (tmp_path / "run" / "samples").iterdir())
    assert grids == [f"round-{round:06d}.png" for round in (2, 4, 5)]


# --- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DEBIAN_ROOT.is_dir(), reason="needs Fashion-MNIST: apt install dataset-fashion-mnist")
@pytest.mark.parametrize("method", METHODS)
def test_fashion_mnist_on_two_ranks(tmp_path, method):
    flags = """--preset fmnist --federation.clients 2 --federation.rounds 2 --federation.local_epochs 1 --data.limit 160
        --model.dim 12 --model.dim_mults [1,2] --model.head_dim 8 --optim.batch_size 16 --optim.lr 1e-3
        --sample.sampler ddim --sample.steps 4 --sample.images 4 --run.dir run""".split()
    ranks = on_ranks(2, "train", "--method", method, *flags, cwd=tmp_path)
    printed = "".join(rank.check().out for rank in ranks)
    assert printed.count("run folder   run") == 1 and "saving" in printed
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[1] < losses[0] < 0.5
    assert (tmp_path / "run" / "samples" / "round-000002.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = tmp_path / "run" / "checkpoints" / "round-000002"
    with h5py.File(checkpoint / "global.h5") as file:
        header = json.loads(file["header"][()].tobytes())
        assert header["round"] == 2 and header["config"]["method"] == method and header["images"] == [80, 80]
        parts = {name: dataset.shape[0] for name, dataset in file["parts"].items()}
        assert tuple(p for p in PARTS if p in parts) == shared_parts(method)
        rows_of_layout = [row for row in header["layout"] if row[1] == "decoder"]
        assert sum(int(np.prod(shape)) for _, _, _, shape in rows_of_layout) == parts["decoder"]
    private = len(shared_parts(method)) < 3
    assert sorted(f.name for f in checkpoint.glob("client-*")) == (["client-0000.h5", "client-0001.h5"] * private)
