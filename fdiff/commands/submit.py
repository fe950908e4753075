"""Submit the training, or a sweep, to Slurm, or to this machine, through submitit.

The job stops itself before its time is up, commits a checkpoint, requeues itself and goes on from there.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import time as clock
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fdiff import registry, sweeps
from fdiff.commands.submit_job import Sweeping, Training, load_submitit, slurm_state
from fdiff.config import Config, flat, to_dict
from fdiff.config_file import apply_config_file, as_yaml
from fdiff.errors import RunError, UserError, shown
from fdiff.federation import check_ranks
from fdiff.runtime import expand_path, launcher

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


@dataclass(frozen=True)
class Task:
    """What a job is to do: the folder that it fills, the runs in it, and the function that submitit calls."""

    folder: Path
    runs: list[Config]
    call: Callable[[], None]


def run(
    config: Config,
    *,
    cluster: Literal["slurm", "local"] = "slurm",
    nodes: int = 1,
    tasks_per_node: int = 1,
    gpus_per_node: int = 0,
    cpus_per_task: int = 1,
    time: str = "60",
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    mem: str | None = None,
    gres: str | None = None,
    comment: str | None = None,
    sbatch: dict[str, str] | None = None,
    setup: str | None = None,
    array: str | None = None,
    sweep: Path | None = None,
    resume: bool = False,
    notice_s: int = 120,
    max_requeues: int = 5,
    log_dir: Path = Path("runs/submitit"),
    wait: bool = False,
    print_script: bool = False,
) -> None:
    """Submit the training.

    Args:
        cluster: slurm, or local: the same job on this machine, in the background.
        nodes: Nodes of a job.
        tasks_per_node: Ranks on each node; usually as many as GPUs.
        gpus_per_node: GPUs of each node; 0: the job sees none.
        cpus_per_task: Cores of each rank.
        time: Time limit of one start of the job, in Slurm's notation: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS,
            DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS.
        partition: Slurm partition.
        account: Slurm account.
        qos: Slurm quality of service.
        constraint: Features that the nodes must have.
        mem: Memory of each node, e.g. 64G.
        gres: Generic resources of each node, e.g. gpu:a100:2.
        comment: Comment for Slurm's accounting.
        sbatch: Any other option of sbatch, by its long name: --sbatch.exclude=node7 --sbatch.reservation=mri.
        setup: Shell commands that the job runs first, e.g. "module load cuda; conda activate fdiff".
        array: One job for each YAML file of fields, over all other flags: FILE,FILE,... or a folder of *.yaml.
        sweep: Instead of a training the sweep of this YAML file, or of one that ships with fdiff, in run.dir (by
            default runs/NAME of the file); of all other flags of the configuration only --runtime.* may be given.
        resume: Go on from the newest complete checkpoint of the run folder, if it has one.
        notice_s: Seconds before the time limit at which the job is told to stop.
        max_requeues: How often a job may requeue itself.
        log_dir: Folder for logs and submitit's files, on a file system that all nodes share.
        wait: Stay until the jobs have ended, and say how they get on; exit status 1 if one fails.
        print_script: Print the script that would be given to sbatch, and submit nothing.
    """
    resources = {
        "nodes": nodes,
        "tasks_per_node": tasks_per_node,
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": cpus_per_task,
        "timeout_min": minutes_of(time),
        "signal_delay_s": notice_s,
    }
    site: dict[str, Any] = {
        "partition": partition, "account": account, "qos": qos, "constraint": constraint, "mem": mem, "gres": gres,
        "comment": comment, "setup": [setup] if setup else None, "additional_parameters": sbatch,
    }  # fmt: skip
    if cluster == "local" and (given := [name for name, value in site.items() if value]):
        flag = given[0].replace("additional_parameters", "sbatch")
        raise UserError(f"--{flag}: is for Slurm; leave it out with --cluster local")
    if cluster == "local" and print_script:
        raise UserError("--print_script: with --cluster local there is no script; it is for Slurm")
    site["additional_parameters"] = {"requeue": True} | (sbatch or {})
    _check(cluster, resources, max_requeues)
    if sweep is None:
        configs = [config] if array is None else [apply_config_file(config, file, "--array") for file in _files(array)]
        _check_runs(configs, nodes * tasks_per_node, resume)
        files = [_keep(as_yaml(c), log_dir) for c in configs]
        calls = [Training(file, resume, max_requeues, _code(c)) for file, c in zip(files, configs, strict=True)]
        tasks = [Task(c.run_dir, [c], call) for c, call in zip(configs, calls, strict=True)]
    else:
        tasks = [_sweep(sweep, config, array, nodes * tasks_per_node, log_dir, max_requeues)]
    executor = _executor(cluster, log_dir, resources, {name: value for name, value in site.items() if value})
    if print_script:
        print(executor._make_submission_file_text(executor._submitit_command_str, "PRINTED"))
        return
    jobs = _submit(executor, [task.call for task in tasks])
    for job, task in zip(jobs, tasks, strict=True):
        print(f"job {job.job_id}  run {shown(task.folder)}  log {shown(_log(job))}")
    stop = "kill" if cluster == "local" else "scancel"
    ids = " ".join(job.job_id for job in jobs)
    print(f"follow:  tail -F {shlex.quote(shown(_log(jobs[0])))}\nstop:    {stop} {ids}", flush=True)
    if wait:
        _wait(jobs, tasks, cluster)


def minutes_of(text: str) -> int:
    """Slurm's notation of a time limit in whole minutes, rounded up; UserError if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise UserError(f"--time: {text!r} is not valid; give it as Slurm does, e.g. 90, 4:00:00, 1-12 or 2-00:30:00")
    days, *numbers = (int(number) if number else None for number in match.groups())
    first, second, third = numbers
    if days is not None:
        seconds = 86_400 * days + 3600 * first + 60 * (second or 0) + (third or 0)
    elif third is not None:
        seconds = 3600 * first + 60 * second + third
    else:
        seconds = 60 * first + (second or 0)
    return -(-seconds // 60)


# --- before the queue ----------------------------------------------------------------------------------------------


def _files(array: str) -> list[Path]:
    """The files of `--array`, in its order or, of a folder, by name."""
    given = [Path(expand_path("--array", file)) for file in array.split(",") if file]
    files = given
    if len(given) == 1 and given[0].is_dir():
        files = sorted(file for file in given[0].iterdir() if file.suffix == ".yaml")
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
        for field in registry.FIELDS:  # a file of --array may not name code, nor may the job's own file
            if registry.is_reference(name := flat(to_dict(config))[field]):
                registry.find(field, name)
        folder = config.run_dir
        check_ranks(config, ranks)
        if not resume and folder.exists():
            raise UserError(f"run.dir: '{folder}' exists already; choose another, or pass --resume to go on from it")
        if sum(other.run_dir == folder for other in configs) > 1:
            raise UserError(f"run.dir: '{folder}' is that of several jobs of --array; set run.dir in each of its files")


def _sweep(
    name: Path, config: Config, array: str | None, ranks: int, log_dir: Path, max_requeues: int
) -> Task:
    """The job of a sweep, which goes on with what its folder holds. UserError names what does not go with it."""
    if array is not None:
        raise UserError(f"--array: {array!r} does not go with --sweep, which is one job; submit each by itself")
    code = tuple(f"--{field}={name}" for field in registry.FIELDS for name in registry.allowed(field))
    besides = {"run.dir", *(flag.partition("=")[0].removeprefix("--") for flag in code)}
    fields, plain = flat(to_dict(config)), flat(to_dict(Config()))
    if any(plain.get(n) != v for n, v in fields.items() if n not in besides and not n.startswith("runtime.")):
        raise UserError("--sweep: the file says what runs; besides it give only --run.dir and --runtime.*")
    path = sweeps.find(str(name))
    out = Path(config.run.dir or f"runs/{path.stem}").absolute()
    runs = [cell.config for cell in sweeps.read(path, out, config.runtime).cells]
    for run in runs:
        check_ranks(run, ranks)
    given = {n: v for n, v in to_dict(config.runtime).items() if v is not None}
    flags = tuple(f"--runtime.{n}={str(v).lower() if v in (True, False) else v}" for n, v in given.items())
    file = _keep(path.read_text(encoding="utf-8"), log_dir)
    return Task(out, runs, Sweeping(file, out, (*flags, *code), max_requeues))


def _code(config: Config) -> tuple[str, ...]:
    """The flags that name again what of this configuration is the user's own code: a file alone may not."""
    fields = flat(to_dict(config))
    return tuple(f"--{name}={fields[name]}" for name in registry.FIELDS if registry.is_reference(fields[name]))


def _keep(text: str, log_dir: Path) -> Path:
    """Write the job's file down for it, as it is now, under a name that follows from its content."""
    file = log_dir.absolute() / f"config-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def _executor(cluster: str, log_dir: Path, resources: dict[str, int], site: dict[str, Any]) -> Any:
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
    )
    return executor


