"""Compressed runs of real ranks: the same bits on any number of them, stopped and resumed, with clients dropped."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import injections
from forked_jobs import Job
from jobs import TINY, arrays, fdiff, largest_difference, on_ranks, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SKEWED = [
    "train",
    *TINY,
    "--optim.lr",
    1e-3,
    "--data.partition",
    "quantity-skew",
    "--data.beta",
    20,
    "--sample.every",
    0,
]
QUANTIZE = ["--compression.kind", "quantize", "--compression.levels", 16]
OTHERS = {
    "random-k": ["--compression.kind", "random-k", "--compression.error_feedback"],
    "top-k": ["--compression.kind", "top-k", "--compression.fraction", 0.05],
    "low-rank": ["--compression.kind", "low-rank", "--compression.rank", 2],
    "quantize": [*QUANTIZE, "--compression.rotate", "--compression.error_feedback", "--optim.ema", 0.9],
}


def end(folder: Path, ranks: int, run: str, *arguments: object) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint of a run on so many ranks."""
    for done in on_ranks(ranks, *SKEWED, *arguments, "--run.dir", run, cwd=folder):
        done.check()
    return arrays(folder / run, 3)


@pytest.mark.parametrize("method", ["full", "usplit"])
def test_quantized_sums_have_the_same_bits_on_1_2_and_4_ranks_in_the_fast_reduction(
    tmp_path: Path, method: str
) -> None:
    runs = [end(tmp_path, ranks, f"on-{ranks}", *QUANTIZE, "--method", method) for ranks in (1, 2, 4)]
    assert largest_difference(runs[0], runs[1]) == largest_difference(runs[0], runs[2]) == 0
    for ranks in (2, 4):  # each round of a run is held against the plan; so is what the log says
        plan = json.loads(
            fdiff("plan", *SKEWED[1:], *QUANTIZE, "--method", method, "--ranks", ranks, "--json", cwd=tmp_path).out
        )
        log = rows(tmp_path / f"on-{ranks}")
        assert [row["wire_bytes"] for row in log] == [row["wire_bytes"] for row in plan["rounds"]]
        assert [row["communicated_parameters"] for row in log] == [row["parameters"] for row in plan["rounds"]]


@pytest.mark.parametrize("kind", OTHERS)
def test_each_kind_ends_alike_in_order_stopped_on_two_ranks_and_resumed_on_one(tmp_path: Path, kind: str) -> None:
    more = [
        *OTHERS[kind],
        "--method",
        "encoder+decoder",
        "--federation.fraction",
        0.75,
        "--runtime.reduction",
        "ordered",
    ]
    one = end(tmp_path, 1, "one", *more)
    for done in on_ranks(2, *SKEWED, *more, "--run.dir", "two", "--federation.rounds", 2, cwd=tmp_path):
        done.check()
    two = end(tmp_path, 1, "two", *more, "--resume")
    assert largest_difference(one, two) == 0
    fed_back = [name for name in one if name.endswith("/left-out")]
    assert len(fed_back) == 4 and any(np.abs(one[name]).max() > 0 for name in fed_back)
    kept = {"low-rank": {"global/state/factors"}, "quantize": {"global/state/ema-sent"}}.get(kind, set())
    assert {name for name in one if "/state/" in name} == kept
    other = fdiff(*SKEWED, *more, "--compression.kind", "none", "--run.dir", "two", "--resume", cwd=tmp_path)
    assert other.status == 2 and "compression.kind (was" in other.err
    assert all(line.startswith("sound") for line in fdiff("verify", "two", cwd=tmp_path).check().out.splitlines())


def test_a_dropped_client_changes_the_weights_of_the_others_on_any_number_of_ranks(tmp_path: Path) -> None:
    drop = [*QUANTIZE, "--federation.on_client_failure", "drop", "--method", "usplit"]
    ends = []
    for ranks in (1, 2):
        failing = partial(injections.fail_client, "exception", (2,), 2)
        job = Job([*SKEWED, *drop, "--run.dir", f"on-{ranks}"], ranks, tmp_path, failing)
        assert job.wait(120) and job.statuses() == [0] * ranks, job.said()
        assert "2" in rows(tmp_path / f"on-{ranks}")[1]["dropped"]
        ends.append(arrays(tmp_path / f"on-{ranks}", 3))
    assert largest_difference(*ends) == 0


@pytest.mark.rare  # the sums of whole numbers are tested under MPI in tests/comm
def test_over_mpi_as_over_gloo(tmp_path: Path) -> None:
    from jobs import BIN, execute

    more = ["--method", "usplit", *QUANTIZE]
    mpirun = [BIN / "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 2, BIN / "python", "-m", "fdiff"]
    execute([*mpirun, *SKEWED, *more, "--run.dir", "mpi"], tmp_path).check()
    assert largest_difference(end(tmp_path, 1, "one", *more), arrays(tmp_path / "mpi", 3)) == 0
    execute([*mpirun, *SKEWED, *OTHERS["top-k"], "--run.dir", "pairs"], tmp_path).check()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--compression.kind quantize --compression.levels 1", "compression.levels: 1 is not valid"),
        ("--compression.kind top-k --compression.fraction 0", r"compression.fraction: 0.* is not valid"),
        (
            "--compression.kind low-rank --compression.rank 500",
            "compression.rank: 500 leaves no matrix of encoder, bottle",
        ),
    ],
)
def test_what_cannot_be_is_one_line_alone_and_on_two_ranks(tmp_path: Path, flags: str, told: str) -> None:
    for ranks in (1, 2):
        job = Job(["train", *TINY, "--run.dir", "run", *flags.split()], ranks, tmp_path)
        assert job.wait(60) and job.statuses() == [2] * ranks, job.said()
        assert len(job.errors()) == 1 and re.search(told, job.errors()[0]), job.said()


def test_the_plan_warns_where_pairs_are_more_than_all_values(tmp_path: Path) -> None:
    dense = ["--compression.kind", "top-k", "--compression.fraction", 0.5]
    told = fdiff("plan", "--preset", "mini-k4", "--method", "full", *dense, cwd=tmp_path).check().out
    assert "warning: this compression saves no bytes" in told and "moving averages travel whole" in told
    told = fdiff("plan", "--preset", "mini-k4", "--method", "full", *QUANTIZE, cwd=tmp_path).check().out
    assert "warning" not in told and re.search(r"quantize: bits a value: encoder 6\.\d\d", told)
