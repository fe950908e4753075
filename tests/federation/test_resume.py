"""Stop and go on: bit-equal to a run never stopped, on other numbers of ranks, past damage, not past a change."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults.processes import Job
from faults.runs import equal, train
from forked_jobs import free_port
from jobs import BIN, ROOT, TINY, Done, arrays, clean_env, fdiff, in_turn, largest_difference, rows
from launchers import started, trainers, wait_for
from ranks import train_in_turn
from small_datasets import needs_gpu

from fdiff.commands.flags import parse
from fdiff.registry import BUILT_IN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
METHODS = BUILT_IN["method"]
LAST = 4  # rounds: one on each number of ranks
RANKS = (4, 2, 1, 4)
KEEPING = "--optim.ema 0.9 --federation.keep_optimizer true --federation.fraction 0.75".split()
FLAGS = {"full": KEEPING, "usplit": [], "ulatdec": [], "udec": KEEPING}  # all that a client can keep, or nothing more
COMMON = [*TINY, "--runtime.reduction", "ordered", "--run.keep_checkpoints", "9", "--sample.every", "2"]


def request(name: str, method: str, rounds: int) -> list[str]:
    return ["train", *COMMON, "--method", method, *FLAGS[method], "--run.dir", name, "--federation.rounds", str(rounds)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """Each method in one go on one rank, and stopped after every round, to go on with another number of ranks."""
    folder = tmp_path_factory.mktemp("resume")
    check(in_turn(1, [request(f"{method}-at-once", method, LAST) for method in METHODS], folder))
    for round, ranks in enumerate(RANKS, 1):
        stopped = [request(f"{folder}/{method}-stopped", method, round) for method in METHODS]
        if ranks > 1:
            train_in_turn([parse(words).arguments["config"] for words in stopped], ranks, folder, resume=round > 1)
        else:
            check(in_turn(1, [[*words, "--resume"] for words in stopped], folder))
    return folder


def check(done: list[list[Done]]) -> None:
    assert all(rank.status == 0 for job in done for rank in job), done


@pytest.mark.parametrize("method", METHODS)
def test_bit_equal_over_4_2_1_and_4_ranks(jobs, method):
    for round in range(1, LAST + 1):
        whole, parts = (arrays(jobs / f"{method}-{how}", round) for how in ("at-once", "stopped"))
        names = {n for n in whole if "samples" not in n}  # the last round of a job draws a grid, whenever it comes
        assert names == {n for n in parts if "samples" not in n}
        assert all(np.array_equal(whole[n], parts[n]) for n in names), round
        if FLAGS[method] is KEEPING:
            assert {n.split("/")[1] for n in names if "client" in n} >= {"ema", "exp_avg", "exp_avg_sq", "step"}


@needs_gpu
def test_on_a_gpu_a_resumed_run_ends_within_the_stated_tolerance(tmp_path):
    """Kernels there may add in another order each time, so bits may differ: 1e-3 of each tensor's norm."""
    on_gpu = ["--runtime.device", "cuda"]
    fdiff(*request("whole", "udec", LAST), *on_gpu, cwd=tmp_path).check()
    fdiff(*request("parts", "udec", 2), *on_gpu, cwd=tmp_path).check()
    fdiff(*request("parts", "udec", LAST), *on_gpu, "--resume", cwd=tmp_path).check()
    assert largest_difference(arrays(tmp_path / "parts", LAST), arrays(tmp_path / "whole", LAST)) <= 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_no_round_twice_in_the_logs(jobs, method):
    whole, parts = (jobs / f"{method}-{how}" for how in ("at-once", "stopped"))
    for run in (whole, parts):
        assert [row["round"] for row in rows(run)] == list(range(1, LAST + 1))
    for log, keys in (("rounds", ("loss", "selected", "reporters")), ("clients", ("client", "losses", "images"))):
        assert [[row[k] for k in keys] for row in rows(whole, log)] == [[r[k] for k in keys] for r in rows(parts, log)]
    assert yaml.safe_load((parts / "config.yaml").read_text())["federation"]["rounds"] == LAST


