"""Ranks that do not belong together are told apart before anything is trained: other settings, another job."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked_jobs import Job
from jobs import TINY, rows
from launchers import wait_for
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
TRAIN = ["train", *TINY, "--sample.every", 0, "--federation.rounds", 1, "--runtime.timeout_s", 6]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ended(job: Job) -> list[int]:
    assert job.wait(60), job.said()
    return job.statuses()


@pytest.mark.parametrize(
    ("on_rank_1", "told"),
    [
        ("--optim.lr 0.05", r"optim\.lr: 1e-05 on rank 0, 0\.05 on rank 1"),
        ("--federation.rounds 2", r"federation\.rounds: 1 on rank 0, 2 on rank 1"),
        ("--method udec --model.dim 12", r"method: 'full' on rank 0, 'udec' on rank 1; model\.dim: 8 .* 12 on rank 1"),
        ("--federation.fraction 0.5", r"fraction: 1\.0 .*; the plan's checksum: \w{12} on rank 0, \w{12} on rank 1"),
        ("--resume", r"--resume: False on rank 0, True on rank 1"),
    ],
)
def test_ranks_with_other_settings_are_named_with_the_fields(tmp_path: Path, on_rank_1: str, told: str) -> None:
    job = Job([*TRAIN, "--run.dir", "run"], 2, tmp_path, more={1: on_rank_1.split()})
    assert ended(job) == [2, 2] and len(job.errors()) == 1
    assert re.search(told, job.errors()[0]), job.said()
    assert not (tmp_path / "run").exists()


def test_where_the_data_lie_and_how_a_rank_computes_may_differ(tmp_path: Path) -> None:
    own = "--data.in_memory never --data.workers 1 --runtime.threads 2 --runtime.device cpu".split()
    job = Job([*TRAIN, "--run.dir", "run", "--runtime.timeout_s", 60], 2, tmp_path, more={1: own})
    assert ended(job) == [0, 0], job.said()


def test_a_flag_that_one_rank_does_not_know_ends_all(tmp_path: Path) -> None:
    job = Job([*TRAIN, "--run.dir", "run"], 2, tmp_path, more={1: ["--optim.lrr", 1]})
    assert ended(job) == [2, 2] and "--optim.lrr" in job.errors()[0] and len(job.errors()) == 1


def test_a_rank_of_another_job_is_turned_away_and_disturbs_nobody(tmp_path: Path) -> None:
    a = Job([*TRAIN, "--federation.rounds", 3, "--run.dir", "a"], 2, tmp_path)
    wait_for(lambda: listens(a.port), 30, "rank 0 to serve")
    b = Job([*TRAIN, "--run.dir", "b", "--optim.lr", 0.05], 2, tmp_path, port=a.port)
    assert ended(b) == [1, 2] and "no rendezvous at" in b.printed(0, "err"), b.said()
    assert re.search("rank 1 of the job of .*/b, but the job of .*/a meets at this", b.printed(1, "err")), b.said()
    assert ended(a) == [0, 0] and len(rows(tmp_path / "a")) == 3, a.said()


def test_who_waits_in_vain_says_who_was_turned_away(tmp_path: Path) -> None:
    job = Job([*TRAIN, "--run.dir", "a"], 2, tmp_path, more={1: ["--run.dir", "b"]})
    assert ended(job) == [1, 2]
    assert "rank 1 did not come within 6 s; turned away" in job.printed(0, "err"), job.said()
    assert "the job of" in job.printed(0, "err") and "meets at this address" in job.printed(1, "err")


# --- the same data ---------------------------------------------------------------------------------------------------


def write_images(folder: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(folder / split / name)


NAMES = [f"{n}.png" for n in range(20)]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (NAMES[:17], r"rank 0 has 20 and rank 1 has 17; .* is train/17.png, \d+ bytes on rank 0, train/2.png"),
        ([*NAMES[:3], "3-.png", *NAMES[4:]], r"that differs is train/3.png, .* train/3-.png, \d+ bytes on rank 1"),
    ],
)
def test_ranks_that_split_one_set_compare_their_files(tmp_path: Path, names: list[str], told: str) -> None:
    write_images(tmp_path / "a", NAMES)
    write_images(tmp_path / "b", names)
    words = [*TRAIN, "--run.dir", "run", "--data.dataset", "folder", "--data.root"]
    job = Job([*words, tmp_path / "a"], 2, tmp_path, more={1: ["--data.root", tmp_path / "b"]})
    assert ended(job) == [2, 2] and len(job.errors()) == 1 and re.search(told, job.errors()[0]), job.said()


def test_the_same_files_in_another_place_are_the_same(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / name, NAMES)
    words = [*TRAIN, "--run.dir", "run", "--data.dataset", "folder", "--data.limit", 20, "--data.root"]
    job = Job([*words, tmp_path / "a"], 2, tmp_path, more={1: ["--data.root", tmp_path / "b"]})
    assert ended(job) == [0, 0], job.said()
