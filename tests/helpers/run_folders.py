"""The folder of a run that was never trained: two clients, two rounds, scores and sample grids, in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fdiff.config import Config, DataConfig, FederationConfig, ModelConfig, to_dict
from fdiff.federation import forecast_run

CONFIG = Config(
    method="udec",
    federation=FederationConfig(clients=2, rounds=2),
    data=DataConfig(image_side=8),
    model=ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8),
)
MODEL = {"ema": False, "local": False, "n": 99, "split": "test split", "n_real": 99, "resized_from": 8}
HOW = {"extractor": "fmnist-cnn", "checksum": "c" * 64, "sampler": "ddim", "steps": 4}


def round_row(round: int, **other: Any) -> dict[str, Any]:
    """A row of rounds.jsonl."""
    planned = forecast_run(CONFIG, 1)["rounds"][min(round, 2) - 1]
    speed = {"images": 64, "images_per_s": 9.5, "seconds": {"train": 6.5, "aggregate": 0.1}}
    who = {"selected": [0, 1], "dropped": {}, "reporters": planned["reporters"]}
    sent = {"communicated_parameters": planned["parameters"], "wire_bytes": 0, "bytes_by_purpose": {"parameters": 0}}
    return {"round": round, "loss": 1 / round, **speed, **who, **sent, **other}


def client_row(round: int, client: int, **other: Any) -> dict[str, Any]:
    """A row of clients.jsonl."""
    speed = {"images": 32, "images_per_s": 9.5, "seconds": {"train": 3.0}}
    loss = {"loss": 1 / round, "losses": [2.0, 1 / round]}
    return {"round": round, "client": client, **loss, **speed, "parameters_sent": 5, "bytes_sent": 20, **other}


def score_row(round: int, client: int | None, **other: Any) -> dict[str, Any]:
    """A row of scores.jsonl."""
    scores = {"fd_fmnist": 9.0 / round, "precision": 0.5, "missing_classes": [3]}
    return {"round": round, "client": client, **MODEL, **HOW, "scores": scores, **other}


def write_rows(file: Path, rows: list[Any]) -> None:
    """A log of these rows; text stands for a line as it is."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def write_run(folder: Path, grids: int = 2) -> Path:
    """The run in this folder, which is returned."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(CONFIG)))
    clients = [{"client": client, "images": 32, "labels": {"0": 20, "7": 12}} for client in (0, 1)]
    setting = {"fdiff": "0", "job": None, "ranks": [{"host": "here", "pid": 1, "device": "CPU"}], "clients": clients}
    (folder / "setting.json").write_text(json.dumps(setting))
    both = [(round, client) for round in (1, 2) for client in (0, 1)]
    write_rows(folder / "rounds.jsonl", [round_row(1), round_row(2)])
    write_rows(folder / "clients.jsonl", [client_row(*one) for one in both])
    write_rows(folder / "scores.jsonl", [score_row(*one) for one in both])
    for round in range(1, 1 + grids):
        Image.new("RGB", (20, 10), (round, 0, 0)).save(folder / "samples" / f"round-{round:06d}.png")
    return folder
