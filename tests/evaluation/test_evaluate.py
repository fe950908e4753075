"""Scores of checkpoints: the same for any number of ranks, nothing real on the wire; and bad requests."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from jobs import TINY, arrays, fdiff, in_turn, on_ranks, rows
from progress_bars import recorded
from ranks import run_ranks
from run_folders import round_row, score_row, write_rows
from small_datasets import folder, save

from fdiff import checkpoint
from fdiff.checkpoint.file import write_file
from fdiff.comm import Communicator, SoloCommunicator
from fdiff.commands import evaluate as command
from fdiff.config import Config, DataConfig, RuntimeConfig, from_dict
from fdiff.data import open_source
from fdiff.data.sources import ArraySource, Split
from fdiff.errors import RunError, UserError
from fdiff.evaluation import features
from fdiff.evaluation.extractors import load_extractor
from fdiff.evaluation.features import ImageFeatures, features_of_source
from fdiff.evaluation.scoring import Scoring, ScoringRequest, summaries, summary
from fdiff.evaluation.warnings import find_warnings, newest_scores
from fdiff.federation import sampling
from fdiff.federation.forecast import forecast_run
from fdiff.federation.saved import open_checkpoint
from fdiff.model import diffusion

CPU = torch.device("cpu")
IMAGES = 98  # of a model, and real ones: one more than features, and one
MORE = f"--data.test_limit {IMAGES} --run.keep_checkpoints 2 --sample.every 0 --sample.batch_size 10".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Path:
    """FULL and UDEC with a moving average: four clients, three rounds, the last two checkpoints kept; and odd ones."""
    folder = tmp_path_factory.mktemp("runs")
    write_silos(folder)
    two = ["--federation.clients", 2, "--federation.rounds", 1]
    requests = {
        "full": ["--method", "full", "--optim.ema", 0.9],
        "udec": ["--method", "udec", "--optim.ema", 0.9, "--run.keep_local"],
        "kept": [*two, "--run.keep_local"],
        "sparse": ["--optim.ema", 0.9, "--run.checkpoint_every", 2],
        "plain": ["--run.checkpoint_every", 2],
        "colour": [*two, "--data.channels", 3],
        "private": [*two, "--method", "udec", "--data.partition", "private", "--data.root", "site-{client}.h5"],
    }
    words = [["train", *TINY, *MORE, *more, "--run.dir", run] for run, more in requests.items()]
    for done in in_turn(2, words, folder):
        done[0].check()
    return folder


def write_silos(folder: Path) -> None:
    """Two clients' own files, 64 images to train on and 48 and 50 to be held against: site-0.h5, site-1.h5."""
    train, test = (open_source(DataConfig(image_side=8, limit=128, test_limit=IMAGES), s) for s in ("train", "test"))
    for client, cuts in enumerate([(slice(64), slice(48)), (slice(64, 128), slice(48, IMAGES))]):
        with h5py.File(folder / f"site-{client}.h5", "w") as file:
            for prefix, source, cut in zip(("", "test_"), (train, test), cuts, strict=True):
                chosen = np.arange(len(source.labels))[cut]
                file[f"{prefix}images"] = source.images(chosen).numpy()[:, 0]
                file[f"{prefix}labels"] = source.labels[chosen]


def score(comm: Communicator, run: Path, cache: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A rank's rows and what it sent, of all images a model with all metrics; the moving average of the global one."""
    saved = open_checkpoint(run)
    config = replace(saved.config, runtime=RuntimeConfig(threads=1))
    scoring = Scoring(comm, CPU, config, ScoringRequest(), cache)
    kinds = (False, True) if saved.config.method == "full" else (False,)
    found = [row for ema in kinds for done in scoring.score(saved, ema) for row in done]
    return sorted(found, key=lambda row: (row["ema"], row["client"] or 0)), comm.ledger.take()


class OnEveryRank:
    """`score` with its arguments, for a process of its own."""

    def __init__(self, run: Path, cache: Path) -> None:
        self.run, self.cache = run, cache

    def __call__(self, comm: Communicator) -> tuple[list[dict[str, Any]], dict[str, float]]:
        return score(comm, self.run, self.cache)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.rare), "udec"])  # each client's, and so all
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
        # the images of each model that were drawn elsewhere than on rank 0.
        assert all(set(ledger) == {"statistics"} for ledger in ledgers)
        models, moments, drawn = len(alone), 8 * (10 + 1 + 96 + 96**2), elsewhere(method, ranks)
        expected = (1 + models) * 2 * (ranks - 1) * moments + models * drawn * 96 * 4
        assert sum(ledger["statistics"] for ledger in ledgers) == pytest.approx(expected)


