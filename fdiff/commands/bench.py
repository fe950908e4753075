"""Measure a part of fdiff on this machine beside its baseline or its bound, in the same run.

Under torchrun or mpirun the ranks measure together. The configuration says what is measured: model, method, clients.
"""

from __future__ import annotations

import importlib
import json as json_module
from typing import Literal

import torch

from fdiff.bench import measure
from fdiff.comm import Communicator
from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.federation import infer_image_shape

What = Literal["step", "round", "wire", "sample", "checkpoint", "scale"]


def run(
    what: What,
    config: Config,
    comm: Communicator,
    device: torch.device,
    *,
    variants: bool = False,
    json: bool = False,
) -> None:
    """Measure.

    Args:
        what: step: local training; round: all of a round but local training; wire: rounds over slow links, as root;
            sample: drawing images; checkpoint: commits; scale: up to 100 clients on the ranks there are.
        variants: Of step: other arithmetics, executions, layouts and batch sizes (runtime.precision,
            runtime.execution, runtime.layout, optim.batch_size) in one table.
        json: Print one JSON object instead of a table.
    """
    if variants and what != "step":
        raise UserError(f"--variants: bench {what} has none; there are those of bench step")
    module = importlib.import_module(f"fdiff.bench.{'variants' if variants else what}")
    results = module.run(infer_image_shape(config, comm), comm, device)
    if comm.rank != 0:
        return
    about = measure.machine(comm, device)
    if json:
        print(json_module.dumps({"results": [r.as_json() for r in results], "machine": about}))
    else:
        print(measure.table(results, about, getattr(module, "NOTE", "")))