# --- one run, copied for each test ---------------------------------------------------------------------------------


@pytest.fixture
def run(jobs, tmp_path) -> Path:
    """A run of four rounds that keeps all its checkpoints."""
    return Path(shutil.copytree(jobs / "udec-at-once", tmp_path / "run"))


def resume(run: Path, *flags: str) -> Done:
    return fdiff(*request("run", "udec", LAST), "--resume", *flags, cwd=run.parent)


def damage(run: Path, round: int, file: str = "global.h5") -> None:
    os.truncate(run / "checkpoints" / f"round-{round:06d}" / file, 1000)


def test_the_checkpoint_before_a_damaged_one_is_used_and_it_is_said(run):
    expected = arrays(run, LAST)
    damage(run, 4, "client-0002.h5")
    damage(run, 3)
    done = resume(run).check()
    said = [line for line in done.err.splitlines() if "damaged" in line]
    assert len([s for s in said if "passing over" in s]) == 2 and "round-000004/client-0002.h5" in said[0]
    again = arrays(run, LAST)
    assert again.keys() == expected.keys() and all(np.array_equal(again[n], expected[n]) for n in expected)
    assert [row["round"] for row in rows(run)] == [1, 2, 3, 4]
    assert len(list((run / "checkpoints").glob("damaged-round-00000[34]-*"))) == 2


def test_all_checkpoints_damaged_is_not_a_reason_to_begin_again(run):
    before = (run / "rounds.jsonl").read_bytes()
    for round in range(1, LAST + 1):
        damage(run, round)
    done = resume(run)
    assert done.status == 2 and "none of its 4 checkpoints is whole" in done.err.splitlines()[-1]
    assert (run / "rounds.jsonl").read_bytes() == before


def test_a_half_written_log_line_and_folder_are_forgotten(run):
    with (run / "rounds.jsonl").open("a") as log:
        log.write('{"round": 5, "lo')
    left = run / "checkpoints" / ".writing-000005-dead"
    shutil.copytree(run / "checkpoints" / "round-000004", left)
    resume(run, "--federation.rounds", "5").check()
    assert [row["round"] for row in rows(run)] == [1, 2, 3, 4, 5] and not left.exists()


def test_logs_that_lost_rows_are_made_whole_from_the_checkpoint(run):
    before = {log: (run / log).read_bytes() for log in ("rounds.jsonl", "clients.jsonl")}
    first, *others = before["rounds.jsonl"].splitlines(keepends=True)
    (run / "rounds.jsonl").write_bytes(b"".join([first, b"not a row\n", *others[1:]]))
    (run / "clients.jsonl").unlink()
    for command in (["report", "run", "--out", "page.html"], ["verify", "run"]):
        done = fdiff(*command, cwd=run.parent)
        assert done.status in (1, 2)
        assert "rounds.jsonl: line 2 is no row of a log; fdiff train --resume" in done.out + done.err
    said = [line for line in resume(run).check().err.splitlines() if "had lost rows" in line]
    assert len(said) == 1 and "rounds.jsonl, clients.jsonl had lost rows, and is whole again up to round 4" in said[0]
    assert {log: (run / log).read_bytes() for log in before} == before
    assert fdiff("verify", "run", cwd=run.parent).status == 0


