"""What a node has for a job: software, GPUs, data, a place for the run; each gap with the command that closes it."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fdiff import __version__
from fdiff.comm import transports
from fdiff.config import Config, DataConfig
from fdiff.data import CIFAR10_URL, open_source
from fdiff.errors import UserError, one_line
from fdiff.evaluation import INCEPTION_FILE, default_extractor, find_inception_weights
from fdiff.federation import check_folder
from fdiff.runtime import Launch, visible_gpus

GIB = 2**30
OK, GAP, FAULT = "ok", "gap", "fault"  # there; missing, but this job does without; missing, and this job needs it
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
CUDA_HELP = "pip install --force-reinstall torch; https://pytorch.org/get-started has builds for older drivers"
PUBLIC = ("fashion-mnist", "cifar10", "celeba")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is a command, or what to change."""

    name: str
    status: str
    what: str
    remedy: str = ""


def check_node(config: Config, launch: Launch, resume: bool) -> list[Finding]:
    """Everything that matters to the job, in the order in which it is printed."""
    data, inception = _data(config), _inception()
    return [
        Finding("fdiff", OK, f"{__version__}, Python {platform.python_version()}, {sys.executable}"),
        *_torch(config, launch),
        *_transports(config, launch),
        _slurm(),
        _package("submitit", "fdiff submit", "slurm"),
        _package("matplotlib", "fdiff report and partition --plot", "report"),
        _package("pyarrow", "data.dataset parquet", "parquet"),
        _package("diffusers", "model.kind unet2d", "diffusers", FAULT if config.model.kind == "unet2d" else GAP),
        *data,
        inception,
        _offline(config, data, inception),
        _run_folder(config.run_dir, launch, resume),
    ]


def with_mpi_started(findings: Sequence[Finding], config: Config, launch: Launch) -> list[Finding]:
    """The same after the ranks have met: an MPI that has been started says whether it takes device pointers."""
    newer = {finding.name: finding for finding in _transports(config, launch)}
    return [newer.get(finding.name, finding) for finding in findings]


# --- software ------------------------------------------------------------------------------------------------------


def _torch(config: Config, launch: Launch) -> list[Finding]:
    cuda = torch.version.cuda
    found = [Finding("torch", OK, f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'CPU only'}")]
    gpus = visible_gpus()
    if gpus:
        free = [torch.cuda.mem_get_info(i)[0] / GIB for i in range(len(gpus))]
        return [*found, *(Finding(f"GPU {i}", OK, f"{g.name}, {free[i]:.1f} GiB free") for i, g in enumerate(gpus))]
    status = FAULT if config.runtime.device == "cuda" else GAP
    if launch.cuda_visible == "":
        return [*found, Finding("GPU", status, "hidden by an empty CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")]
    if shutil.which("nvidia-smi") is not None:
        return [*found, Finding("GPU", status, "none that torch can use, though there is nvidia-smi", CUDA_HELP)]
    return [*found, Finding("GPU", status, "none: no nvidia-smi either", "--runtime.device cpu, or a node with GPUs")]


def _transports(config: Config, launch: Launch) -> list[Finding]:
    """NCCL, gloo, MPI: a fault is what the job would communicate with and is not there."""
    has = transports()
    wants_mpi = config.runtime.comm == "mpi" or launch.launcher in ("openmpi", "mpich")  # torch meets over MPI there
    aware = {None: "known once started", True: "CUDA-aware", False: "not CUDA-aware, GPU tensors go over the host"}
    if has.mpi:
        mpi = Finding("MPI", OK, f"{has.mpi} ({aware[has.mpi_takes_device_pointers]})")
    else:
        what, _, remedy = has.mpi_problem.removeprefix("runtime.comm: ").partition("; ")
        mpi = Finding("MPI", FAULT if wants_mpi else GAP, what, remedy)
    return [
        Finding("NCCL", OK, has.nccl) if has.nccl else Finding("NCCL", GAP, "not in this torch", CUDA_HELP),
        Finding("gloo", OK, "in torch") if has.gloo else Finding("gloo", GAP, "not in this torch", "pip install torch"),
        mpi,
    ]


def _slurm() -> Finding:
    if shutil.which("sinfo") is None:
        return Finding("Slurm", GAP, "sinfo is not found", "ssh to a login node, or slurm/testcluster/up for a trial")
    version = _printed("sinfo", "--version").removeprefix("slurm-wlm ").removeprefix("slurm ")
    partitions = _printed("sinfo", "--noheader", "--format=%R (%a, %D nodes)").splitlines()
    if not partitions:
        return Finding("Slurm", GAP, "sinfo gets no answer", "export SLURM_CONF, or slurm/testcluster/up for a trial")
    return Finding("Slurm", OK, f"{version}; partitions {', '.join(partitions)}")


def _printed(*command: str) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _package(name: str, purpose: str, extra: str, if_missing: str = GAP) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, if_missing, f"not installed; only {purpose} needs it", f"pip install 'fdiff[{extra}]'")
    return Finding(name, OK, "installed")


