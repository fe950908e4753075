"""Faults planted inside a rank: at a place of the program, something real happens to the process.

The program has no hooks for this: its functions are wrapped from outside, in the rank's own process.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

PLACES = ("training", "before a collective", "in a collective")
FAILURES = ("exception", "allocator", "loss")


def die() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def segfault() -> None:
    """Read at address 0."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def hold_the_lock(seconds: float) -> None:
    """No other thread of this process runs Python meanwhile: a call that does not give the interpreter's lock back."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def kill_rank(place: str, victim: int, round: int, seed: int, rank: int, die: Callable[[], None] = die) -> None:
    """The end of a rank in a round: in a training step, between vote and collective, or within a collective."""
    if rank != victim:
        return
    from fdiff.federation.client import Trainer

    now = {"round": 0}
    train, step, chance = Trainer.train, Trainer.step, random.Random(seed)

    def noting_round(self, client, of_round, tick=lambda: None):
        now["round"] = of_round
        return train(self, client, of_round, tick)

    def deadly_step(self, *batch):
        if place == "training" and now["round"] == round:
            die()
        return step(self, *batch)

    Trainer.train, Trainer.step = noting_round, deadly_step
    if place != "training":
        _deadly_payload(place, lambda: now["round"] == round, chance, die)


def _deadly_payload(place: str, due, chance: random.Random, die: Callable[[], None]) -> None:
    from fdiff.comm.torch_dist import TorchCommunicator

    def deadly(payload):
        def of(self, *arguments):
            if due() and place == "before a collective":
                die()
            if due():
                threading.Timer(chance.uniform(0, 0.003), die).start()
            return payload(self, *arguments)

        return of

    for name in ("combine", "send", "recv"):
        setattr(TorchCommunicator, name, deadly(getattr(TorchCommunicator, name)))


def note_commits() -> None:
    """Each commit that came to its end is noted, outside of the run's folder, which may be what is struck."""
    from fdiff.checkpoint import commit

    make_visible = commit.make_visible

    def noting(temporary: Path, run_dir: Path, round: int, keep: int) -> Path:
        final = make_visible(temporary, run_dir, round, keep)
        with Path(f"{run_dir.name}.committed").open("a") as file:
            file.write(f"{round}\n")
        return final

    commit.make_visible = noting


def kill_in_commit(seed: int, rank: int) -> None:
    """SIGKILL at a uniformly random point of the third commit of this process."""
    if rank != 0:
        return
    from fdiff.checkpoint import commit

    make_visible, start, chance = commit.make_visible, commit.Committer.start, random.Random(seed)
    began: list[float] = []
    took: list[float] = []

    def timing(*arguments: object) -> Path:
        final = make_visible(*arguments)
        took.append(time.monotonic() - began[-1])
        return final

    def starting(self, *arguments):
        began.append(time.monotonic())
        start(self, *arguments)
        if len(began) == 3:
            threading.Timer(chance.uniform(0, 1.2 * max(took)), die).start()

    commit.make_visible, commit.Committer.start = timing, starting


def stop_in_round(round: int, step: int, victim: int, rank: int) -> None:
    """SIGTERM of this rank itself at a training step of a round."""
    if rank != victim:
        return
    from fdiff.federation.client import Trainer

    train, take = Trainer.train, Trainer.step
    to_take = {"now": 0}

    def counting(self, client, of_round, tick=lambda: None):
        to_take["now"] = to_take["now"] or (step if of_round == round else 0)
        return train(self, client, of_round, tick)

    def stopping(self, *batch):
        if to_take["now"]:
            to_take["now"] -= 1
            if not to_take["now"]:
                os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *batch)

    Trainer.train, Trainer.step = counting, stopping


def hold_in_round(
    round: int, seconds: float, rank: int, victim: int | None = None, hold: Callable[[float], object] = time.sleep
) -> None:
    """A training step of a round takes its time, on all ranks or one; the file `held` says that it has begun."""
    if victim not in (None, rank):
        return
    from fdiff.federation.client import Trainer

    train, step = Trainer.train, Trainer.step
    due = {"now": False}

    def choosing(self, client, of_round, tick=lambda: None):
        due["now"] = of_round == round
        return train(self, client, of_round, tick)

    def holding(self, *batch):
        if due["now"] and not Path("held").exists():
            Path("held").touch()
            hold(seconds)
        return step(self, *batch)

    Trainer.train, Trainer.step = choosing, holding


def fail_to_start(victim: int, rank: int) -> None:
    """This rank's device cannot be set up, for a reason that nobody foresaw."""
    from fdiff.commands import main

    def broken(*_: object) -> None:
        raise RuntimeError("no driver")

    if rank == victim:
        main.set_up = broken


def ask_otherwise(field: str, value: object, victim: int, rank: int) -> None:
    """One rank is told another value of a field."""
    from fdiff.commands import main

    parse = main.parse
    if rank == victim:
        main.parse = lambda words: parse([*words, f"--{field}", str(value)])


def hang_on_disk(failing: int, round: int, rank: int) -> None:
    """The disk does not answer any more; then a client fails."""
    from fdiff.checkpoint import file

    file.Unsynced.write = lambda *_: time.sleep(600)
    fail_client("exception", (failing,), round, rank)


def leave_a_process(rank: int) -> None:
    """Something that this rank started outlives it."""
    subprocess.Popen(["sleep", "60"])


def fail_client(how: str, clients: tuple[int, ...], round: int, rank: int) -> None:
    """In one round the training of some clients fails: an error while reading, no memory, a loss that is not finite."""
    from fdiff.federation.client import Trainer

    train, step = Trainer.train, Trainer.step
    due = {"now": False}

    def choosing(self, client, of_round, tick=lambda: None):
        due["now"] = client.index in clients and of_round == round
        return train(self, client, of_round, tick)

    def failing(self, *batch):
        if due["now"]:
            _fail(how, self)
        return step(self, *batch)

    Trainer.train, Trainer.step = choosing, failing


def _fail(how: str, trainer) -> None:
    if how == "exception":
        raise OSError(5, "Input/output error", "images/0001.png")
    if how == "allocator":
        torch.empty(2**60, dtype=torch.uint8)  # the allocator itself says no
    trainer.buckets.flat.fill_(float("nan"))
    for tensor in trainer.working.values():
        tensor.fill_(float("nan"))


def fail_on_signal(rank: int) -> None:
    """SIGUSR1 makes the next training step on this rank fail."""
    from fdiff.federation.client import Trainer

    step, due = Trainer.step, threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: due.set())

    def failing(self, *batch):
        if due.is_set():
            due.clear()
            _fail(random.choice(FAILURES), self)
        return step(self, *batch)

    Trainer.step = failing

