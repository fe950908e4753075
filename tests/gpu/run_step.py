"""Step 4: the paper's run, or as many of its rounds as there is time for, its grid and its scores."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from fdiff.comm import SoloCommunicator
from fdiff.config import Config
from fdiff.data.pictures import save_grid
from fdiff.evaluation import Scoring, ScoringRequest, summaries
from fdiff.federation import Federation, open_checkpoint
from fdiff.federation.sampling import draw_grid
from fdiff.runtime import Stop, allow_tf32
from tests.gpu.record import Record
from tests.gpu.sizes import paper

if TYPE_CHECKING:
    from tests.gpu.__main__ import Setting

SCORING_S = 25.0  # what is kept for the grid and the scores
IMAGES = 1000  # of each client, to be scored


def run(record: Record, setting: Setting) -> None:
    """Rounds until the time is up or all are done, then the grid, then `fd_fmnist` of each client."""
    config = _fastest(paper(setting), record)
    allow_tf32(config.runtime.precision == "tf32")
    with _folder() as folder:
        config = replace(
            config,
            run=replace(config.run, dir=str(folder / "run"), checkpoint_every=config.federation.rounds),
            sample=replace(config.sample, every=0),
        )
        federation = Federation(config, SoloCommunicator(), setting.device, Stop())
        try:
            _rounds(federation, record)
            _grid(federation, record)
            federation.commits.start()
            federation.commits.finish()
        finally:
            federation.close()
        _scores(config, record, setting, 98 if setting.dry else IMAGES)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the run: OUT may hold few files."""
    folder = Path(tempfile.mkdtemp(prefix="fdiff-gpu-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fastest(config: Config, record: Record) -> Config:
    """With the execution, the layout and the float32 or tf32 that the step before measured as the fastest."""
    path = record.out / "step.json"
    found = json.loads(path.read_text())["results"] if path.exists() else []
    batch, precisions = config.optim.batch_size, ("float32", "tf32")
    names = [
        (row["median"], row["name"].split(", "))
        for row in found
        if f"B {batch}, " in row["name"] and "roofline" not in row["name"]
    ]
    ranked = sorted((speed, words) for speed, words in names if words[3] in precisions)
    if not ranked:
        return config
    _, _, _, precision, *chosen = ranked[-1][1]
    execution = next((w for w in chosen if w in ("eager", "captured", "compiled")), "auto")
    layout = next((w for w in chosen if w.startswith("channels")), "auto")
    runtime = replace(config.runtime, precision=precision, execution=execution, layout=layout)
    record.add("choice", choice={"precision": precision, "execution": execution, "layout": layout})
    return replace(config, runtime=runtime)


def _rounds(federation: Federation, record: Record) -> None:
    """Play the rounds that there is time for; note seconds a round and images/s, the rest extrapolated."""
    config = federation.config
    federation.start(resume=False)
    took: list[float] = []
    for round in range(1, config.federation.rounds + 1):
        if took and record.left_s < took[-1] + (0 if record.dry else SCORING_S):
            record.not_reached[f"rounds {round} to {config.federation.rounds}"] = "extrapolated"
            break
        began = time.perf_counter()
        federation.round(round)
        took.append(time.perf_counter() - began)
        record.facts["seconds_of_rounds"] = took
        record.save()
    images = config.federation.local_epochs * sum(federation.rank.images.values())
    usual = median(took[1:] or took)
    whole = sum(took) + usual * (config.federation.rounds - len(took))
    record.add(
        f"{len(took)} rounds",
        images=sum(federation.rank.images.values()),
        images_per_s=images / usual,
        whole_run_s=whole,
        table={
            f"a round of {images} images, K = {config.federation.clients}": f"{usual:.3g} s, "
            f"{images / usual:.4g} images/s",
            f"all {config.federation.rounds} rounds ({len(took)} played)": f"{whole:.4g} s",
        },
    )


def _grid(federation: Federation, record: Record) -> None:
    images = draw_grid(federation.rank, federation.votes, 1, None)
    assert images is not None
    save_grid(record.out / "grid.png", images, federation.config.sample.images)
    record.add("grid")


def _scores(config: Config, record: Record, setting: Setting, images: int) -> None:
    """`fd_fmnist` of so many images of each client, by DDIM, each noted as it comes."""
    saved = open_checkpoint(config.run_dir)
    request = ScoringRequest(images=images, metrics=("frechet",))
    scoring = Scoring(SoloCommunicator(), torch.device(setting.device), config, request, None)
    rows = []
    for done in scoring.score(saved, ema=False):
        rows += done
        record.facts["scores"] = [{"client": row["client"], **row["scores"]} for row in rows]
        record.save()
    found = summaries(rows)["fd_fmnist"]
    name = f"fd_fmnist after round {saved.round}, {images} images a client by DDIM-{config.sample.steps}"
    table = {**record.facts["table"], name: f"{found['mean']:.3g}, worst {found['worst']:.3g}"}
    record.add("scores", table=table)
