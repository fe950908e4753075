"""What `fdiff submit` refuses before the queue and what it asks Slurm for; and its jobs on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import submitit
import yaml
from jobs import ROOT, TINY, arrays, clean_env, execute, fdiff
from launchers import PYTHON, rounds, started, trainers, wait_for

from fdiff.commands import submit, submit_job
from fdiff.commands.flags import parse
from fdiff.commands.submit_job import supervise
from fdiff.config import Config
from fdiff.errors import RunError, UserError

LOCAL = ("--cluster", "local")


def request(*words: str) -> None:
    """`fdiff submit` in this process."""
    asked = parse(["submit", *words])
    asked.run(**asked.arguments)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--tasks_per_nod", "2"], "--tasks_per_nod"),
        (["--optim.lr", "-1"], "optim.lr: -1"),
        ([*LOCAL, "--tasks_per_node", "8"], "5 clients cannot occupy 8 ranks"),
        ([*LOCAL, "--tasks_per_node", "0"], "--tasks_per_node: 0"),
        ([*LOCAL, "--nodes", "2"], "--nodes: 2"),
        ([*LOCAL, "--time", "1"], "--notice_s: 120"),
        ([*LOCAL, "--max_requeues", "9"], "--max_requeues: 9"),
        ([*LOCAL, "--partition", "gpu"], "--partition: is for Slurm"),
        ([*LOCAL, "--sbatch.exclude=node1"], "--sbatch: is for Slurm"),
        ([*LOCAL, "--print_script"], "--print_script: with --cluster local"),
        (["--time", "4h"], "--time: '4h' is not valid"),
        ([*LOCAL, "--array", "a.yaml,no.yaml"], "--array: no.yaml cannot be read"),
        ([*LOCAL, "--array", "empty"], "--array: 'empty' holds no"),
        ([*LOCAL, "--array", "a.yaml,b.yaml", "--run.dir", "x"], "'x' is that of several jobs"),
        ([*LOCAL, "--run.dir", "empty"], "'empty' exists already"),
    ],
)
def test_a_request_that_would_fail_in_the_queue_is_refused_before_it(words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.yaml").write_text("method: udec")
    Path("b.yaml").write_text("method: usplit")
    with pytest.raises(UserError, match=named):
        request(*words)
    assert not Path("runs").exists()


def test_without_submitit_it_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'fdiff\[slurm\]'"):
        request(*LOCAL)


def test_slurm_is_asked_for_what_the_flags_say(tmp_path, monkeypatch, capsys):
    """submitit writes the batch file; only sbatch itself is stood in for, by a program that hands out a number."""
    monkeypatch.chdir(tmp_path)
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 123\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    resources = "--nodes 2 --tasks_per_node 2 --gpus_per_node 2 --cpus_per_task 3 --time 90 --notice_s 60".split()
    site = "--partition gpu --account project --qos long --constraint a100 --comment".split()
    request(*resources, *site, "two words")
    text = Path("runs/submitit/123_submission.sh").read_text()
    for option in ("nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=3", "time=90", "signal=USR2@60"):
        assert f"#SBATCH --{option}\n" in text
    for option in ("partition=gpu", "account=project", "qos=long", "constraint=a100", "comment='two words'", "requeue"):
        assert f"#SBATCH --{option}\n" in text
    assert "--wait=30 --cpus-per-task=3" in text
    job = submitit.SlurmJob(folder="runs/submitit", job_id="123").submission().function
    assert yaml.safe_load(job.config_file.read_text())["federation"]["clients"] == 5
    assert (job.resume, job.max_requeues) == (False, 5)
    log = tmp_path / "runs" / "submitit" / "123_0_log.out"
    assert capsys.readouterr().out.splitlines() == [
        f"job 123  run runs/embedded-full-iid-k5-e5-s0  log {log}",
        f"follow:  tail -F {log}",
        "stop:    scancel 123",
    ]


def test_the_script_is_printed_and_nothing_is_submitted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sbatch").write_text("#!/bin/sh\ntouch submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    site = "--time 1-12 --mem 64G --gres gpu:2 --sbatch.exclude=node7 --sbatch.reservation=mri".split()
    request(*site, "--setup", "module load cuda", "--print_script")
    lines = capsys.readouterr().out.splitlines()
    for option in ("time=2160", "mem=64G", "gres=gpu:2", "exclude=node7", "reservation=mri", "requeue"):
        assert f"#SBATCH --{option}" in lines
    assert "module load cuda" in lines and not Path("submitted").exists()


def test_what_slurm_refuses_is_one_line_and_a_job_around_it_does_not_leak(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = "sbatch: error: invalid partition specified: none\nsbatch: error: Batch job submission failed: Invalid"
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nenv > seen\necho '{said}' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "here")
    with pytest.raises(UserError, match="Slurm refuses the job: .*invalid partition specified: none") as refused:
        request("--partition", "none")
    assert "\n" not in str(refused.value)
    seen = Path("seen").read_text()
    assert "SLURM_MEM_PER_CPU" not in seen and "SLURM_CONF=here" in seen and os.environ["SLURM_MEM_PER_CPU"] == "100"


# --- waiting for it ------------------------------------------------------------------------------------------------

JOB = SimpleNamespace(job_id="123", task=lambda i: SimpleNamespace(paths=SimpleNamespace(stdout="123_0_log.out")))


def waited_for(states: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--wait` for a job on Slurm, which is in these states from poll to poll."""
    answers = iter(states)
    monkeypatch.setattr(submit, "slurm_state", lambda job: next(answers))
    monkeypatch.setattr(submit.clock, "sleep", lambda seconds: None)
    submit._wait([JOB], [submit.Task(Path("run"), [Config()], lambda: None)], "slurm")
    assert next(answers, None) is None


