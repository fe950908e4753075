"""Step 5: `fdiff bench` sample, checkpoint, round and scale, each noted when it is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiff.bench import checkpoint, sample, scale
from fdiff.bench.measure import Result
from fdiff.comm import SoloCommunicator
from fdiff.config import Config
from fdiff.errors import one_line
from tests.gpu.record import Record
from tests.gpu.sizes import paper

if TYPE_CHECKING:
    from tests.gpu.__main__ import Setting

ROOT = Path(__file__).parents[2]


def run(record: Record, setting: Setting) -> None:
    """All four while time lasts; two ranks share the GPU for `round`, which one alone has not."""
    config, checkpoint.WIDTHS = paper(setting), (64,)
    checkpoint.COMMITS = checkpoint.STALLS = 3  # of five minutes for all there is less than one for commits
    if setting.dry:
        checkpoint.WIDTHS, checkpoint.COMMITS, checkpoint.STALLS, checkpoint.REST_S = (8,), 2, 2, 0.0
        scale.CLIENTS, scale.REPEATS = (1, 2, 5), 1
        sample.REPEATS = 1
        record.skip("device memory of many clients")
    comm = SoloCommunicator()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, dir=f"{folder}/run"))
        parts: dict[str, Callable[[], list[Result]]] = {
            "sample": lambda: sample.run(config, comm, setting.device),
            "checkpoint": lambda: checkpoint.run(config, comm, setting.device),
            "round": lambda: _round(config, setting, folder),
            "scale": lambda: scale.run(config, comm, setting.device),
        }
        for name, measure in parts.items():
            if record.left_s < 2:
                record.not_reached[name] = ""
                continue
            record.begin(name)
            try:
                record.add(name, measure())
            except Exception as error:
                record.failed[name] = str(one_line(error))
            record.save()


def _round(config: Config, setting: Setting, folder: str) -> list[Result]:
    """`fdiff bench round` on two ranks over gloo, in a job of its own."""
    widths = "(8,)" if setting.dry else "(28, 64)"
    script = Path(folder) / "bench_round.py"
    script.write_text(
        f"import sys\nfrom fdiff.bench import round\nround.WIDTHS, round.REPEATS = {widths}, 3\n"
        "from fdiff.commands.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    flags = [f"--model.dim={config.model.dim}", f"--model.dim_mults={list(config.model.dim_mults)}"]
    runtime = [f"--runtime.device={setting.device.type}", "--runtime.share_gpu=true", f"--run.dir={folder}/round"]
    here = ["--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]
    ranks = [sys.executable, "-m", "torch.distributed.run", *here, script]
    done = subprocess.run(
        [str(word) for word in (*ranks, "bench", "round", "--json", *flags, *runtime)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    rows = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    return [_result(row) for row in rows]


def _result(row: dict[str, Any]) -> Result:
    """A row of `--json` as it was: its last value names what it is beside."""
    kind = "bound" if "bound" in row else "baseline"
    return Result(row["name"], row["median"], row["spread"], row[kind], kind, row["unit"])
