"""Submit the training to Slurm, or to this machine, through submitit.

The job stops itself before its time is up, commits a checkpoint, requeues itself and goes on from there.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import time as clock
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fdiff.config import Config, to_dict
from fdiff.errors import RunError, UserError
from fdiff.overlay import overlay
from fdiff.submission import Training, load_submitit, slurm_state

LOCAL_REQUEUES = 5  # submitit's local executor starts a job at most six times
DONE = "COMPLETED"
UNDER_WAY = frozenset(
    "PENDING CONFIGURING RUNNING COMPLETING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING REQUEUED REQUEUE_FED "
    "REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT".split()
)
MAY_PASS = frozenset({"UNKNOWN", "PREEMPTED", "NODE_FAIL"})  # no answer just now; about to be requeued, unless it stays
PASSING_POLLS = 12
SLURM_NAMES = {"tasks_per_node": "ntasks_per_node", "timeout_min": "time"}
POLL_S = {"slurm": 5.0, "local": 0.5}


def run(
    config: Config,
    *,
    cluster: Literal["slurm", "local"] = "slurm",
    nodes: int = 1,
    tasks_per_node: int = 1,
    gpus_per_node: int = 0,
    cpus_per_task: int = 1,
    time: int = 60,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    comment: str | None = None,
    array: str | None = None,
    resume: bool = False,
    notice_s: int = 120,
    max_requeues: int = 5,
    log_dir: Path = Path("runs/submitit"),
    wait: bool = False,
) -> None:
    """Submit the training.

    Args:
        cluster: slurm, or local: the same job on this machine, in the background.
        nodes: Nodes of a job.
        tasks_per_node: Ranks on each node; usually as many as GPUs.
        gpus_per_node: GPUs of each node; 0: the job sees none.
        cpus_per_task: Cores of each rank.
        time: Time limit in minutes, of one start of the job.
        partition: Slurm partition.
        account: Slurm account.
        qos: Slurm quality of service.
        constraint: Features that the nodes must have.
        comment: Comment for Slurm's books.
        array: One job for each YAML file of fields, over all other flags: FILE,FILE,... or a folder of *.yaml.
        resume: Go on from the newest complete checkpoint of the run folder, if it has one.
        notice_s: Seconds before the time limit at which the job is told to stop.
        max_requeues: How often a job may requeue itself.
        log_dir: Folder for logs and submitit's files, on a file system that all nodes share.
        wait: Stay until the jobs have ended, and say how they get on; exit status 1 if one fails.
    """
    resources = {
        "nodes": nodes,
        "tasks_per_node": tasks_per_node,
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": cpus_per_task,
        "timeout_min": time,
        "signal_delay_s": notice_s,
    }
    site = {"partition": partition, "account": account, "qos": qos, "constraint": constraint, "comment": comment}
    configs = [config] if array is None else [overlay(config, file, "--array") for file in _files(array)]
    _check(cluster, resources, max_requeues)
    _check_runs(configs, nodes * tasks_per_node, resume)
    executor = _executor(cluster, log_dir, resources, {name: value for name, value in site.items() if value})
    jobs = executor.submit_array([Training(_keep(each, log_dir), resume, max_requeues) for each in configs])
    for job, each in zip(jobs, configs, strict=True):
        print(f"job {job.job_id}  run {each.run_dir}  log {_log(job)}")
    stop = "kill" if cluster == "local" else "scancel"
    print(f"follow:  tail -F {shlex.quote(str(_log(jobs[0])))}\nstop:    {stop} {jobs[0].job_id}", flush=True)
    if wait:
        _wait(jobs, configs, cluster)


# --- before the queue ----------------------------------------------------------------------------------------------


def _files(array: str) -> list[Path]:
    """The files of `--array`, in its order or, of a folder, by name."""
    files = sorted(Path(array).glob("*.yaml")) if Path(array).is_dir() else [Path(f) for f in array.split(",") if f]
    if not files:
        raise UserError(f"--array: {array!r} holds no *.yaml; name a folder that does, or FILE,FILE,...")
    return files


def _check(cluster: str, resources: dict[str, int], max_requeues: int) -> None:
    """UserError names the flag that no job could have."""
    for name, flag in {**{n: n for n in resources}, "timeout_min": "time", "signal_delay_s": "notice_s"}.items():
        least = 0 if name == "gpus_per_node" else 1
        if resources[name] < least:
            raise UserError(f"--{flag}: {resources[name]} is not valid; it must be at least {least}")
    notice_s, limit_s = resources["signal_delay_s"], 60 * resources["timeout_min"]
    if notice_s >= limit_s:
        raise UserError(f"--notice_s: {notice_s} is not valid; it must be less than the time limit, {limit_s} s")
    if cluster == "local" and resources["nodes"] > 1:
        raise UserError(f"--nodes: {resources['nodes']} is not valid with --cluster local, which is one node")
    if max_requeues < 0 or (cluster == "local" and max_requeues > LOCAL_REQUEUES):
        right = f"between 0 and {LOCAL_REQUEUES} with --cluster local" if cluster == "local" else "at least 0"
        raise UserError(f"--max_requeues: {max_requeues} is not valid; it must be {right}")


def _check_runs(configs: Sequence[Config], ranks: int, resume: bool) -> None:
    """What each job would only find out after it waited in the queue. UserError."""
    for config in configs:
        clients, folder = config.federation.clients, config.run_dir
        if ranks > clients:
            raise UserError(f"--nodes, --tasks_per_node: {ranks} ranks for {clients} clients; at most one each")
        if not resume and folder.exists():
            raise UserError(f"run.dir: '{folder}' exists already; choose another, or pass --resume to go on from it")
        if sum(other.run_dir == folder for other in configs) > 1:
            raise UserError(f"run.dir: '{folder}' is that of several jobs of --array; set run.dir in each of its files")


def _keep(config: Config, log_dir: Path) -> Path:
    """Write the configuration down for the job, under a name that follows from its content."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    file = log_dir.absolute() / f"config-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def _executor(cluster: str, log_dir: Path, resources: dict[str, int], site: dict[str, str]) -> Any:
    """submitit's executor for jobs like this; UserError if there is no submitit or no Slurm."""
    submitit = load_submitit()
    if cluster == "local":
        executor = submitit.LocalExecutor(folder=log_dir)
        executor.update_parameters(**resources, stderr_to_stdout=True)
        return executor
    if shutil.which("sbatch") is None:
        raise UserError("--cluster: 'slurm', but sbatch is not found; submit on a login node, or use --cluster local")
    executor = submitit.SlurmExecutor(folder=log_dir)
    executor.update_parameters(
        **{SLURM_NAMES.get(name, name): value for name, value in resources.items() if value},
        **site,
        job_name="fdiff",
        stderr_to_stdout=True,
        # Ranks that wait for one that ended are killed, but not at once: a rank's status must be its own. Since Slurm
        # 22.05 srun does not take cpus-per-task over from the job.
        srun_args=["--wait=30", f"--cpus-per-task={resources['cpus_per_task']}"],
        additional_parameters={"requeue": True},
    )
    return executor


