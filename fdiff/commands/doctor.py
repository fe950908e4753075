"""Say what this machine has, and whether the job that the same flags would train could run here.

Under a launcher all ranks meet, start the backend that the job would use, sum a number, and report in one table. Exit
status 1 if the job could not run.
"""

from __future__ import annotations

import contextlib
import json as json_module
import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fdiff.comm import STARTERS, Communicator, agree, connect, exchange_json
from fdiff.commands import doctor_checks
from fdiff.commands.doctor_checks import FAULT, GAP, GIB, OK, Finding
from fdiff.commands.doctor_network import check_network
from fdiff.config import Config, RuntimeConfig
from fdiff.data import open_client_source
from fdiff.errors import RunError, UserError, one_line, shown
from fdiff.federation import rehearse
from fdiff.plan import hosted_by
from fdiff.runtime import Launch, choose_device, default_threads, network, visible_gpus

PATIENCE_S = 30.0  # how long ranks wait for each other
COLUMNS = ("rank", "host", "local", "device", "backend", "threads", "cores", "why")


def run(config: Config, launch: Launch, *, resume: bool = False, json: bool = False) -> None:
    """Examine this machine, on all ranks.

    Args:
        resume: As of `fdiff train`: whether the job could go on from the newest checkpoint of the run folder.
        json: Print one JSON object instead of tables.
    """
    seen = _see(config, launch, resume)
    comm, seen["problems"] = _meet(config.runtime, launch, seen["problems"])
    found = [Finding(**f) for f in seen["findings"]]
    seen["findings"] = [asdict(f) for f in doctor_checks.with_mpi_started(found, config, launch)]
    everyone = [seen] if comm is None else exchange_json(comm, seen)
    if comm is not None:
        everyone = _try(comm, config, launch, seen, everyone, resume)
    problems = _problems(config, launch, everyone)
    if launch.rank == 0 and json:
        print(json_module.dumps(_report(launch, everyone, problems)))
    elif launch.rank == 0:
        _print(config, launch, everyone, problems)
    if comm is not None:
        with contextlib.suppress(RunError):
            comm.close()
    if problems:
        raise RunError(f"this job could not run here: {problems[0]}")


# --- what a rank sees ----------------------------------------------------------------------------------------------


def _see(config: Config, launch: Launch, resume: bool) -> dict[str, Any]:
    """This rank's row of the table; one rank of each node looks at it."""
    findings, threads = [], config.runtime.threads
    if launch.local_rank == 0:
        findings = doctor_checks.check_node(config, launch, resume)
        findings[-1:-1] = check_network(config.runtime, launch)
    row: dict[str, Any] = {
        "rank": launch.rank,
        "host": socket.gethostname(),
        "local": f"{launch.local_rank} of {launch.local_size}",
        "device": "",
        "backend": "",
        "threads": threads or 0,
        "cores": network.own_cores(),
        "why": "",
    }
    problems = [f"{f.name}: {f.what}" + (f"; {f.remedy}" if f.remedy else "") for f in findings if f.status == FAULT]
    try:
        row["threads"] = threads or default_threads(config.runtime, launch)
        row["device"], row["why"] = _device(config.runtime, launch)
        _open_private(config, launch)
    except Exception as error:  # whatever a library makes of the data is one more finding
        problems.append(str(one_line(error, "" if isinstance(error, UserError) else "data.root")))
    return {"row": row, "findings": [asdict(f) for f in findings], "problems": problems, "notes": []}


def _device(runtime: RuntimeConfig, launch: Launch) -> tuple[str, str]:
    """The device that this rank would compute on, and why."""
    device, gpus = choose_device(runtime, launch), visible_gpus()
    if device.type == "cpu":
        return "cpu", "runtime.device cpu" if runtime.device == "cpu" else "no GPU is visible"
    left = "" if launch.cuda_visible is None else f" of CUDA_VISIBLE_DEVICES={launch.cuda_visible}"
    by_rank = runtime.share_gpu or device.index == launch.local_rank
    why = "the only one visible" if len(gpus) == 1 else f"local rank {launch.local_rank}" if by_rank else "the first"
    free = torch.cuda.mem_get_info(device)[0] / GIB
    return str(device), f"{why}{left}; {gpus[device.index].name}, {free:.1f} GiB free"


def _open_private(config: Config, launch: Launch) -> None:
    """UserError unless the images of the clients that this rank would host are there."""
    clients = config.federation.clients
    if config.data.partition == "private" and launch.size <= clients:
        for client in hosted_by(launch.rank, clients, launch.size):
            open_client_source(config.data, client, "train")


# --- what the ranks can do together --------------------------------------------------------------------------------


def _meet(
    runtime: RuntimeConfig, launch: Launch, problems: Sequence[str]
) -> tuple[Communicator | None, list[str]]:
    """Join the other ranks as the job would, or else by any way there is; None if there is none."""
    wanted = replace(runtime, timeout_s=min(runtime.timeout_s, PATIENCE_S))
    found = list(problems)
    for attempt in dict.fromkeys((wanted, RuntimeConfig(timeout_s=PATIENCE_S))):
        try:
            return connect(attempt, launch), found
        except (UserError, RunError) as error:
            found.append(str(one_line(error)))
    return None, found


