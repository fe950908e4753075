"""Score the images of a checkpoint on all ranks: Fréchet distance, KID, precision, recall, density, coverage, classes.

Where clients keep private parts each client's model is scored, else the global one; with a moving average also that.
"""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fdiff import checkpoint as checkpoints
from fdiff.comm import Communicator
from fdiff.config import RuntimeConfig
from fdiff.errors import shown
from fdiff.evaluation import (
    Row,
    Scoring,
    ScoringRequest,
    described,
    find_warnings,
    refresh_events,
    sampling_config,
    summaries,
)
from fdiff.federation import Saved, append_jsonl, on_rank_0, open_together, together
from fdiff.runtime import cache_folder

NAMES = {"total_variation": "class t.v.", "missing_classes": "missing", "kid_deviation": "± kid"}
HIDDEN = ("kid_subset_size",)
SUMMARY = {"mean": "mean", "deviation": "± deviation", "worst": "worst", "worst_client": "worst client"}


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
    root: Path | None = None,
    local: bool = False,
    all_rounds: bool = False,
    json: bool = False,
) -> None:
    """Score images.

    Args:
        checkpoint: Folder of a checkpoint, or of a run: then its newest.
        runtime: Where and how it runs.
        images: Images of each model; by default as many as the test split has, at most 10000. Fewer than the extractor
            has features (96 or 2048) are scored with a warning.
        extractor: fmnist-cnn (embedded, of Fashion-MNIST; distance fd_fmnist) or inception (distance fid); by default
            fmnist-cnn for Fashion-MNIST, inception for RGB images, else it has to be given.
        weights: File of pytorch-fid's InceptionV3 weights; by default torch hub's cache, else a download.
        metrics: Some of frechet,kid,neighbours,classes; neighbours are precision, recall, density and coverage; by
            default all that can be had.
        sampler: ddpm or ddim; by default what the run used.
        steps: Steps of ddim; by default what the run used.
        batch_size: Images a sampling step; by default what the run used.
        root: Folder of the data set; by default what the run used.
        local: Score each client's model as it was before the last average, as the paper did with udec and ulatdec; the
            run must have been trained with --run.keep_local.
        all_rounds: Score every checkpoint that the run has kept, oldest first.
        json: Print one JSON object for each checkpoint instead of a table.
    """
    saved = _open(comm, checkpoint, all_rounds)
    chosen = {"sampler": sampler, "steps": steps, "batch_size": batch_size}
    config = together(comm, lambda: sampling_config(saved[-1].config, **chosen))
    config = replace(config, runtime=runtime, data=replace(config.data, root=str(root) if root else config.data.root))
    asked = None if metrics is None else tuple(metrics.split(","))
    request = ScoringRequest(images, extractor, weights, asked)
    scoring = Scoring(comm, device, config, request, cache_folder("features"))
    for one in saved:
        kinds = (False, True)[: 1 + one.has_ema]
        rows: list[Row] = []
        for ema in kinds:
            for done in scoring.score(one, ema, local=local):
                together(comm, lambda one=one, done=done: _keep(one, done))
                rows += done
        rows.sort(key=lambda row: (row["ema"], row["client"] or 0))
        together(comm, lambda one=one, rows=rows: _tell(one, rows, json) if comm.rank == 0 else None)
    if (run_dir := _run_of(saved[-1])) and comm.rank == 0:
        refresh_events(run_dir)


def _open(comm: Communicator, path: Path, all_rounds: bool) -> list[Saved]:
    """The newest checkpoint, or all; the same ones on every rank, which a run that trains on does not take away."""
    kept = on_rank_0(comm, lambda: [str(g.path) for g in checkpoints.generations(path)] if all_rounds else [])
    return [open_together(comm, Path(each)) for each in kept or [path]]


def _run_of(saved: Saved) -> Path | None:
    """The folder of the checkpoint's run, if it is still in it."""
    folder = saved.path.resolve().parents[1]
    return folder if (folder / "config.yaml").exists() else None


def _keep(saved: Saved, rows: list[Row]) -> None:
    """Append the rows of a model to the run's log at once: what is scored is not lost if the rest fails."""
    if rows and (run_dir := _run_of(saved)):
        append_jsonl(run_dir / "scores.jsonl", rows)


# --- what rank 0 says ------------------------------------------------------------------------------------------------


def _tell(saved: Saved, rows: list[Row], json: bool) -> None:
    """Print the rows."""
    found = find_warnings(rows, saved.config, _run_of(saved))
    if json:
        print(json_module.dumps(_as_object(saved, rows, found)), flush=True)
        return
    print(_table(saved, rows), flush=True)
    for warning in found:
        print(f"warning: {shown(warning)}", flush=True)


def _as_object(saved: Saved, rows: list[Row], found: list[str]) -> dict[str, Any]:
    facts = {k: v for k, v in rows[0].items() if k not in ("client", "ema", "scores")}
    models = [{"client": row["client"], "ema": row["ema"], **row["scores"]} for row in rows]
    summary = {"ema" if ema else "raw": summaries(of_kind) for ema, of_kind in _kinds(rows) if len(of_kind) > 1}
    return {"checkpoint": str(saved.path), **facts, "scores": models, "summary": summary, "warnings": found}


def _table(saved: Saved, rows: list[Row]) -> str:
    names = [name for name in rows[0]["scores"] if name not in HIDDEN]
    cells = [["model", *(NAMES.get(name, name) for name in names)]]
    for ema, of_kind in _kinds(rows):
        average = ", average" if ema else ""
        for row in of_kind:
            model = "global" if row["client"] is None else f"client {row['client']}"
            cells.append([model + average, *(_cell(row["scores"][name]) for name in names)])
        if len(of_kind) > 1:
            found = summaries(of_kind)
            for fact, title in SUMMARY.items():
                cells.append([title, *(_cell(found[n][fact]) if n in found else "" for n in names)])
    return "\n".join([f"{shown(saved.path)}: round {saved.round}", shown(described(rows[0])), "", *_aligned(cells)])


def _kinds(rows: list[Row]) -> list[tuple[bool, list[Row]]]:
    """The rows of the raw models and, if there are any, of their moving averages."""
    kinds = [(ema, [row for row in rows if row["ema"] == ema]) for ema in (False, True)]
    return [(ema, of_kind) for ema, of_kind in kinds if of_kind]


def _aligned(cells: list[list[str]]) -> list[str]:
    """A line for each row of cells: columns as wide as their widest cell, two spaces apart."""
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths, strict=True))]).rstrip()
        for row in cells
    ]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