@pytest.mark.parametrize("hiccup", [["UNKNOWN"] * 11, ["PREEMPTED", "REQUEUE_HOLD"], ["NODE_FAIL", "PENDING"]])
def test_a_state_that_passes_does_not_end_the_wait(hiccup, monkeypatch, capsys):
    waited_for(["PENDING", "RUNNING", *hiccup, "RUNNING", "COMPLETED"], monkeypatch)
    assert capsys.readouterr().out.count("RUNNING  round 0/15") == 2


@pytest.mark.parametrize("states", [["FAILED"], ["CANCELLED"], ["UNKNOWN"] * 12, ["NODE_FAIL"] * 12])
def test_a_state_that_stays_ends_the_wait(states, monkeypatch):
    with pytest.raises(RunError, match=f"^job 123 {states[0]}, see 123_0_log.out$"):
        waited_for(["RUNNING", *states], monkeypatch)


# --- the child that trains -----------------------------------------------------------------------------------------


def supervised(code: str) -> subprocess.Popen[bytes]:
    """A process that supervises `sh -c CODE` and ends with its status."""
    program = "import sys; from fdiff.commands.submit_job import supervise; sys.exit(supervise(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", program, "sh", "-c", code], env=clean_env(PYTHONPATH=str(ROOT)))


@pytest.mark.parametrize("code, status", [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -USR2 $$", 140)])
def test_the_status_of_the_child_is_told(code, status):
    assert supervised(code).wait(60) == status
    assert callable(supervise)


def test_signals_reach_the_child_which_dies_with_its_parent(tmp_path):
    trap = f"trap 'echo got >{tmp_path}/got; exit 140' USR2; echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done"
    process = supervised(trap)
    wait_for((tmp_path / "pid").exists, 60, "the child")
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 140 and (tmp_path / "got").exists()
    (tmp_path / "pid").unlink()
    process = supervised(trap)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), 60, "the child")
    process.kill()
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    wait_for(lambda: not child.exists() or "Z (" in (child / "status").read_text(), 10, "the child's end")


@pytest.mark.parametrize(
    "status, said",
    [
        (137, "fdiff: rank 1 was ended by SIGKILL\n"),
        (3, "fdiff: rank 1 ended with status 3\n"),
        (255, "fdiff: rank 1 ended with status 255\n"),
        (1, ""),  # the training has said why
        (130, ""),  # cancelled
        (143, ""),
    ],
)
def test_how_a_training_ended_is_said_unless_it_was_told_to(status, said, monkeypatch, capsys):
    job = SimpleNamespace(cluster="slurm", job_id="123", global_rank=1)
    monkeypatch.setattr(submit_job, "load_submitit", lambda: SimpleNamespace(JobEnvironment=lambda: job))
    monkeypatch.setattr(submit_job, "supervise", lambda command: status)
    monkeypatch.setattr(submit_job, "slurm_state", lambda job: "CANCELLED")
    with pytest.raises(SystemExit) as ended:
        submit_job.Training(Path("config.yaml"), resume=False, max_requeues=5)()
    assert ended.value.code == status and capsys.readouterr().err == said