def test_a_reader_that_leaves_changes_no_result(tmp_path):
    """fdiff train | head -1"""
    words = [sys.executable, "-m", "fdiff", "train", *COMMON, "--federation.rounds", "1", "--run.dir", "run"]
    train = subprocess.Popen(words, cwd=tmp_path, env=clean_env(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE)
    train.stdout.close()
    assert train.wait(120) == 0
    assert [row["round"] for row in rows(tmp_path / "run")] == [1]


def test_a_run_that_is_further_than_asked_is_left_as_it_is(run):
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and "events" not in f.name and f.name != ".lock"}
    done = resume(run, "--federation.rounds", "2", "--sample.every", "1").check()
    assert "it has 4 rounds already, more than federation.rounds 2: nothing was trained" in done.out
    assert "round-000002.png" not in done.out or (run / "samples" / "round-000002.png").exists()
    assert all(f.read_bytes() == content for f, content in before.items())


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("--method full", ["method (was 'udec', is 'full')"]),
        ("--run.seed 5 --optim.lr 0.5", ["run.seed (was 0, is 5)", "optim.lr (was 1e-05, is 0.5)"]),
        ("--federation.clients 3", ["federation.clients (was 4, is 3)"]),
        ("--model.dim 12", ["model.dim (was 8, is 12)"]),
        ("--optim.ema 0.5", ["optim.ema (was 0.9, is 0.5)"]),
        ("--federation.keep_optimizer false", ["federation.keep_optimizer (was True, is False)"]),
        ("--data.limit 60", ["data.limit (was 64, is 60)"]),
    ],
)
def test_a_changed_run_is_refused_by_the_names_of_its_fields(run, flags, fields):
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != ".lock"}
    done = resume(run, *flags.split())
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert all(field in done.err for field in fields), done.err
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != ".lock"} == before