def _submit(executor: Any, calls: Sequence[Callable[[], None]]) -> Sequence[Any]:
    """Hand the jobs over, without what a job around this process has in its environment; UserError in Slurm's words."""
    with launcher.without_a_job():
        try:
            return executor.submit_array(calls)
        except load_submitit().core.utils.FailedJobError as error:
            said = [line for line in str(error).splitlines() if "sbatch: error" in line] or [str(error)]
            raise UserError(f"--cluster: Slurm refuses the job: {' '.join(' '.join(said).split())}") from None


# --- after it ------------------------------------------------------------------------------------------------------


def _log(job: Any) -> Path:
    """What rank 0 prints."""
    return job.task(0).paths.stdout


def _wait(jobs: Sequence[Any], tasks: Sequence[Task], cluster: str) -> None:
    """Say how the jobs get on until all have ended; RunError names those that failed."""
    said: dict[str, str] = {}
    ended: dict[str, str] = {}
    passing: Counter[str] = Counter()
    while len(ended) < len(jobs):
        for job, task in zip(jobs, tasks, strict=True):
            state = ended.get(job.job_id) or _state(job, cluster)
            line = f"job {job.job_id}  {state}  {_progress(task.runs)}"
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


def _progress(runs: Sequence[Config]) -> str:
    """How far the runs are, by their logs."""
    logs = [log for run in runs if (log := run.run_dir / "rounds.jsonl").exists()]
    done = sum(log.read_bytes().count(b"\n") for log in logs)
    return f"round {done}/{sum(run.federation.rounds for run in runs)}"