# --- data and the run folder ---------------------------------------------------------------------------------------


def _data(config: Config) -> list[Finding]:
    """The job's data set, opened; and the public ones that are in their usual places, or where the job's is."""
    data = config.data
    root = "data" if data.root is None or data.partition == "private" else data.root
    found = [] if data.partition == "private" else [_data_set(data, GAP if fetches_images(data) else FAULT)]
    for name in PUBLIC:
        if name != data.dataset or data.partition == "private":
            place = None if name == "fashion-mnist" else root
            found.append(_data_set(DataConfig(dataset=name, root=place), GAP))
    return found


def fetches_images(data: DataConfig) -> bool:
    """Whether a training gets the images where they are not here."""
    return data.download and data.dataset == "fashion-mnist"


def _data_set(data: DataConfig, if_missing: str) -> Finding:
    name = f"data {data.dataset}"
    try:
        source = open_source(replace(data, download=False), "train")
    except Exception as error:  # whatever a library makes of the data is a finding
        what, _, remedy = str(one_line(error)).partition("; ")
        if data.dataset == "cifar10":
            folder = shlex.quote(data.root or "data")
            remedy = f"mkdir -p {folder} && curl -L {CIFAR10_URL} | tar xz -C {folder}"
        return Finding(name, if_missing, what, remedy)
    return Finding(name, OK, f"{source.name}: {len(source)} images")


def _inception() -> Finding:
    path = find_inception_weights()
    if path is not None:
        return Finding("Inception", OK, str(path))
    target = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return Finding(
        "Inception", GAP, "no weights; only FID needs them", f"curl -L --create-dirs -o {target} {INCEPTION_URL}"
    )


def _offline(config: Config, data: Sequence[Finding], inception: Finding) -> Finding:
    """Whether a node that reaches no other host has all that training and scoring read, or what to fetch before."""
    missing = [f"images of {config.data.dataset}"] if data and data[0].status == FAULT else []
    if fetches_images(config.data) and data[0].status != OK:
        missing = [f"images of {config.data.dataset}, which fdiff train would fetch"]
    try:
        extractor = default_extractor(config.data)
    except UserError:  # the images' shape is not known yet, or none suits by itself
        extractor = "inception"
    if extractor == "inception" and inception.status != OK:
        missing.append("Inception weights, which fdiff evaluate would fetch")
    if missing:
        what = f"not here: {'; '.join(missing)}"
        return Finding("no internet", GAP, what, "where there is internet, the commands above; or copy the files")
    return Finding("no internet", OK, f"images and the scores' extractor ({extractor}) are here; nothing is fetched")


def _run_folder(folder: Path, launch: Launch, resume: bool) -> Finding:
    """Whether the job can begin or go on in the run folder, and write it: found out by writing where it would be."""
    name = "run folder"
    place = folder
    try:
        if launch.rank == 0:  # as in a training: on other nodes it may be another
            check_folder(folder, resume)
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / GIB
    except UserError as error:
        what, _, remedy = str(error).removeprefix("run.dir: ").partition("; ")
        return Finding(name, FAULT, what, remedy)
    except OSError as error:
        return Finding(name, FAULT, f"{place} cannot be written ({error.strerror})", "--run.dir FOLDER")
    return Finding(name, OK, f"{folder} can be written, {free:.0f} GiB free")
