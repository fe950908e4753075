"""`fdiff doctor` where it is asked: under each kind of launcher, alone, and where something is missing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import h5py
import mpi_libraries
import pytest
from jobs import TINY, Done, execute, fdiff, on_ranks
from launchers import LAUNCHERS, environment

pytestmark = pytest.mark.slow

WITHOUT = """import sys
for name in {names}: sys.modules[name] = None
from fdiff.commands.main import main
sys.exit(main({arguments}))"""


def findings(report: dict) -> dict[str, dict]:
    """The first node's findings by name."""
    return {finding["name"]: finding for finding in report["nodes"][0]["findings"]}


def alone(tmp_path: Path, *arguments: str, without: tuple[str, ...] = (), **env: str) -> Done:
    """`fdiff doctor`, in a Python that cannot import some packages."""
    return on_ranks(1, "doctor", *arguments, cwd=tmp_path, before=partial(take_away, without, env))[0]


def take_away(packages: tuple[str, ...], env: dict[str, str], rank: int) -> None:
    sys.modules.update(dict.fromkeys(packages))
    os.environ.update(env)


@pytest.mark.parametrize(
    "name, backend, ranks",
    [
        ("torchrun", "gloo", 2),
        ("openmpi", "mpi", 2),
        pytest.param("mpich", "mpi", 2, marks=pytest.mark.rare),  # another library, the same table
        pytest.param("srun", "gloo", 3, marks=pytest.mark.rare),  # another launcher, the same table
    ],
)
def test_one_table_for_all_ranks(name, backend, ranks, request, tmp_path):
    launcher = LAUNCHERS[name]
    words = launcher.words(ranks, "doctor", "--json", "--runtime.device", "cpu")
    done = execute(words, tmp_path, env=environment(launcher, request)).check()
    report = json.loads(done.out[done.out.index("{") :])  # one object, from one rank
    assert report["ok"] and report["problems"] == []
    assert report["launcher"] == name.removesuffix("-torch")
    assert [row["rank"] for row in report["ranks"]] == list(range(ranks))
    assert {(row["device"], row["backend"]) for row in report["ranks"]} == {("cpu", backend)}
    reason = {"openmpi": "mpi: mpirun of Open MPI", "mpich": "mpi: mpirun of MPICH"}.get(name, "gloo: on the CPU")
    assert {row["why"] for row in report["ranks"]} == {f"runtime.device cpu; {reason}"}
    locals_ = ["0 of 2", "1 of 2", "0 of 1"] if name == "srun" else ["0 of 2", "1 of 2"]
    assert [row["local"] for row in report["ranks"]] == locals_
    assert len(report["nodes"]) == (2 if name == "srun" else 1)
    library = {"openmpi": "Open MPI 5", "mpich": "MPICH"}.get(report["launcher"])
    if library:
        what = findings(report)["MPI"]["what"]
        assert what.startswith(library) and what.endswith("(not CUDA-aware, GPU tensors go over the host)")
    if name == "srun":
        assert findings(report)["Slurm"]["what"].endswith("partitions debug (up, 2 nodes)")


def test_mpich_under_srun(request, tmp_path):
    srun = ["srun", "-N2", "-n2", "--mpi=pmi2", "--kill-on-bad-exit", mpi_libraries.mpich().python]
    words = [*srun, "-m", "fdiff", "doctor", "--json", "--runtime.comm", "mpi", "--runtime.device", "cpu"]
    for _ in range(3):  # Slurm's plugin cuts some of the library's addresses, which then fails, or waits for ever
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = execute(words, tmp_path, timeout_s=60, env=environment(LAUNCHERS["srun"], request))
            if done.status == 0:
                break
    report = json.loads(done.check().out)
    assert (report["launcher"], [row["rank"] for row in report["ranks"]]) == ("srun", [0, 1])
    assert {row["why"] for row in report["ranks"]} == {"runtime.device cpu; mpi: runtime.comm mpi"}


def test_without_a_launcher_it_says_what_is_there(tmp_path):
    done = alone(tmp_path, "--runtime.device", "cpu").check()
    assert "launcher none: one rank\n" in done.out
    row = next(line for line in done.out.splitlines() if "0 of 1" in line)
    assert row.split()[0] == "0" and "cpu     none" in row and row.endswith("runtime.device cpu; none: one rank")
    assert "full, 5 clients, data embedded: this job could run here" in done.out
    for name in ("torch", "gloo", "data embedded", "run folder"):
        assert f"  ok  {name}" in done.out
    assert list(tmp_path.iterdir()) == []  # it only looked


