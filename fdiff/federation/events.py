"""A run for TensorBoard: curves by round, bytes and seconds by purpose and phase, the configuration for its own table.

Everything is an event of the run's folder `tensorboard`, so that several runs compare by one `--logdir`. A resumed run
has TensorBoard forget what an earlier start wrote of later rounds (`purge_step`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fdiff.config import Config, flat, to_dict
from fdiff.errors import printable
from fdiff.federation.logs import Row
from fdiff.federation.snapshot import MAY_CHANGE

FOLDER = "tensorboard"
SCALARS = ("loss", "images_per_s", "wire_bytes", "communicated_parameters")
RESULT = "round/loss"  # beside the scores: what the table of runs shows of each
SCORED = {"fmnist-cnn": "fd_fmnist", "inception": "fid"}
OTHERS = ("precision", "recall", "missing_classes")


class Events:
    """Writes the events of a run that goes on after this round, 0 for a new one. Call `close` last."""

    def __init__(self, run_dir: Path, config: Config, last_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here
        from torch.utils.tensorboard.summary import hparams

        folder = run_dir / FOLDER
        follows = any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=last_round + 1 if follows else None)
        experiment, session, _ = hparams(hyper_parameters(config), dict.fromkeys(results(), 0.0))
        for summary in (experiment, session):
            self._writer.file_writer.add_summary(summary, last_round)

    def round(self, metrics: Mapping[str, Any], clients: Sequence[Row]) -> None:
        """The curves of a round: of its row in the log, and of those of its clients."""
        number = metrics["round"]
        curves = {f"round/{name}": metrics[name] for name in SCALARS}
        curves |= {f"seconds/{phase}": seconds for phase, seconds in metrics["seconds"].items()}
        curves |= {f"bytes/{purpose}": sent for purpose, sent in metrics.get("bytes_by_purpose", {}).items()}
        curves |= {f"client-{client['client']:04d}/loss": client["loss"] for client in clients}
        for tag, value in curves.items():
            self._writer.add_scalar(tag, value, number)

    def images(self, images: Tensor, round: int) -> None:
        """A round's sample grid, uint8 (n, C, S, S)."""
        self._writer.add_images("samples", images, round)

    def close(self) -> None:
        """Have all on the disk."""
        self._writer.close()


def hyper_parameters(config: Config) -> dict[str, bool | float | int | str]:
    """The fields that a resumed run may not change, by dotted name, in types that TensorBoard's table has."""
    fields = {name: value for name, value in flat(to_dict(config)).items() if not name.startswith(MAY_CHANGE)}
    return {name: v if isinstance(v, (bool, float, int)) else printable(str(v)) for name, v in fields.items()}


def score_tag(extractor: str, name: str, *kinds: str) -> str:
    """The tag of a score; `kinds` say whether it is of the moving average, or before the average, or of one client."""
    return f"score-{'-'.join((extractor, *kinds))}/{name}"


def results() -> list[str]:
    """The tags that the table of runs shows beside the hyper-parameters."""
    scores = [(extractor, name) for extractor, distance in SCORED.items() for name in (distance, *OTHERS)]
    averages = [score_tag(extractor, distance, "average") for extractor, distance in SCORED.items()]
    return [RESULT, *(score_tag(*score) for score in scores), *averages]


def write_scores(run_dir: Path, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
    """Have the run's events hold these curves of scores, (round, value) by tag, and no other ones.

    They have a file of their own, which is written anew, so that models that are scored again have no second point.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / FOLDER
    if folder.is_symlink():  # which may lead anywhere
        return
    before = list(folder.glob("events.out.tfevents.*.scores"))
    with SummaryWriter(str(folder), filename_suffix=".scores") as writer:
        for tag, points in curves.items():
            for round, value in points:
                writer.add_scalar(tag, value, round)
    for file in before:
        file.unlink(missing_ok=True)
