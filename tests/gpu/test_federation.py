"""Whole runs on the GPU: hosted clients, ranks that share it, NCCL, resumption, export, memory, a client without it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_jobs import environment as rank_environment
from forked_jobs import free_port
from jobs import arrays, largest_difference, rows

from fdiff import load_model
from fdiff.comm.torch_dist import TorchCommunicator
from fdiff.config import to_dict
from fdiff.federation import Trainer, open_checkpoint
from fdiff.federation.export import save_model
from tests.gpu.small import SMALL, on, play

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
CLOSE = 1e-3  # of each tensor's norm: kernels may add in another order each time


def test_clients_hosted_on_one_rank_are_those_on_ranks_that_share_the_device(device, tmp_path, monkeypatch):
    ranks = 5 if device.type == "cuda" else 2
    config = on(device, share_gpu=True)
    hosted = play(config, device, tmp_path / "hosted", monkeypatch)
    spread = replace(config, run=replace(config.run, dir=str(tmp_path / "spread")))
    (tmp_path / "spread.yaml").write_text(json.dumps(to_dict(spread)))  # JSON is YAML
    path, port = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), free_port()
    job = [
        subprocess.Popen(
            [sys.executable, "-m", "fdiff", "train", f"--config={tmp_path}/spread.yaml"],
            env=rank_environment(rank, ranks, port) | {"PYTHONPATH": path}, cwd=tmp_path,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for rank in range(ranks)
    ]
    said = [rank.communicate(timeout=180)[1] for rank in job]
    assert [rank.returncode for rank in job] == [0] * ranks, said
    assert largest_difference(arrays(tmp_path / "spread", 2), arrays(hosted, 2)) <= CLOSE


def test_a_run_over_nccl_is_the_run_without(gpu, tmp_path, monkeypatch):
    comm = TorchCommunicator(dist.FileStore(str(tmp_path / "store"), 1), 0, 1, 30.0)
    comm.open(gpu)
    try:
        assert comm.name == "nccl"
        ours = torch.arange(5.0, device=gpu)
        dist.all_reduce(ours)
        assert ours.tolist() == [0, 1, 2, 3, 4]
        over = play(on(gpu), gpu, tmp_path / "nccl", monkeypatch, comm=comm)
    finally:
        comm.close()
    alone = play(on(gpu), gpu, tmp_path / "alone", monkeypatch)
    assert largest_difference(arrays(over, 2), arrays(alone, 2)) <= CLOSE


def test_a_resumed_run_is_the_run_that_never_stopped(device, tmp_path, monkeypatch):
    kept = replace(on(device), optim=replace(SMALL.optim, ema=0.9))
    kept = replace(kept, federation=replace(kept.federation, keep_optimizer=True))
    whole = play(kept, device, tmp_path / "whole", monkeypatch)
    first = replace(kept, federation=replace(kept.federation, rounds=1))
    play(first, device, tmp_path / "parts", monkeypatch)
    parts = play(kept, device, tmp_path / "parts", monkeypatch, resume=True)
    assert largest_difference(arrays(parts, 2), arrays(whole, 2)) <= CLOSE


def test_an_exported_model_computes_the_same_elsewhere(device, tmp_path, monkeypatch):
    saved = open_checkpoint(play(on(device), device, tmp_path / "run", monkeypatch))
    save_model(tmp_path / "model.safetensors", saved, client=1, ema=False)
    model, config = load_model(tmp_path / "model.safetensors")
    trainer = Trainer(on(device), device)
    trainer.buckets.flat.copy_(saved.parameters(1, ema=False))
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 20, 49])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(x.to(device), t.to(device)).cpu(), model(x, t), rtol=1e-3, atol=1e-4)
    assert config.method == "udec"


def test_the_devices_memory_does_not_grow_with_the_clients(gpu, tmp_path, monkeypatch, record_property):
    peaks = []
    for clients in (3, 12):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        config = on(gpu)
        config = replace(config, federation=replace(config.federation, clients=clients, rounds=1))
        play(config, gpu, tmp_path / str(clients), monkeypatch)
        peaks.append(torch.cuda.max_memory_allocated(gpu) - before)
    record_property("peak_bytes", peaks)
    images = 12 * 2 * 2 * 512  # each client's images and labels round up to a block
    assert peaks[1] <= 1.02 * peaks[0] + images


def test_a_client_without_memory_is_dropped_and_comes_back(device, tmp_path, monkeypatch):
    train = Trainer.train

    def greedy(trainer, client, round, *arguments):
        if (client.index, round) == (1, 1):
            torch.empty(1 << 50, dtype=torch.uint8, device=trainer.device)
        return train(trainer, client, round, *arguments)

    monkeypatch.setattr(Trainer, "train", greedy)
    config = on(device)
    config = replace(config, federation=replace(config.federation, on_client_failure="drop"))
    first, second = rows(play(config, device, tmp_path / "run", monkeypatch))
    assert list(first["dropped"]) == ["1"] and not second["dropped"]
    assert "memory" in first["dropped"]["1"].lower()