@pytest.mark.parametrize("killed, status", [(True, 0), (False, 1)])
def test_a_requeue_may_end_the_command_that_asked_for_it(killed, status, monkeypatch, capsys):
    def requeue(count: int) -> None:
        subprocess.run(["sh", "-c", "kill -TERM $$" if killed else "exit 5"], check=True)

    job = SimpleNamespace(cluster="slurm", job_id="123", global_rank=0, _requeue=requeue)
    monkeypatch.setattr(submit_job, "load_submitit", lambda: SimpleNamespace(JobEnvironment=lambda: job))
    monkeypatch.setattr(submit_job, "supervise", lambda command: submit_job.TIME_IS_UP)
    with pytest.raises(SystemExit) as ended:
        submit_job.Training(Path("config.yaml"), resume=False, max_requeues=5)()
    assert ended.value.code == status
    assert ("ended with 5; submit again with --resume" in capsys.readouterr().err) != killed


def test_only_the_controller_is_signalled_and_not_who_took_its_place(monkeypatch):
    signalled = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append(pid))
    submit_job._terminate(os.getppid() + 1)
    assert signalled == []
    submit_job._terminate(os.getppid())
    assert signalled == [os.getppid()]


# --- on this machine -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.rare  # two minutes of waiting; arrays of sbatch are in tests/launch, each job of this one is as the others
def test_an_array_trains_each_configuration(tmp_path):
    (tmp_path / "sweep").mkdir()
    for method in ("full", "udec"):
        fields = {"method": method, "run": {"dir": method}}
        (tmp_path / "sweep" / f"{method}.yaml").write_text(yaml.safe_dump(fields))
    launch = [sys.executable, ROOT / "launch" / "submit.py"]
    words = [*launch, *LOCAL, "--array", "sweep", "--wait", *TINY, "--sample.every", "0"]
    done = execute(words, tmp_path, env=clean_env(PYTHONPATH=str(ROOT))).check()
    assert done.out.count("COMPLETED  round 3/3") == 2
    for method in ("full", "udec"):
        assert yaml.safe_load((tmp_path / method / "config.yaml").read_text())["method"] == method
        assert rounds(tmp_path / method) == 3


@pytest.mark.slow
@pytest.mark.rare  # what requeues is the same as on Slurm: tests/launch/test_requeue.py
def test_the_local_job_requeues_itself_and_goes_on(tmp_path):
    flags = [*TINY, "--federation.rounds", "30", "--sample.every", "0", "--runtime.reduction", "ordered"]
    fdiff("train", *flags, "--run.dir", "whole", cwd=tmp_path).check()
    command = [*PYTHON, "submit", *LOCAL, "--tasks_per_node", "2", "--wait", *flags, "--run.dir", "run"]
    with started(command, tmp_path, clean_env(PYTHONPATH=str(ROOT))) as job:
        wait_for(lambda: rounds(tmp_path / "run") >= 2, 180, "two rounds")
        for pid in trainers(tmp_path).values():
            os.kill(pid, signal.SIGUSR2)
        assert job.wait(180) == 0, job.printed
        assert "fdiff: requeues job" in job.printed and "restart 1" in job.printed
    found, expected = arrays(tmp_path / "run", 30), arrays(tmp_path / "whole", 30)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


# --- what Slurm is told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("0:30", 1), ("2:00", 2), ("4:00:00", 240), ("1-00", 1440), ("1-12:30", 2190), ("2-00:30:01", 2911)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text, minutes):
    assert submit.minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "1-2-3", "-5", "UNLIMITED", "1.5"])
def test_what_is_no_time_limit_is_one_line(text):
    with pytest.raises(UserError, match="--time: .* is not valid; give it as Slurm does"):
        submit.minutes_of(text)