def _try(
    comm: Communicator,
    config: Config,
    launch: Launch,
    seen: dict[str, Any],
    everyone: list[dict[str, Any]],
    resume: bool,
) -> list[dict[str, Any]]:
    """Start the backend on all ranks, sum a number, and go as far as a training goes before it takes memory.

    Unless one of them has a problem. Everybody's rows after it.
    """
    if any(each["problems"] for each in everyone):
        return everyone
    error: Exception | None = None
    try:
        _sum_ones(comm, torch.device(seen["row"]["device"]), config.runtime.share_gpu)
        seen["row"]["backend"] = comm.name
        seen["row"]["why"] += f"; {comm.name}: {_why_backend(comm.name, config.runtime, launch, seen['row']['device'])}"
    except (UserError, RunError) as failed:
        error = failed
    try:
        agree(comm, error)
        if not _fetches_first(config, everyone):
            seen["notes"] = rehearse(config, comm, torch.device(seen["row"]["device"]), resume)
        return exchange_json(comm, seen)
    except (UserError, RunError) as failed:
        seen["problems"].append(str(failed))
        if failed.agreed:
            return exchange_json(comm, seen)
        return [seen if each["row"]["rank"] == comm.rank else each for each in everyone]


def _fetches_first(config: Config, everyone: Sequence[dict[str, Any]]) -> bool:
    """Whether a training would get images that some node does not have: then nobody knows them yet."""
    name = f"data {config.data.dataset}"
    lacking = any(f["name"] == name and f["status"] != OK for each in everyone for f in each["findings"])
    return lacking and doctor_checks.fetches_images(config.data)


def _why_backend(backend: str, runtime: RuntimeConfig, launch: Launch, device: str) -> str:
    """What led to the backend: the launcher or `runtime.comm`, and for torch's two the devices."""
    if backend == "none":
        return "one rank"
    chosen = [] if runtime.comm == "auto" else [f"runtime.comm {runtime.comm}"]
    if backend == "mpi":
        return chosen[0] if chosen else f"mpirun of {STARTERS[launch.launcher]}"
    reason = "a GPU for each rank" if backend == "nccl" else "on the CPU" if device == "cpu" else "ranks share GPUs"
    return ", ".join([*chosen, reason])


def _sum_ones(comm: Communicator, device: torch.device, share_gpu: bool) -> None:
    """One from each rank, summed on all; RunError if that is not their number."""
    comm.open(device, share_gpu)
    number = torch.ones(1, device=device)
    with comm.ledger.purpose("statistics"):
        comm.all_reduce(number, range(comm.size))
    if number.item() != comm.size:
        raise RunError(f"{comm.name}: {comm.size} ranks added one each and got {number.item():g}")


def _problems(config: Config, launch: Launch, everyone: list[dict[str, Any]]) -> list[str]:
    """Why the job could not run, the same reason of several ranks once; [] if it could."""
    clients = config.federation.clients
    problems = [p for each in everyone for p in each["problems"]]
    if launch.size > clients:
        problems.append(f"federation.clients: {clients} clients cannot occupy {launch.size} ranks; start fewer")
    return list(dict.fromkeys(problems))


# --- the report ----------------------------------------------------------------------------------------------------


def _report(launch: Launch, everyone: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    nodes = [{"host": e["row"]["host"], "rank": e["row"]["rank"], "findings": e["findings"]} for e in everyone]
    return {
        "ok": not problems,
        "problems": problems,
        "notes": everyone[0]["notes"],
        "launcher": launch.launcher,
        "ranks": [each["row"] for each in everyone],
        "nodes": [node for node in nodes if node["findings"]],
    }


def _print(config: Config, launch: Launch, everyone: list[dict[str, Any]], problems: list[str]) -> None:
    nodes = [each for each in everyone if each["findings"]]
    for node in nodes[:1]:
        _print_findings([Finding(**f) for f in node["findings"]])
    known = {(f["name"], f["status"]) for node in nodes[:1] for f in node["findings"]}
    for node in nodes[1:]:
        other = [Finding(**f) for f in node["findings"] if (f["name"], f["status"]) not in known]
        if other:
            print(f"\n{node['row']['host']}, where rank {node['row']['rank']} is, differs:")
            _print_findings(other)
    started = "none: one rank" if launch.launcher == "none" else f"{launch.launcher}: {launch.size} ranks"
    print(f"\nlauncher {started}" + ("" if len(everyone) == launch.size else ", of which only this one was heard"))
    _print_rows([each["row"] for each in everyone])
    for note in everyone[0]["notes"]:
        print(f"  {shown(note)}")
    print(f"\n{config.method}, {config.federation.clients} clients, data {config.data.dataset}: ", end="")
    print("this job could run here" if not problems else "this job could not run here")
    for problem in problems:
        print(f"  !!  {shown(problem)}")


def _print_findings(findings: Sequence[Finding]) -> None:
    marks = {GAP: "--", FAULT: "!!"}
    for finding in findings:
        print(f"  {marks.get(finding.status, 'ok')}  {finding.name:20} {shown(finding.what)}")
        if finding.remedy:
            print(f"{'':26} > {shown(finding.remedy)}")


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    cells = [COLUMNS, *([shown(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for line in cells:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
