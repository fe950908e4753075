"""Step 2: the training step in its variants, beside the plain loop and the roofline."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from fdiff.bench import roofline, variants
from fdiff.bench.step import title
from fdiff.comm import SoloCommunicator
from tests.gpu.record import Record
from tests.gpu.sizes import paper

if TYPE_CHECKING:
    from tests.gpu.__main__ import Setting

LAST_S = 12.0  # a variant takes less; a compiled one may be cut off by the step's own limit


def run(record: Record, setting: Setting) -> None:
    """All variants that there is time for."""
    config = paper(setting)
    if setting.dry:
        variants.REPEATS, variants.WARMUP, variants.PLAIN_REPEATS, roofline.REPEATS = 2, 1, 1, 1
        roofline.MATRICES, roofline.COPIES = {"cpu": (256,)}, {"cpu": (1 << 20,)}
        torch.compile = partial(torch.compile, backend="aot_eager")  # all of a compiler but its minute of C++
        record.skip("captured variants")
    until = time.monotonic() + record.left_s - (0 if setting.dry else LAST_S)
    record.begin("plain loop")
    for variant, found in variants.measure(config, SoloCommunicator(), setting.device, until):
        name = title(variant)
        if not isinstance(found, str):
            record.add(name, found, note=variants.NOTE)
        elif found.startswith("not reached"):
            record.not_reached[name] = ""
        else:
            record.failed[name] = found
        record.begin(f"what comes after {name}")