# --- after it ------------------------------------------------------------------------------------------------------


def _log(job: Any) -> Path:
    """What rank 0 prints."""
    return job.task(0).paths.stdout


def _wait(jobs: Sequence[Any], configs: Sequence[Config], cluster: str) -> None:
    """Say how the jobs get on until all have ended; RunError names those that failed."""
    said: dict[str, str] = {}
    ended: dict[str, str] = {}
    passing: Counter[str] = Counter()
    while len(ended) < len(jobs):
        for job, config in zip(jobs, configs, strict=True):
            state = ended.get(job.job_id) or _state(job, cluster)
            line = f"job {job.job_id}  {state}  {_progress(config)}"
            if said.get(job.job_id) != line:
                said[job.job_id] = line
                print(line, flush=True)
            passing[job.job_id] = passing[job.job_id] + 1 if state in MAY_PASS else 0
            if state not in UNDER_WAY and not 0 < passing[job.job_id] < PASSING_POLLS:
                ended[job.job_id] = state
        clock.sleep(POLL_S[cluster])
    failed = [f"job {job.job_id} {ended[job.job_id]}, see {_log(job)}" for job in jobs if ended[job.job_id] != DONE]
    if failed:
        raise RunError("; ".join(failed))


def _state(job: Any, cluster: str) -> str:
    """The job's state in Slurm's words."""
    if cluster == "slurm":
        return slurm_state(job.job_id)
    if job.state == "RUNNING":
        return "RUNNING"
    tasks = [job.task(i) for i in range(job.num_tasks)]
    return DONE if all(task.paths.result_pickle.exists() for task in tasks) else "FAILED"


def _progress(config: Config) -> str:
    """How far the run is, by its log."""
    log = config.run_dir / "rounds.jsonl"
    done = log.read_bytes().count(b"\n") if log.exists() else 0
    return f"round {done}/{config.federation.rounds}"