def test_without_mpi_and_slurm_each_gap_has_its_command(tmp_path):
    python_only = {"PATH": str(tmp_path)}
    report = json.loads(alone(tmp_path, "--json", without=("mpi4py", "submitit"), **python_only).check().out)
    found = findings(report)
    assert (found["MPI"]["status"], found["MPI"]["remedy"]) == ("gap", "pip install 'fdiff[mpi]', or use torch")
    assert (found["submitit"]["status"], found["submitit"]["remedy"]) == ("gap", "pip install 'fdiff[slurm]'")
    assert found["Slurm"]["status"] == "gap" and found["Slurm"]["remedy"]
    assert all(f["remedy"] for f in found.values() if f["status"] != "ok")


def test_without_mpi_a_job_that_wants_it_could_not_run(tmp_path):
    done = alone(tmp_path, "--runtime.comm", "mpi", without=("mpi4py",))
    assert done.status == 1
    assert "  !!  MPI " in done.out and "this job could not run here" in done.out
    assert done.err.count("fdiff: error: ") == 1 and "pip install 'fdiff[mpi]'" in done.err


def test_a_library_that_is_asked_for_and_missing_is_not_taken_for_a_missing_mpi4py(tmp_path):
    found = findings(json.loads(alone(tmp_path, "--json", MPI4PY_MPIABI="nowhere").check().out))["MPI"]
    assert (found["status"], found["what"][:31]) == ("gap", "'mpi' needs an MPI library, and")
    assert "unset MPI4PY_MPIABI" in found["remedy"]


def test_without_mpi_under_mpirun_it_says_so_once(request, tmp_path):
    launcher = LAUNCHERS["openmpi"]
    code = WITHOUT.format(names=("mpi4py",), arguments=["doctor"])
    words = [*launcher.command(2)[:-2], "-c", code]
    done = execute(words, tmp_path, env=environment(launcher, request))
    assert done.status == 1
    assert done.err.count("fdiff: error: ") == 1 and "pip install 'fdiff[mpi]'" in done.err
    assert "openmpi: 2 ranks, of which only this one was heard" in done.out


def test_without_data_it_names_the_folder_and_the_package(tmp_path):
    done = alone(tmp_path, "--preset", "fmnist", "--data.root", "/nowhere", "--json")
    assert done.status == 1
    data = findings(json.loads(done.out))["data fashion-mnist"]
    assert data["status"] == "fault" and "/nowhere" in data["what"] and "apt install" in data["remedy"]
    assert "/nowhere" in done.err


def test_a_silo_that_claims_more_than_any_memory_is_one_line(tmp_path):
    with h5py.File(tmp_path / "site-0.h5", "w") as file:
        file.create_dataset("images", shape=(10**6, 724, 724), dtype="uint8", chunks=(1, 724, 724))
    flags = ("--data.partition", "private", "--data.root", "site-{client}.h5", "--federation.clients", "1")
    done = alone(tmp_path, *flags)
    assert done.status == 1 and "this job could not run here" in done.err and "Traceback" not in done.err


def test_public_data_sets_are_looked_for_where_the_jobs_data_is(tmp_path):
    cifar10 = tmp_path / "sets" / "cifar-10-batches-bin"
    cifar10.mkdir(parents=True)
    for i in range(1, 6):
        (cifar10 / f"data_batch_{i}.bin").write_bytes(bytes(2 * (1 + 3 * 32 * 32)))
    words = ("--data.dataset", "celeba", "--data.root", "sets", "--json")
    found = findings(json.loads(alone(tmp_path, *words).out))
    assert found["data celeba"]["status"] == "fault" and "img_align_celeba.zip" in found["data celeba"]["remedy"]
    assert (found["data cifar10"]["status"], found["data cifar10"]["what"][-10:]) == ("ok", " 10 images")
    assert found["data fashion-mnist"]["status"] in ("ok", "gap")
    elsewhere = findings(json.loads(alone(tmp_path, "--json").check().out))
    assert elsewhere["data cifar10"]["remedy"].startswith("mkdir -p data && curl -L https://www.cs.toronto.edu/")


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--run.dir", "/proc/run"], "run folder: /proc cannot be written"),
        (["--data.partition", "private", "--data.root", "/nowhere/{client}"], "client 0 has no folder of images"),
        (["--runtime.device", "cuda"], "no GPU is visible"),
    ],
)
def test_what_else_keeps_a_job_from_running(flags, reason, tmp_path):
    done = alone(tmp_path, *flags, CUDA_VISIBLE_DEVICES="")
    assert done.status == 1 and reason in done.out and "this job could not run here" in done.out


def test_more_ranks_than_clients(tmp_path):
    first, second = on_ranks(2, "doctor", "--federation.clients", "1", cwd=tmp_path)
    assert (first.status, second.status) == (1, 1)
    assert "1 clients cannot occupy 2 ranks" in first.out and not second.out


