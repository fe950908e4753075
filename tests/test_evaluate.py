"""Scores of checkpoints: the same for any number of ranks, nothing real on the wire; and bad requests."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from jobs import TINY, arrays, fdiff, in_turn, rows, torchrun
from ranks import run_ranks

from fdiff.comm import Communicator, SoloCommunicator
from fdiff.config import Config, DataConfig, RuntimeConfig, from_dict
from fdiff.data import open_source
from fdiff.errors import UserError
from fdiff.extractor import load_extractor
from fdiff.forecast import forecast
from fdiff.reference import Seen, see_source
from fdiff.scoring import Scoring, Wanted, summary
from fdiff.snapshot import open_checkpoint
from fdiff.verdict import newest, warnings

CPU = torch.device("cpu")
MORE = "--data.test_limit 128 --run.keep_checkpoints 3 --sample.every 0 --sample.batch_size 10".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Path:
    """FULL with a moving average, and UDEC: four clients, three rounds, all three checkpoints kept."""
    folder = tmp_path_factory.mktemp("runs")
    full = ["train", *TINY, *MORE, "--method", "full", "--optim.ema", 0.9, "--run.dir", "full"]
    udec = ["train", *TINY, *MORE, "--method", "udec", "--run.dir", "udec", "--run.keep_local"]
    kept = ["train", *TINY, *MORE, "--federation.clients", 2, "--federation.rounds", 1, "--run.dir", "kept"]
    for done in in_turn(2, [full, udec, [*kept, "--run.keep_local"]], folder):
        done[0].check()
    return folder


def score(comm: Communicator, run: Path, cache: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A rank's rows and what it sent, of 128 images a model with all metrics."""
    saved = open_checkpoint(run)
    config = replace(saved.config, runtime=RuntimeConfig(threads=1))
    scoring = Scoring(comm, CPU, config, Wanted(), cache)
    found = [row for ema in (False, True)[: 1 + saved.has_ema] for row in scoring.score(saved, ema)]
    return found, comm.ledger.take()


class OnEveryRank:
    """`score` with its arguments, for a process of its own."""

    def __init__(self, run: Path, cache: Path) -> None:
        self.run, self.cache = run, cache

    def __call__(self, comm: Communicator) -> tuple[list[dict[str, Any]], dict[str, float]]:
        return score(comm, self.run, self.cache)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "udec"])
