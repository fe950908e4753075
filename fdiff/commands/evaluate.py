"""Score the images of a checkpoint on all ranks: Fréchet distance, KID, precision, recall, density, coverage, classes.

Where clients keep private parts each client's model is scored, else the global one; with a moving average also that.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from fdiff import checkpoint as checkpoints
from fdiff.assembly import together
from fdiff.comm import Communicator
from fdiff.config import RuntimeConfig
from fdiff.federator import append_jsonl
from fdiff.launcher import cache_folder
from fdiff.scoring import Scoring, Wanted, sampling_config, summary
from fdiff.snapshot import Saved, open_checkpoint
from fdiff.verdict import distance_of, warnings

NAMES = {"total_variation": "class t.v.", "missing_classes": "missing", "kid_deviation": "± kid"}
HIDDEN = ("kid_subset_size",)


def run(
    checkpoint: Path,
    runtime: RuntimeConfig,
    comm: Communicator,
    device: torch.device,
    *,
    images: int | None = None,
    extractor: Literal["fmnist-cnn", "inception"] | None = None,
    weights: Path | None = None,
    metrics: str | None = None,
    sampler: Literal["ddpm", "ddim"] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    root: str | None = None,
    local: bool = False,
    all_rounds: bool = False,
    json: bool = False,
) -> None:
    """Score images.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        runtime: Where and how it runs.
        images: Images of each model; by default as many as the test split has, at most 10000.
        extractor: fmnist-cnn (embedded, greyscale; distance fd_fmnist) or inception (distance fid); by default
            fmnist-cnn for greyscale images, else inception.
        weights: File of pytorch-fid's InceptionV3 weights; by default torch hub's cache, else a download.
        metrics: Some of frechet,kid,neighbours,classes; neighbours are precision, recall, density and coverage; by
            default all that can be had.
        sampler: ddpm or ddim; by default what the run used.
        steps: Steps of ddim; by default what the run used.
        batch_size: Images a sampling step; by default what the run used.
        root: Folder of the data set; by default what the run used.
        local: Score each client's model as it was before the last average, as the paper did; the run must have been
            trained with --run.keep_local.
        all_rounds: Score every checkpoint that the run has kept, oldest first.
        json: Print one JSON object for each checkpoint instead of a table.
    """
    saved = together(comm, lambda: _open(checkpoint, all_rounds))
    config = together(comm, lambda: sampling_config(saved[-1], sampler=sampler, steps=steps, batch_size=batch_size))
    config = replace(config, runtime=runtime, data=replace(config.data, root=root or config.data.root))
    asked = None if metrics is None else tuple(metrics.split(","))
    scoring = Scoring(comm, device, config, Wanted(images, extractor, weights, asked), cache_folder() / "features")
    for one in saved:
        rows = [
            r for ema in (False, True)[: 1 + one.has_ema] for r in scoring.score(one, ema, local, _bar(comm, one, ema))
        ]
        together(comm, lambda one=one, rows=rows: _tell(one, rows, json) if comm.rank == 0 else None)


def _open(path: Path, all_rounds: bool) -> list[Saved]:
    kept = checkpoints.generations(path) if all_rounds else []
    return [open_checkpoint(g.path) for g in kept] or [open_checkpoint(path)]


def _bar(comm: Communicator, saved: Saved, ema: bool) -> Any:
    """A progress bar over rank 0's batches, where a person watches."""
    title = f"round {saved.round}{', moving average' if ema else ''}"

    def progress(batches: Iterable[int]) -> Iterable[int]:
        return tqdm(batches, desc=title, unit="batch", leave=False, disable=None if comm.rank == 0 else True)

    return progress


# --- what rank 0 says ------------------------------------------------------------------------------------------------


def _tell(saved: Saved, rows: list[dict[str, Any]], json: bool) -> None:
    """Append the rows to the run's log, if the checkpoint is still in its run, and print them."""
    folder = saved.path.resolve().parents[1]
    run_dir = folder if (folder / "config.yaml").exists() else None
    if run_dir is not None:
        append_jsonl(run_dir / "scores.jsonl", rows)
    found = warnings(rows, saved.config, run_dir)
    if json:
        print(json_module.dumps(_as_object(saved, rows, found)), flush=True)
        return
    print(_table(saved, rows), flush=True)
    for warning in found:
        print(f"warning: {warning}", flush=True)


def _as_object(saved: Saved, rows: list[dict[str, Any]], found: list[str]) -> dict[str, Any]:
    facts = {k: v for k, v in rows[0].items() if k not in ("client", "ema", "scores")}
    models = [{"client": row["client"], "ema": row["ema"], **row["scores"]} for row in rows]
    name = distance_of(rows[0])
    summaries = {
        "ema" if ema else "raw": {name: summary(of_kind, name)}
        for ema in (False, True)
        if name and len(of_kind := [r for r in rows if r["ema"] == ema]) > 1
    }
    return {"checkpoint": str(saved.path), **facts, "scores": models, "summary": summaries, "warnings": found}


def _table(saved: Saved, rows: list[dict[str, Any]]) -> str:
    facts, names = rows[0], [n for n in rows[0]["scores"] if n not in HIDDEN]
    resized = f", images resized from {facts['resized_from']} pixels" if "resized_from" in facts else ""
    lines = [
        f"{saved.path}: round {saved.round}, {facts['n']} images a model, {facts['sampler']}, {facts['steps']} steps"
        + (", before the average" if facts["local"] else ""),
        f"against {facts['split']} ({facts['n_real']} images)",
        f"extractor {facts['extractor']} {facts['checksum'][:12]}{resized}",
        "",
        f"{'model':18}" + "".join(f"{NAMES.get(name, name):>12}" for name in names),
    ]
    for row in rows:
        model = "global" if row["client"] is None else f"client {row['client']}"
        cells = "".join(f"{_cell(row['scores'][name]):>12}" for name in names)
        lines.append(f"{model + (', average' if row['ema'] else ''):18}{cells}")
    return "\n".join([*lines, *_summaries(rows)])


def _summaries(rows: list[dict[str, Any]]) -> list[str]:
    name = distance_of(rows[0])
    lines = []
    for ema in (False, True):
        of_kind = [row for row in rows if row["ema"] == ema]
        if name and len(of_kind) > 1:
            facts = summary(of_kind, name)
            lines.append(
                f"{name}{' of the moving averages' if ema else ''}: {facts['mean']:.2f} ± {facts['deviation']:.2f} "
                f"over {len(of_kind)} clients, worst {facts['worst']:.2f} (client {facts['worst_client']})"
            )
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return f"{value:.4f}"