def test_an_mpi_that_srun_did_not_start_is_a_world_of_one_and_refused(request, tmp_path):
    launcher = LAUNCHERS["srun"]
    words = launcher.words(2, "doctor", "--runtime.comm", "mpi")
    done = execute(words, tmp_path, env=environment(launcher, request))
    assert done.status == 1 and "this job could not run here" in done.out
    assert "says that this is rank 0 of 1, and the launcher (srun) says rank 1 of 2" in done.out


def test_it_refuses_what_train_refuses(tmp_path):
    """With the same flags, and by the same line: a folder, a split, the images; and not where one may go on."""
    tiny = ("--federation.clients", "4", "--data.limit", "64", "--data.image_side", "8", "--model.dim", "8")
    tiny += ("--model.dim_mults", "[1,2]", "--model.head_dim", "8", "--runtime.threads", "1")
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "thesis.tex").write_text("precious")
    (tmp_path / "empty").mkdir()
    cases = [
        ("--run.dir", "exists"),
        ("--run.dir", "exists", "--resume"),
        ("--data.limit", "3"),
        ("--model.classes", "3"),
        ("--model.init", "exists/thesis.tex"),
        ("--optim.batch_size", "1000000000"),
    ]
    for flags in cases:
        words = [*tiny, *flags]
        doctor, train = (fdiff(command, *words, cwd=tmp_path) for command in ("doctor", "train"))
        assert doctor.status and train.status == 2, (flags, doctor, train)
        said = train.err.splitlines()[-1].removeprefix("fdiff: error: ").removeprefix("run.dir: ")
        assert said.partition("; ")[0] in doctor.err, flags
    fine = fdiff("doctor", *tiny, "--run.dir", "empty", cwd=tmp_path).check()
    assert "this job could run here" in fine.out and not any((tmp_path / "empty").iterdir())


@pytest.mark.rare  # the test above goes the same way, and is refused
def test_it_goes_on_where_train_would(tmp_path):
    flags = [*TINY, "--federation.rounds", "1", "--run.dir", "run"]
    fdiff("train", *flags, cwd=tmp_path).check()
    assert "'run' exists already" in fdiff("doctor", *flags, cwd=tmp_path).err
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    fdiff("doctor", *flags, "--resume", cwd=tmp_path).check()
    other = fdiff("doctor", *flags, "--resume", "--optim.lr", "0.5", cwd=tmp_path)
    assert other.status == 1 and "other values of optim.lr (was 1e-05, is 0.5)" in other.err
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_ranks_that_wait_and_what_they_communicate_over(tmp_path):
    env = {"OMPI_MCA_btl": "self", "UCX_LOG_LEVEL": "x\x1b[31m\ny", "NCCL_DEBUG": "WARN"}
    first, _ = on_ranks(2, "doctor", *TINY, "--federation.clients", 3, cwd=tmp_path, before=partial(take_away, (), env))
    lines = first.check().out.splitlines()
    assert any("network              gloo: lo (all ranks are on this node)" in line for line in lines)
    assert any(r"NCCL_DEBUG=WARN OMPI_MCA_btl=self UCX_LOG_LEVEL=x\x1b[31m\ny" in line for line in lines)
    assert any("3 clients on 2 ranks: ranks wait for the slowest for 2" in line for line in lines)
    assert any("no internet          images and the scores' extractor (fmnist-cnn) are here" in line for line in lines)
    header = next(line for line in lines if line.split()[:1] == ["rank"])
    assert header.split() == ["rank", "host", "local", "device", "backend", "threads", "cores", "why"]


def test_an_interface_that_is_not_here_is_a_fault(tmp_path):
    first, _ = on_ranks(
        2, "doctor", cwd=tmp_path, before=partial(take_away, (), {"GLOO_SOCKET_IFNAME": "eth99"})
    )
    assert first.status == 1 and "GLOO_SOCKET_IFNAME=eth99 names no interface of this host" in first.err


def test_a_node_without_internet(tmp_path):
    rgb = ("--data.dataset", "cifar10", "--data.root", "none")
    found = findings(json.loads(alone(tmp_path, *rgb, "--json", TORCH_HOME=str(tmp_path)).out))["no internet"]
    assert found["status"] == "gap"
    assert found["what"] == "not here: images of cifar10; Inception weights, which fdiff evaluate would fetch"
    fetched = ("--data.dataset", "fashion-mnist", "--data.root", "none", "--data.download", "true", "--json")
    report = json.loads(alone(tmp_path, *fetched).check().out)  # a training would get them
    assert findings(report)["no internet"]["what"].endswith("images of fashion-mnist, which fdiff train would fetch")