def test_scores_do_not_depend_on_the_number_of_ranks_and_only_statistics_travel(runs, method, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, sent = score(SoloCommunicator(), runs / method, tmp_path)
    torch.set_num_threads(before)
    assert [(r["client"], r["ema"]) for r in alone] == (
        [(None, False), (None, True)] if method == "full" else [(c, False) for c in range(4)]
    )
    assert sent == {}
    for ranks in (2, 4):
        results = run_ranks(OnEveryRank(runs / method, tmp_path), ranks, tmp_path, timeout_s=240, patience_s=120)
        spread, ledgers = results[0][0], [ledger for _, ledger in results]
        assert all(not found for found, _ in results[1:])
        for one, other in zip(alone, spread, strict=True):
            assert {k: v for k, v in one.items() if k != "scores"} == {k: v for k, v in other.items() if k != "scores"}
            assert other["scores"].pop("missing_classes") == one["scores"]["missing_classes"]
            numbers = {name: value for name, value in one["scores"].items() if name != "missing_classes"}
            assert other["scores"] == pytest.approx(numbers, rel=1e-6, abs=1e-6)
        # Nothing but sums of moments (1 + D + D² + 10 numbers: the real split's, and of each model), and features of
        # the 128 images of each model that were drawn elsewhere than on rank 0.
        assert all(set(ledger) == {"statistics"} for ledger in ledgers)
        models, moments, drawn = len(alone), 8 * (10 + 1 + 96 + 96**2), elsewhere(method, ranks)
        expected = (1 + models) * 2 * (ranks - 1) * moments + models * drawn * 96 * 4
        assert sum(ledger["statistics"] for ledger in ledgers) == pytest.approx(expected)


def elsewhere(method: str, ranks: int) -> float:
    """Images of a model, in the mean over the models, that another rank than 0 draws: 12 batches of 10, one of 8."""
    if method == "udec":
        return 128 * (ranks - 1) / ranks
    sizes = [10] * 12 + [8]
    return sum(size for i, size in enumerate(sizes) if i % ranks)


@pytest.mark.slow
def test_the_command_prints_and_keeps_every_score_with_its_facts(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = torchrun(2, "evaluate", "udec", "--runtime.threads", 1, "--json", "--all_rounds", cwd=runs).check()
    objects = [json.loads(line) for line in done.out.splitlines()]
    assert [o["round"] for o in objects] == [1, 2, 3]
    last = objects[-1]
    assert (last["n"], last["n_real"], last["extractor"], last["resized_from"]) == (128, 128, "fmnist-cnn", 8)
    assert "test split" in last["split"] and len(last["checksum"]) == 64
    assert [row["client"] for row in last["scores"]] == [0, 1, 2, 3]
    distances = [row["fd_fmnist"] for row in last["scores"]]
    assert "fid" not in last["scores"][0]
    facts = last["summary"]["raw"]["fd_fmnist"]
    assert facts["mean"] == pytest.approx(np.mean(distances)) and facts["deviation"] == pytest.approx(np.std(distances))
    assert facts["worst"] == max(distances) == distances[facts["worst_client"]]

    log = rows(runs / "udec", "scores")
    assert [(r["round"], r["client"]) for r in log] == [(r, c) for r in (1, 2, 3) for c in range(4)]
    assert log[-1]["scores"]["fd_fmnist"] == pytest.approx(distances[-1])
    assert list((tmp_path / "fdiff" / "features").glob("fmnist-cnn-*.safetensors"))  # the real split, for next time

    table = fdiff("evaluate", "udec", "--runtime.threads", 1, "--metrics", "frechet,classes", cwd=runs).check().out
    assert "client 3" in table and "over 4 clients, worst" in table and "precision" not in table


@pytest.mark.slow
def test_requests_that_cannot_be_met_are_one_line(runs, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(runs / "udec/checkpoints/round-000003/global.h5", moved)
    with h5py.File(moved / "global.h5", "r+") as file:
        del file["parts/decoder"]
    cases = [
        (["udec", "--images", 96], "--images: 96 images are too few for frechet with 96 features"),
        (["udec", "--metrics", "fid"], "--metrics: 'fid' is not a metric; choose of frechet,kid,neighbours,classes"),
        (["udec", "--extractor", "inception", "--weights", "none.pth"], "--weights: none.pth is no file"),
        (["udec", "--steps", 2000], "sample.steps: 2000 is not valid"),
        (["nowhere"], "nowhere: is not a folder"),
        ([moved], "global.h5"),
    ]
    requests = [["evaluate", *arguments, "--runtime.threads", 1] for arguments, _ in cases]
    for ends, (_, expected) in zip(in_turn(2, requests, runs), cases, strict=True):
        assert [done.status for done in ends] == [2, 2]
        assert sum(expected in done.err for done in ends) == 1, (expected, [done.err for done in ends])
        assert all(done.err.count("\n") <= 1 and "Traceback" not in done.err for done in ends)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "parts"), [("udec", ["decoder"]), ("kept", ["encoder", "bottleneck", "decoder"])])
def test_the_local_models_are_those_whose_average_was_taken(runs, run, parts):
    saved = arrays(runs / run, 3 if run == "udec" else 1)
    local = [value for name, value in sorted(saved.items()) if name.endswith("/local")]
    average = np.concatenate([saved[f"global/parts/{part}"] for part in parts])
    assert len(local) == (4 if run == "udec" else 2)
    assert np.abs(local[0] - local[1]).max() > 1e-5
    np.testing.assert_allclose(np.mean(local, axis=0), average, rtol=1e-4, atol=1e-6)  # all have as many images


@pytest.mark.slow
def test_local_models_are_scored_where_they_were_kept(runs, tmp_path):
    saved = open_checkpoint(runs / "kept")
    scoring = Scoring(SoloCommunicator(), CPU, saved.config, Wanted(metrics=("frechet",)), tmp_path)
    (average,) = scoring.score(saved, ema=False)
    first, second = scoring.score(saved, ema=False, local=True)
    assert [(r["client"], r["local"]) for r in (average, first, second)] == [(None, False), (0, True), (1, True)]
    assert len({r["scores"]["fd_fmnist"] for r in (average, first, second)}) == 3
    with pytest.raises(UserError, match="--local: .*client-0000.h5 has no model from before the average; train with"):
        scoring.score(open_checkpoint(runs / "full"), ema=False, local=True)


# --- the real split ---------------------------------------------------------------------------------------------------


def test_real_features_come_from_the_cache_until_the_images_change(tmp_path):
    extractor = load_extractor("fmnist-cnn")
    source = open_source(DataConfig(image_side=8, test_limit=40), "test")
    anew = see_source(extractor, source, CPU, tmp_path)
    (file,) = tmp_path.iterdir()
    again = see_source(extractor, source, CPU, tmp_path)
    assert torch.equal(anew.features, again.features) and torch.equal(anew.labels, again.labels)
    stamp = file.stat().st_mtime_ns
    see_source(extractor, open_source(DataConfig(image_side=16, test_limit=40), "test"), CPU, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and file.stat().st_mtime_ns == stamp
    file.write_bytes(b"damaged")
    assert torch.equal(see_source(extractor, source, CPU, tmp_path).features, anew.features)


def test_a_tally_of_no_image_changes_nothing():
    extractor = load_extractor("fmnist-cnn")
    none = Seen.joined([], extractor, CPU).tally()
    some = Seen.of(extractor, torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).tally()
    assert torch.equal(none.to_flat() + some.to_flat(), some.to_flat())
    assert some.labels.sum() == 3 and some.moments.n == 3


# --- signs of failure -------------------------------------------------------------------------------------------------


def row(round: int, client: int | None, distance: float, ema: bool = False) -> dict[str, Any]:
    return {"round": round, "client": client, "ema": ema, "local": False, "n": 500, "scores": {"fd_fmnist": distance}}


def test_clients_far_apart_are_reported():
    assert warnings([row(1, c, d) for c, d in enumerate([10, 12, 11])], Config(), None) == []
    (found,) = warnings([row(1, c, d) for c, d in enumerate([10, 12, 200])], Config(), None)
    assert "client 2 at 200.0" in found and "\n" not in found
    facts = summary([row(1, c, d) for c, d in enumerate([1, 3])], "fd_fmnist")
    assert facts == {"mean": 2, "deviation": 1, "worst": 3, "worst_client": 1}
    assert warnings([row(1, None, 10)], Config(), None) == []


@pytest.mark.parametrize(("distances", "stalled"), [([9, 8, 7], False), ([9, 5, 6, 5.5], True), ([5, 6], False)])
def test_scores_that_stopped_improving_are_reported(tmp_path, distances, stalled):
    log = [row(r + 1, None, d) for r, d in enumerate(distances)]
    log += [row(1, None, 0.1, ema=True)]  # scored otherwise: does not compare
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    found = warnings([log[len(distances) - 1]], Config(), tmp_path)
    assert [f for f in found if "stopped improving" in f] == found
    assert bool(found) == stalled


def test_savings_that_differ_from_the_plan_are_reported(tmp_path):
    config = from_dict({"method": "full", "federation": {"clients": 2}, "model": {"dim": 8, "dim_mults": [1]}})
    planned = forecast(config, 2)["rounds"]
    log = [{"round": r["round"], "communicated_parameters": r["parameters"]} for r in planned[:3]]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    assert warnings([], config, tmp_path) == []
    log[1]["communicated_parameters"] -= 7
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    (found,) = warnings([], config, tmp_path)
    assert "1 of 3 rounds, first in round 2" in found


def test_of_scores_taken_twice_the_last_counts():
    log = [row(2, None, 5), row(1, None, 9), row(1, None, 7)]
    assert [(r["round"], r["scores"]["fd_fmnist"]) for r in newest(log)] == [(1, 7), (2, 5)]