def elsewhere(method: str, ranks: int) -> float:
    """Images of a model, in the mean over the models, that another rank than 0 draws: 9 batches of 10, one of 8."""
    if method == "udec":
        return IMAGES * (ranks - 1) / ranks
    sizes = [10] * 9 + [8]
    return sum(size for i, size in enumerate(sizes) if i % ranks)


@pytest.mark.slow
def test_the_command_prints_and_keeps_every_score_with_its_facts(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ranks = on_ranks(2, "evaluate", "udec", "--runtime.threads", 1, "--json", "--all_rounds", cwd=runs)
    assert not any("images/s" in rank.check().err for rank in ranks)  # nobody watches
    objects = [json.loads(line) for rank in ranks for line in rank.out.splitlines()]
    assert [o["round"] for o in objects] == [2, 3]
    last = objects[-1]
    assert (last["n"], last["n_real"], last["extractor"], last["resized_from"]) == (IMAGES, IMAGES, "fmnist-cnn", 8)
    assert "test split" in last["split"] and len(last["checksum"]) == 64
    assert [(row["client"], row["ema"]) for row in last["scores"]] == [(c, e) for e in (False, True) for c in range(4)]
    assert "fid" not in last["scores"][0]
    worst = {"fd_fmnist": max, "kid": max, "total_variation": max}
    worst |= dict.fromkeys(("precision", "recall", "density", "coverage"), min)
    for kind, ema in (("raw", False), ("ema", True)):
        assert set(last["summary"][kind]) == set(worst)
        for name, facts in last["summary"][kind].items():
            values = [row[name] for row in last["scores"] if row["ema"] == ema]
            assert facts["mean"] == pytest.approx(np.mean(values))
            assert facts["deviation"] == pytest.approx(np.std(values))
            assert facts["worst"] == worst[name](values) == values[facts["worst_client"]]

    log = sorted(rows(runs / "udec", "scores"), key=lambda r: (r["round"], r["ema"], r["client"]))  # as they were done
    assert [(r["round"], r["ema"], r["client"]) for r in log] == [
        (r, ema, c) for r in (2, 3) for ema in (False, True) for c in range(4)
    ]
    assert log[-1]["scores"]["fd_fmnist"] == pytest.approx(last["scores"][-1]["fd_fmnist"])
    assert list((tmp_path / "fdiff" / "features").glob("fmnist-cnn-*.safetensors"))  # the real split, for next time

    table = fdiff("evaluate", "udec", "--runtime.threads", 1, "--metrics", "frechet,classes", cwd=runs).check().out
    assert "client 3, average" in table and "precision" not in table
    assert table.count("\nworst client ") == 2
    assert "images resized from 8 pixels" in table


@pytest.mark.slow
def test_requests_that_cannot_be_met_are_one_line(runs, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(runs / "udec/checkpoints/round-000003/global.h5", moved)
    with h5py.File(moved / "global.h5", "r+") as file:
        del file["parts/decoder"]
    otherwise = tmp_path / "otherwise"
    arrays, header, _ = checkpoint.read_generation(runs / "full/checkpoints/round-000003")
    header["layout"].reverse()
    otherwise.mkdir()
    write_file(otherwise / "global.h5", arrays, header)
    cases = [
        (["udec", "--images", 1], "--images: 1 images are too few for frechet; 2 or more fit"),
        (["private"], "--extractor: not given, and grey images of silos have no usual one"),
        (["udec", "--metrics", "fid"], "--metrics: 'fid' is not a metric; choose of frechet,kid,neighbours,classes"),
        (["udec", "--extractor", "inception", "--weights", "none.pth"], "--weights: none.pth is no file"),
        (["udec", "--steps", 2000], "sample.steps: 2000 is not valid"),
        (["nowhere"], "nowhere: is not a folder"),
        ([moved], "global.h5"),
        ([otherwise], "its parameters are laid out otherwise than here"),
        (["colour", "--extractor", "fmnist-cnn"], "fmnist-cnn takes square images of 1 channels, got 3x8x8"),
        (["private", "--extractor", "fmnist-cnn", "--metrics", "kid"], "--metrics: kid: features of real images stay"),
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
    scoring = Scoring(SoloCommunicator(), CPU, saved.config, ScoringRequest(metrics=("frechet",)), tmp_path)
    ((average,),) = scoring.score(saved, ema=False)
    (first,), (second,) = scoring.score(saved, ema=False, local=True)
    assert [(r["client"], r["local"]) for r in (average, first, second)] == [(None, False), (0, True), (1, True)]
    assert len({r["scores"]["fd_fmnist"] for r in (average, first, second)}) == 3
    with pytest.raises(UserError, match="--local: .*client-0000.h5 has no model from before the average; train with"):
        list(scoring.score(open_checkpoint(runs / "full"), ema=False, local=True))

    # A client that was dropped from the round has no model of it: what its file holds is older.
    folder = tmp_path / "dropped"
    shutil.copytree(saved.path, folder)
    arrays, header, _ = checkpoint.read_generation(folder)
    header["metrics"]["dropped"] = {"0": "RunError: loss nan"}
    (folder / "global.h5").unlink()
    write_file(folder / "global.h5", arrays, header)
    ((left,),) = scoring.score(open_checkpoint(folder), ema=False, local=True)
    assert left["client"] == 1 and left["scores"] == second["scores"]


@pytest.mark.slow
def test_private_silos_are_held_against_their_own_test_images(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request = ["evaluate", "private", "--extractor", "fmnist-cnn", "--runtime.threads", 1, "--json"]
    alone, both = (json.loads(in_turn(ranks, [request], runs)[0][0].check().out) for ranks in (1, 2))
    assert both["n_real"] == IMAGES and both["split"] == "test split of each client"
    assert [set(row) for row in both["scores"]] == [
        {"client", "ema", "fd_fmnist", "total_variation", "missing_classes"}
    ] * 2
    for one, other in zip(alone["scores"], both["scores"], strict=True):
        assert other == {name: pytest.approx(v, rel=1e-6) if type(v) is float else v for name, v in one.items()}
    # The same images in one data set: the silos' moments and counts add up to theirs.
    config = replace(open_checkpoint(runs / "private").config.data, dataset="embedded", partition="iid", root=None)
    whole = features_of_source(load_extractor("fmnist-cnn"), open_source(config, "test"), CPU, None).statistics()
    parts = [h5py.File(runs / f"site-{c}.h5")["test_images"][()] for c in range(2)]
    seen = ImageFeatures.of(load_extractor("fmnist-cnn"), torch.from_numpy(np.concatenate(parts))[:, None]).statistics()
    torch.testing.assert_close(seen.to_flat(), whole.to_flat())


@pytest.mark.slow
def test_a_moving_average_travels_only_where_it_is_saved_and_changes_no_account(runs):
    """Two ranks, rounds 2 and 3 are saved, none is sampled."""
    sparse, plain = rows(runs / "sparse"), rows(runs / "plain")
    sent = [row["bytes_by_purpose"]["ema"] for row in sparse]
    assert sent[0] == 0 and sent[1] == sent[2] > 0
    assert all(row["bytes_by_purpose"]["ema"] == 0 for row in plain)
    assert [row["wire_bytes"] for row in sparse] == [b["wire_bytes"] + n for b, n in zip(plain, sent, strict=True)]
    for name in ("parameters", "statistics", "pictures"):
        assert len({row["bytes_by_purpose"][name] for row in [*sparse, *plain]}) == 1
    assert [row["communicated_parameters"] for row in sparse] == [row["communicated_parameters"] for row in plain]


# --- what a person sees -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_that_are_not_finite_are_not_scored(runs, monkeypatch):
    monkeypatch.setattr(diffusion.Drawing, "draw", lambda *_: torch.full((2, 1, 8, 8), math.nan))
    saved = open_checkpoint(runs / "udec")
    scoring = Scoring(SoloCommunicator(), CPU, saved.config, ScoringRequest(), None)
    with pytest.raises(RunError, match="^client 0, round 3: drawn images are not finite numbers"):
        next(scoring.score(saved, ema=False))


@pytest.mark.slow
def test_a_bar_shows_images_per_second_on_rank_0(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bars = recorded(monkeypatch)
    flags = {"images": 100, "metrics": "frechet", "batch_size": 64, "extractor": "fmnist-cnn"}
    monkeypatch.chdir(runs)
    command.run(Path("private"), RuntimeConfig(threads=1), SoloCommunicator(), CPU, **flags)
    (bar,) = bars
    assert bar.total == 200 and bar.n == pytest.approx(200)  # two clients' models
    shown = bar.terminal.getvalue()
    assert shown.startswith("\rround 1:") and "| 200/200 [" in shown and " images/s]" in shown
    assert shown.count("images/s") > 8  # it moves with every step of every batch
    with sampling.progress_bar(SimpleNamespace(rank=1), [sampling.Batch(None, 0, 5, 1)], "sampling"):
        assert bars[-1].disable


# --- the real split ---------------------------------------------------------------------------------------------------


def test_real_features_come_from_the_cache_until_the_images_change(tmp_path, monkeypatch):
    extractor = load_extractor("fmnist-cnn")
    images = open_source(DataConfig(image_side=8, test_limit=200), "test").images(range(200)).numpy()
    looked_at: list[int] = []
    look = ImageFeatures.of
    monkeypatch.setattr(features.ImageFeatures, "of", lambda e, batch: looked_at.append(len(batch)) or look(e, batch))

    def see(name: str = "a", side: int = 8, pixel: int = 0, label: int = 0) -> ImageFeatures:
        """What is seen of a data set in one of whose 200 images one pixel may have been altered, or one label."""
        altered, labels = images.copy(), np.arange(200) % 10
        altered[101, 0, 4, 4] ^= pixel
        labels[101] += label
        data = DataConfig(image_side=side, channels=1)
        return features_of_source(extractor, ArraySource(Split(name, altered, labels), data), CPU, tmp_path)

    anew, again = see(), see()
    assert looked_at == [200]  # once
    assert torch.equal(anew.features, again.features) and torch.equal(anew.labels, again.labels)
    see(pixel=1), see(label=1), see(side=16), see(name="b")
    assert looked_at == [200] * 5 and len(list(tmp_path.iterdir())) == 5
    see(pixel=1), see()
    assert looked_at == [200] * 5
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(see().features, anew.features) and looked_at == [200] * 6


def test_a_file_that_was_replaced_is_looked_at_again(tmp_path):
    """Whichever it is, and whatever its size: by its time."""
    extractor, data = load_extractor("fmnist-cnn"), folder(tmp_path / "images", channels=1)
    for i in range(100):
        save(tmp_path / "images" / "train" / f"{i:02d}.png", np.full((8, 8), i, np.uint8))

    def see() -> torch.Tensor:
        return features_of_source(extractor, open_source(data, "train"), CPU, tmp_path / "cache").features

    before = see()
    assert torch.equal(see(), before) and len(list((tmp_path / "cache").iterdir())) == 1
    save(tmp_path / "images" / "train" / "37.png", np.full((8, 8), 200, np.uint8))
    assert (see() != before).any(dim=1).nonzero().flatten().tolist() == [37]


def test_a_tally_of_no_image_changes_nothing():
    extractor = load_extractor("fmnist-cnn")
    none = ImageFeatures.joined([], extractor, CPU).statistics()
    some = ImageFeatures.of(extractor, torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).statistics()
    assert torch.equal(none.to_flat() + some.to_flat(), some.to_flat())
    assert some.labels.sum() == 3 and some.moments.n == 3


# --- signs of failure -------------------------------------------------------------------------------------------------


def row(round: int, client: int | None, distance: float, ema: bool = False) -> dict[str, Any]:
    return score_row(round, client, ema=ema, scores={"fd_fmnist": distance})


def test_columns_of_the_table_never_run_together():
    """All ten classes missing, a large distance, many clients: each column is as wide as its widest cell."""
    scores = {"fd_fmnist": 123456789.25, "recall": 0.892, "missing_classes": list(range(10))}
    facts = {"n": 9, "sampler": "ddim", "steps": 4, "n_real": 9, "split": "s", "extractor": "e", "checksum": "c"}
    models = [row(1, client, 1.0) | facts | {"local": False, "scores": scores} for client in (0, 1234)]
    models += [row(1, 0, 1.0, ema=True) | {"scores": scores | {"missing_classes": []}}]
    lines = command._table(SimpleNamespace(path="run", round=1), models).splitlines()[3:]
    assert lines[0].split() == ["model", "fd_fmnist", "recall", "missing"]
    assert lines[2] == "client 1234        123456789.2500  0.8920  0,1,2,3,4,5,6,7,8,9"
    assert lines[-1] == "client 0, average  123456789.2500  0.8920                 none"


def test_clients_far_apart_are_reported():
    assert find_warnings([row(1, c, d) for c, d in enumerate([10, 12, 11])], Config(), None) == []
    (found,) = find_warnings([row(1, c, d) for c, d in enumerate([10, 12, 200])], Config(), None)
    assert "client 2 at 200.0" in found and "\n" not in found
    assert find_warnings([row(1, None, 10)], Config(), None) == []
    of_kid = {**row(1, 0, 0), "scores": {"kid": 0.5}}  # a scoring with other --metrics, stopped after one client
    assert find_warnings([of_kid, row(1, 1, 10)], Config(), None) == []


@pytest.mark.parametrize(
    ("mean", "deviation", "wide"),
    [(70.2, 28.3, True), (70.5, 34.4, True), (100.0, 19.0, False), (100.0, 28.0, False)],
    ids=["udec, label-skew", "ulatdec, label-skew", "iid", "iid"],
)
def test_the_papers_failures_are_reported_and_its_successes_are_not(mean, deviation, wide):
    found = find_warnings([row(15, 0, mean - deviation), row(15, 1, mean + deviation)], Config(), None)
    assert [f"deviation {deviation / mean:.0%} of the mean" in line for line in found] == [True] * wide


def test_clients_are_compared_only_where_they_are_scored_alike():
    rows = [row(1, 0, 10), row(1, 1, 11), {**row(1, 0, 900), "n": 9}, {**row(1, 1, 910), "n": 9}]
    fid = [{**r, "extractor": "inception", "scores": {"fid": r["scores"]["fd_fmnist"]}} for r in rows[:2]]
    found = find_warnings([*rows, *fid], Config(), None)
    assert len(found) == 2 and all("is too high" in line for line in found)  # and none of clients far apart


def test_what_scores_cannot_mean_is_said():
    few = {**row(1, None, 10), "extractor": "fmnist-cnn", "n": 96, "n_real": 500}
    (found,) = find_warnings([few], Config(), None)
    assert found.startswith("fd_fmnist of 96 images against 500 real ones is too high")
    assert find_warnings([{**few, "n": 97}], Config(), None) == []
    rays = replace(Config(), data=DataConfig(dataset="folder", root="x-rays", image_side=28, channels=1))
    (found,) = find_warnings([{**few, "n": 97}], rays, None)
    assert found.startswith("fmnist-cnn knows clothes only: its scores of folder")


def test_every_score_is_summarised_and_its_worst_client_follows_its_direction():
    rows = [
        {"client": c, "scores": {"fd_fmnist": 1 + 2 * c, "precision": 0.5 + c / 4, "missing_classes": [3]}}
        for c in range(2)
    ]
    assert summary(rows, "fd_fmnist") == {"mean": 2, "deviation": 1, "worst": 3, "worst_client": 1}
    assert summaries(rows) == {
        "fd_fmnist": summary(rows, "fd_fmnist"),
        "precision": {"mean": 0.625, "deviation": 0.125, "worst": 0.5, "worst_client": 0},
    }


@pytest.mark.parametrize(("distances", "stalled"), [([9, 8, 7], False), ([9, 5, 6, 5.5], True), ([5, 6], False)])
def test_scores_that_stopped_improving_are_reported(tmp_path, distances, stalled):
    log = [row(r + 1, None, d) for r, d in enumerate(distances)]
    log += [row(1, None, 0.1, ema=True)]  # scored otherwise: does not compare
    write_rows(tmp_path / "scores.jsonl", log)
    found = find_warnings([log[len(distances) - 1]], Config(), tmp_path)
    assert [f for f in found if "stopped improving" in f] == found
    assert bool(found) == stalled


def test_savings_that_differ_from_the_plan_are_reported(tmp_path):
    """Also where an older checkpoint's configuration has fewer rounds than the log: the run was given more later."""
    config = from_dict({"method": "full", "federation": {"clients": 2}, "model": {"dim": 8, "dim_mults": [1]}})
    planned = forecast_run(config, 2)["rounds"]
    log = [round_row(r["round"], communicated_parameters=r["parameters"]) for r in planned[:3]]
    write_rows(tmp_path / "rounds.jsonl", log)
    assert find_warnings([], config, tmp_path) == []
    assert find_warnings([], replace(config, federation=replace(config.federation, rounds=2)), tmp_path) == []
    log[1]["communicated_parameters"] -= 7
    write_rows(tmp_path / "rounds.jsonl", log)
    (found,) = find_warnings([], config, tmp_path)
    assert "1 of 3 rounds, first in round 2" in found


def test_of_scores_taken_twice_the_last_counts():
    log = [row(1, None, 9), row(2, None, 5), row(1, None, 7)]
    assert [(r["round"], r["scores"]["fd_fmnist"]) for r in newest_scores(log)] == [(2, 5), (1, 7)]
