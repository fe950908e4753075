"""From files to tensors: pixels against NumPy, and shards on the device and behind loaders."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_datasets import (
    CPU,
    folder,
    needs_gpu,
    pixels,
    refusal,
    save,
)
from torchvision.transforms import Resize
from warm_server import PROCESSES

from fdiff.config import DataConfig
from fdiff.data import Shard, Source, loaders, normalise, open_source, shards
from fdiff.data.decoding import decode
from fdiff.data.images import fit, prepare
from fdiff.errors import Interrupted, RunError
from fdiff.federation import federator
from fdiff.runtime import heeding_signals

# --- pixels


def numpy_area(image: np.ndarray, side: int) -> np.ndarray:
    """Means over rows (and columns) ⌊i·n/side⌋ up to ⌈(i + 1)·n/side⌉ of (n, n), rounded half to even."""
    n = len(image)
    spans = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    means = [[image[a:b, c:d].mean(dtype=np.float64) for c, d in spans] for a, b in spans]
    return np.rint(means).astype(np.uint8)


@pytest.mark.parametrize(("n", "side"), [(28, 16), (28, 14), (28, 27), (178, 64), (9, 4)])
def test_images_shrink_by_the_mean_of_areas(n: int, side: int) -> None:
    image = pixels(3, n, n)
    shrunk = prepare(torch.from_numpy(image)[None], side, 3, by_area=True)
    assert shrunk.dtype == torch.uint8
    for plane, expected in zip(shrunk[0].numpy(), image, strict=True):
        np.testing.assert_array_equal(plane, numpy_area(expected, side))


def test_the_embedded_images_shrink_by_area_however_many_there_are() -> None:
    whole, small = open_source(DataConfig(), "train"), open_source(DataConfig(image_side=16), "train")
    for i in (0, 1023, 1024, 1999):  # at the ends of the blocks in which they are resized
        np.testing.assert_array_equal(small.image(i)[0], numpy_area(whole.image(i)[0].numpy(), 16))


def test_images_grow_by_interpolation() -> None:
    ramp = np.tile(np.arange(0, 160, 20, dtype=np.uint8), (8, 1))
    grown = prepare(torch.from_numpy(ramp)[None, None], 16, 1, by_area=True)[0, 0].numpy()
    centres = (np.arange(16) + 0.5) / 2 - 0.5
    expected = np.rint(np.interp(centres, np.arange(8), ramp[0]))
    np.testing.assert_array_equal(grown, np.tile(expected, (16, 1)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("n", "side"), [(32, 28), (178, 64), (10, 16)])
def test_files_and_silos_are_resized_as_torchvision_does(n: int, side: int, mode: str) -> None:
    image = Image.fromarray(pixels(n, n, 3)).convert(mode)
    expected = np.asarray(Resize(side)(image)).reshape(side, side, -1).transpose(2, 0, 1)
    array = torch.from_numpy(np.asarray(image).reshape(n, n, -1).transpose(2, 0, 1).copy())
    np.testing.assert_array_equal(fit(image, side, len(expected)), expected)
    np.testing.assert_array_equal(prepare(array[None], side, len(expected))[0], expected)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 255))
def test_a_flat_image_stays_flat(height: int, width: int, side: int, level: int) -> None:
    flat = torch.full((2, 1, height, width), level, dtype=torch.uint8)
    assert torch.equal(prepare(flat, side, 3), torch.full((2, 3, side, side), level, dtype=torch.uint8))


def test_the_largest_centred_square_is_kept() -> None:
    wide = torch.from_numpy(pixels(1, 1, 5, 11))
    assert torch.equal(prepare(wide, 5, 1), wide[..., 3:8])
    assert torch.equal(prepare(wide.mT, 5, 1), wide.mT[:, :, 3:8])


def test_colour_becomes_grey_as_pillow_does_it_and_grey_is_repeated() -> None:
    colour = pixels(64, 64, 3)
    grey = prepare(torch.from_numpy(colour).permute(2, 0, 1)[None], 64, 1)
    np.testing.assert_array_equal(grey[0, 0], np.asarray(Image.fromarray(colour).convert("L")))
    repeated = prepare(grey, 64, 3)
    assert all(torch.equal(repeated[:, c], grey[:, 0]) for c in range(3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_files_of_any_mode_are_read_like_arrays(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(pixels(12, 10, 3)).convert(mode)
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    wanted = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(12, 10, channels)[1:11]
    read = fit(decode(path, 120, "white"), 10, channels)
    assert read.shape == (channels, 10, 10) and read.dtype == torch.uint8
    np.testing.assert_array_equal(read.permute(1, 2, 0), wanted)
    assert torch.equal(fit(decode(path, 120, "white"), 5, channels), prepare(read[None], 5, channels)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_images_span_minus_one_to_one(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = normalise(levels, dtype)
    assert scaled.dtype == dtype and (scaled[0], scaled[-1]) == (-1, 1)
    torch.testing.assert_close(scaled, torch.linspace(-1, 1, 256, dtype=dtype))
    assert torch.equal(((scaled + 1) * 127.5).round().byte(), levels)
    assert levels[255] == 255  # the images themselves are kept


# --- shards


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Source:
    """30 image files in 3 classes."""
    root = tmp_path_factory.mktemp("files")
    for i in range(30):
        save(root / str(i % 3) / f"{i:02d}.png", pixels(10, 10, 3, seed=i))
    return open_source(folder(root, channels=3), "train")


def drawn(shard: Shard, order: torch.Tensor, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(shard.batches(order, batch_size))


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize(("in_memory", "workers"), [("always", 0), ("always", 2), ("never", 0), ("never", 2)])
def test_batches_are_the_same_wherever_the_images_are(files, kind: str, in_memory: str, workers: int) -> None:
    source = files if kind == "files" else open_source(DataConfig(test_limit=30), "test")
    indices = np.random.default_rng(3).permutation(30)[:23]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(4))
    shard = Shard(source, indices, CPU, in_memory=in_memory, workers=workers)
    assert shard.in_memory == (in_memory == "always") and len(shard) == 23
    np.testing.assert_array_equal(shard.labels, source.labels[indices])
    batches = drawn(shard, order, 5)
    assert [len(images) for images, _ in batches] == [5, 5, 5, 5, 3] == [len(labels) for _, labels in batches]
    wanted = indices[order.numpy()]
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, torch.stack([source.image(i) for i in wanted]))
    np.testing.assert_array_equal(labels, source.labels[wanted])


def test_more_images_than_are_brought_over_at_once_stay_in_order() -> None:
    source = open_source(DataConfig(), "test")
    assert len(source) > shards.FILL_BATCH
    (whole,) = drawn(Shard(source, np.arange(500)[::-1], CPU, in_memory="always"), torch.arange(500), 500)
    assert torch.equal(whole[0], source.images(range(500)).flip(0))


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(["always", "never"]))
def test_an_epoch_holds_each_image_once(n: int, batch_size: int, seed: int, in_memory: str) -> None:
    source = open_source(DataConfig(test_limit=30), "test")
    shard = Shard(source, np.arange(n), CPU, in_memory=in_memory, workers=0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    batches = drawn(shard, order, batch_size)
    assert [len(images) for images, _ in batches] == [len(part) for part in order.split(batch_size)]
    seen = torch.cat([images for images, _ in batches])
    assert torch.equal(seen[order.argsort()], source.images(range(n)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(files, workers: int) -> None:
    shard = Shard(files, np.arange(30), CPU, in_memory="never", workers=workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn(shard, torch.arange(30), 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_takes_half_of_the_free_memory(monkeypatch) -> None:
    source = open_source(DataConfig(test_limit=10), "test")
    for free, kept in ((2 * 10 * 784, True), (2 * 10 * 784 - 1, False)):
        monkeypatch.setattr(shards, "free_memory", lambda device, free=free: free)
        assert Shard(source, np.arange(10), CPU, in_memory="auto", workers=0).in_memory == kept


def test_the_hosts_free_memory_is_what_the_kernel_says() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free * 0.5 < shards.free_memory(CPU) <= pages


@pytest.mark.parametrize(("in_memory", "workers"), [("never", 0), ("never", 2), ("always", 2)])
def test_a_damaged_file_is_one_line_out_of_a_worker_too(tmp_path: Path, in_memory: str, workers: int) -> None:
    for i in range(6):
        save(tmp_path / f"{i}.png", pixels(8, 8))
    (tmp_path / "4.png").write_bytes(b"damaged")
    source = open_source(folder(tmp_path, channels=1), "train")

    def epoch() -> None:
        drawn(Shard(source, np.arange(6), CPU, in_memory=in_memory, workers=workers), torch.arange(6), 2)

    refusal(epoch, str(tmp_path / "4.png"), "cannot be read as an image")


class Deadly:
    """A source that kills the process that reads it."""

    name, labels, shape, decodes = "deadly images", np.zeros(4, np.int64), (1, 8, 8), True

    def __init__(self) -> None:
        self.owner = os.getpid()

    def __len__(self) -> int:
        return 4

    def images(self, indices: np.ndarray) -> torch.Tensor:
        assert os.getpid() != self.owner
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_loader_process_that_dies_ends_the_run_with_a_line() -> None:
    with pytest.raises(RunError, match="loading deadly images failed: DataLoader worker") as raised:
        Shard(Deadly(), np.arange(4), CPU, in_memory="never", workers=1)
    assert "\n" not in str(raised.value)


class Stuck(Deadly):
    """A source whose reader stands still, as a process does that gets SIGSTOP or waits for a dead file server."""

    name = "stuck images"

    def images(self, indices: np.ndarray) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError


def test_loader_processes_that_stand_still_are_given_up_and_do_not_stay(monkeypatch) -> None:
    monkeypatch.setattr(loaders, "TICK_S", 0.1)
    with pytest.raises(RunError, match="stuck images failed: its loader processes have given nothing for 0.5 s; read"):
        Shard(Stuck(), np.arange(4), CPU, in_memory="never", workers=1, patience_s=0.5)
    assert not multiprocessing.active_children()


def test_a_rank_that_waits_for_them_heeds_a_signal(monkeypatch) -> None:
    monkeypatch.setattr(loaders, "TICK_S", 0.1)
    with heeding_signals() as stop, pytest.raises(Interrupted):
        stop.note(signal.SIGTERM, None)
        Shard(Stuck(), np.arange(4), CPU, in_memory="never", workers=1)
    assert not multiprocessing.active_children()


def read_and_be_killed(pipe: Connection, lock: Path) -> None:
    federator.lock(lock)
    Thread(target=lambda: pipe.send([p.pid for p in children()]), daemon=True).start()
    Shard(Stuck(), np.arange(4), CPU, in_memory="never", workers=1)


def children() -> list[multiprocessing.process.BaseProcess]:
    while not (found := multiprocessing.active_children()):
        time.sleep(0.01)
    time.sleep(0.5)  # to be stopped
    return found


def test_they_end_with_their_rank_and_hold_no_lock_of_it(tmp_path: Path) -> None:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    rank = PROCESSES.Process(target=read_and_be_killed, args=(theirs, tmp_path / "lock"))
    rank.start()
    (loader,) = ours.recv()
    with pytest.raises(BlockingIOError), (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    open_files = {os.readlink(f) for f in Path(f"/proc/{loader}/fd").iterdir()}
    assert str(tmp_path / "lock") not in open_files
    rank.kill()
    rank.join()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{loader}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{loader}").exists()


@pytest.mark.parametrize("limited", ["TMPDIR", "shm"])
def test_they_need_no_short_tmpdir_and_no_shared_memory(files, monkeypatch, tmp_path: Path, limited: str) -> None:
    if limited == "TMPDIR":
        long = tmp_path / ("x" * 120)
        long.mkdir()
        monkeypatch.setenv("TMPDIR", str(long))
        monkeypatch.setattr(tempfile, "tempdir", None)
    else:  # as where there is none left
        monkeypatch.setattr(torch.Tensor, "share_memory_", lambda self: pytest.fail("memory is shared"))
        monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_storage", lambda s: pytest.fail("shared"))
    whole = drawn(Shard(files, np.arange(30), CPU, in_memory="never", workers=0), torch.arange(30), 7)
    other = drawn(Shard(files, np.arange(30), CPU, in_memory="never", workers=2), torch.arange(30), 7)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, other, strict=True))


@needs_gpu
@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_batches_on_a_gpu_are_those_of_the_host(files, in_memory: str) -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    host = drawn(Shard(files, np.arange(30), CPU, in_memory="always", workers=0), order, 7)
    gpu = Shard(files, np.arange(30), torch.device("cuda"), in_memory=in_memory, workers=2)
    for (images, labels), (wanted, wanted_labels) in zip(drawn(gpu, order, 7), host, strict=True):
        assert images.is_cuda and labels.is_cuda
        assert torch.equal(images.cpu(), wanted) and torch.equal(labels.cpu(), wanted_labels)


@needs_gpu
def test_images_on_a_gpu_are_batched_without_waiting_for_it(files) -> None:
    batches = Shard(files, np.arange(30), torch.device("cuda"), in_memory="always").batches(torch.arange(30), 7)
    next(batches)  # the order has been brought over
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