def test_rounds_folder_and_runtime_may_change(run):
    moved = run.rename(run.with_name("moved"))
    flags = """--federation.rounds 5 --run.dir moved --run.checkpoint_every 2 --runtime.reduction fast
        --runtime.timeout_s 60 --federation.on_client_failure drop --data.in_memory never --sample.every 0""".split()
    resume(run, *flags).check()
    assert [row["round"] for row in rows(moved)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("before", [False, True])
def test_keeping_local_models_may_change(tmp_path, before):
    """With nothing else of its own a client has a file only if its local model is kept."""
    for rounds, keep in ((2, before), (3, not before), (4, before)):
        words = train("run", "full", rounds, "--run.keep_local", str(keep).lower(), resume=rounds > 2)
        job = Job(words, 2, tmp_path)
        assert job.wait(60) and job.statuses() == [0, 0], job.said()
        assert any("local" in name for name in arrays(tmp_path / "run", rounds)) == keep
    assert equal(tmp_path / "run", 4, "full", "--run.keep_local", str(before).lower())


def test_the_local_model_of_a_client_that_is_not_selected_stands(tmp_path):
    more = ("--run.keep_local", "true", "--federation.fraction", 0.5)
    for rounds in range(1, 5):
        job = Job(train("run", "full", rounds, *more, resume=True), 1, tmp_path)
        assert job.wait(60) and job.statuses() == [0], job.said()
        assert equal(tmp_path / "run", rounds, "full", *more)


def test_resume_of_nothing_begins_and_of_a_finished_run_ends(run, tmp_path):
    resume(run).check()
    assert [row["round"] for row in rows(run)] == [1, 2, 3, 4]
    (tmp_path / "new").mkdir()
    fdiff(*request("run", "full", 1), "--resume", cwd=tmp_path / "new").check()
    assert [row["round"] for row in rows(tmp_path / "new" / "run")] == [1]


def test_a_second_job_in_the_same_folder_is_refused(run):
    import fcntl

    with (run / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = resume(run)
    assert done.status == 2 and "in use by another job" in done.err


def test_what_gives_a_resumed_run_other_digits_is_said_in_one_line(run):
    words = [*request("run", "udec", LAST + 1), "--resume", "--runtime.reduction", "fast"]
    said = fdiff(*words, cwd=run.parent).check().err
    expected = "--resume: other values of runtime.reduction (was 'ordered', is 'fast'): the result will not have"
    assert said.count(expected) == 1


def test_verify_tells_sound_from_damaged(run):
    done = fdiff("verify", "run", cwd=run.parent).check()
    assert len(done.out.splitlines()) == 4 * 5 and all(line.startswith("sound ") for line in done.out.splitlines())
    damage(run, 3, "client-0001.h5")
    (run / "checkpoints" / "round-000002" / "client-0000.h5").unlink()
    done = fdiff("verify", "run", cwd=run.parent)
    wrong = [line for line in done.out.splitlines() if line.startswith("damaged ")]
    assert done.status == 1 and len(wrong) == 2 and len(done.err.splitlines()) == 1 and "2 problems" in done.err
    assert "round-000002/client-0000.h5: is missing" in wrong[0] and "round-000003/client-0001.h5" in wrong[1]
    assert fdiff("verify", "run/checkpoints/round-000004", cwd=run.parent).status == 0
    assert fdiff("verify", "nowhere", cwd=run.parent).status == 2


# --- brought back by its launcher ----------------------------------------------------------------------------------


def restarted(ranks: int, *flags: object) -> list[str]:
    words = ["--standalone", "--nproc_per_node", ranks, "--max-restarts", 1, "--monitor-interval", 0.1, "-m", "fdiff"]
    return [str(word) for word in (BIN / "torchrun", *words, "train", *COMMON, "--run.dir", "run", *flags)]


@pytest.mark.rare  # below, two agents bring a job back in the same way
def test_torchrun_brings_back_a_job_whose_rank_was_killed(tmp_path):
    fdiff("train", *COMMON, "--federation.rounds", 15, "--run.dir", "whole", cwd=tmp_path).check()
    with started(restarted(2, "--federation.rounds", 15), tmp_path, clean_env()) as job:
        wait_for(lambda: (tmp_path / "run/checkpoints/round-000002").exists(), 120, "two rounds")
        os.kill(trainers(tmp_path, "RANK")["1"], signal.SIGKILL)
        assert job.wait(180) == 0, job.printed
    assert [row["round"] for row in rows(tmp_path / "run")] == list(range(1, 16))
    expected, found = arrays(tmp_path / "whole", 15), arrays(tmp_path / "run", 15)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_torchrun_does_not_go_on_with_what_another_job_made(tmp_path):
    fdiff("train", *COMMON, "--federation.rounds", 1, "--run.dir", "run", cwd=tmp_path).check()
    with started(restarted(1, "--federation.rounds", 2), tmp_path, clean_env()) as job:
        assert job.wait(180) != 0
        assert job.printed.count("'run' exists already") == 2  # at the start, and at the restart
    assert len(rows(tmp_path / "run")) == 1


@pytest.mark.rare  # a minute of torchrun's own time-outs; one agent brings back its job above
def test_two_agents_of_torchrun_bring_back_a_job_of_which_one_has_lost_a_rank(tmp_path):
    """Only the agent whose rank was lost counts a restart."""
    fdiff("train", *COMMON, "--federation.rounds", 15, "--run.dir", "whole", cwd=tmp_path).check()
    where = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{free_port()}"
    agent = f"{BIN / 'torchrun'} {where} --max-restarts 3 --monitor-interval 0.1 -m fdiff train --run.dir run"
    words = [*agent.split(), *COMMON]
    words += ["--federation.rounds", "15"]
    with started(words, tmp_path, clean_env()) as first, started(words, tmp_path, clean_env(), "second") as second:
        wait_for(lambda: (tmp_path / "run/checkpoints/round-000002").exists(), 120, "two rounds")
        os.kill(trainers(tmp_path, "RANK")["1"], signal.SIGKILL)
        assert first.wait(180) == 0 and second.wait(180) == 0, first.printed + second.printed
    assert [row["round"] for row in rows(tmp_path / "run")] == list(range(1, 16))
    expected, found = arrays(tmp_path / "whole", 15), arrays(tmp_path / "run", 15)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
