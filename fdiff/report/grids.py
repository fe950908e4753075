"""Sample grids as the page shows them: cut by client, laid out anew in few columns, beside real images of that size.

What is drawn is bounded: of many clients and rounds some are shown, and the page says so.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fdiff.config import Config
from fdiff.data import open_source
from fdiff.errors import UserError
from fdiff.federation import private_parts
from fdiff.report.runs import Run

COLUMNS = 8  # images side by side, at most: as many as a phone shows at a size that can be seen
TILE = 80  # CSS pixels, the most that an image is shown at
GAP, GREY = 1, 128  # between images, in pixels of theirs
PADDING = 2  # pixels between images, as `save_grid` writes them
MOST_MODELS, MOST_CLIENTS, MOST_ROUNDS = 40, 10, 12  # on a page, of a run, of a run
BUDGET = 12_000_000  # bytes of all pictures on a page, about
SYSTEM = ("embedded", "fashion-mnist")  # data sets that are found without a folder that somebody names

Tiles = Sequence[np.ndarray]  # images (h, w, 3), uint8


@dataclass(frozen=True)
class Strip:
    """Images of one model, or real ones: what they are, a PNG as data URL, its width in CSS pixels, how it scales."""

    caption: str
    url: str
    width: int
    pixelated: bool


@dataclass(frozen=True)
class Shot:
    """The strips of a round's grid."""

    round: int
    strips: list[Strip]


@dataclass(frozen=True)
class Gallery:
    """The grids of a run by round; `left_out` says what is not shown, "" if all is."""

    shots: list[Shot]
    left_out: str


def gallery(run: Run, runs: int) -> Gallery:
    """The grids of one of so many runs, at least one model of the last round."""
    if not run.grids:
        return Gallery([], "")
    rounds, budget = sorted(run.grids), BUDGET / runs
    models = _models(run, rounds[-1])
    one = len(_strip("", models[0][1]).url)
    shown = spread(len(models), min(MOST_CLIENTS, MOST_MODELS // runs, int(budget / one)))
    most = min(MOST_ROUNDS, int(budget / one / len(shown)))
    of_rounds = sorted(rounds[-1 - i] for i in spread(len(rounds), most))
    kind = "moving average" if run.config.optim.ema else "raw weights"
    shots = []
    for round in of_rounds:
        cut = _models(run, round)
        strips = [_strip(f"{cut[i][0]}, {kind}, round {round}", cut[i][1]) for i in shown if i < len(cut)]
        shots.append(Shot(round, strips))
    left_out = [f"{len(shown)} of {len(models)} clients"] * (len(shown) < len(models))
    left_out += [f"{len(shots)} of {len(rounds)} rounds"] * (len(shots) < len(rounds))
    return Gallery(shots, f"{' and '.join(left_out)} shown; the others are in samples/" if left_out else "")


def spread(count: int, most: int) -> list[int]:
    """So many at most, and one at least, of the numbers below `count`: evenly apart, the first and the last of them."""
    most = max(1, min(most, count))
    return [round(i * (count - 1) / max(1, most - 1)) for i in range(most)]


def real_images(config: Config, root: Path | None) -> tuple[Strip | None, str]:
    """As many images of the test split as a model has drawn, and what they are; or None, and why there are none.

    A run's folder may be a stranger's, and a page may be passed on: no folder that only the run names is read.
    """
    data = replace(config.data, download=False)
    if data.partition == "private":
        return None, "none, as private silos' images stay where they are"
    if root is not None:
        data = replace(data, root=str(root))
    elif data.root is not None or data.dataset not in SYSTEM:
        return None, f"fdiff report --root FOLDER shows the test images of {data.dataset} in that folder"
    try:
        source = open_source(data, "test")
        rows = np.random.RandomState(0).permutation(len(source))[: config.sample.images]
        images = source.images(rows).permute(0, 2, 3, 1).numpy()
    except UserError as error:
        return None, f"none: {error}"
    tiles = [np.repeat(image, 3 // image.shape[-1], axis=-1) for image in images]
    return _strip(f"real images, {source.name}", tiles), ""


def _models(run: Run, round: int) -> list[tuple[str, Tiles]]:
    """Each model that a round's grid shows, and its images; of a grid that is not laid out so the whole, as one."""
    with Image.open(io.BytesIO(run.grids[round]), formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    config, n = run.config, run.config.sample.images
    by_client = bool(private_parts(config))
    columns = n if by_client else math.ceil(math.sqrt(n))
    rows = config.federation.clients if by_client else -(-n // columns)
    tiles = _cut(pixels, rows, columns)
    if tiles is None:
        return [("all images", [pixels])]
    if not by_client:
        return [("global model", tiles[:n])]
    return [(f"client {client}", tiles[client * n : (client + 1) * n]) for client in range(rows)]


def _cut(pixels: np.ndarray, rows: int, columns: int) -> Tiles | None:
    """The images of a grid (H, W, 3) that `save_grid` wrote with so many rows and columns; None if it did not."""
    if rows == columns == 1:
        return _reduced([pixels])
    height, more = divmod(pixels.shape[0] - PADDING, rows)
    width, rest = divmod(pixels.shape[1] - PADDING, columns)
    if more or rest or height != width or width <= PADDING:
        return None
    side = width - PADDING
    corners = [(PADDING + row * width, PADDING + column * width) for row in range(rows) for column in range(columns)]
    return _reduced([pixels[top : top + side, left : left + side] for top, left in corners])


def _reduced(tiles: Tiles) -> Tiles:
    """Images (s, s, 3) in as few pixels as they had before they were enlarged without smoothing."""
    side = len(tiles[0])

    def is_enlarged_by(factor: int) -> bool:
        parts = (tile[::factor, ::factor] for tile in tiles)
        return all(np.array_equal(p.repeat(factor, 0).repeat(factor, 1), t) for p, t in zip(parts, tiles, strict=True))

    factors = (f for f in range(side // 2, 1, -1) if side % f == 0 and is_enlarged_by(f))
    factor = next(factors, 1)
    return [tile[::factor, ::factor] for tile in tiles]


def _strip(caption: str, tiles: Tiles) -> Strip:
    """The images (h, w, 3) side by side, in as many rows as they take."""
    (height, width, _), n = tiles[0].shape, len(tiles)
    columns = min(COLUMNS, n) if n > 16 else math.ceil(math.sqrt(n))
    sheet = np.full((-(-n // columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), GREY, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    is_grey = bool((sheet == sheet[..., :1]).all())
    written = io.BytesIO()
    Image.fromarray(sheet[..., 0] if is_grey else sheet).save(written, "PNG", optimize=True)
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return Strip(caption, url, columns * max(TILE, width if n == 1 else 0), pixelated=width < TILE)
