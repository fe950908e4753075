"""fdiff in Python: a configuration, a training, and the run that it leaves. What `import fdiff` hands on.

config = fdiff.load_config("mini", **{"federation.rounds": 3})
run = fdiff.train(config, ranks=2)
images = run.sample(16)
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdiff import federation, registry
from fdiff.checkpoint import generations
from fdiff.comm import SoloCommunicator, connect
from fdiff.config import Config, RuntimeConfig, flat, from_dict, to_dict
from fdiff.config_file import as_yaml, lay_over
from fdiff.errors import RunError, UserError, first_line
from fdiff.federation import Saved, Trainer, sampling
from fdiff.presets import preset as named
from fdiff.runtime import Stop, die_with_parent, heeding_signals, launcher, set_up

ERROR = "fdiff: error: "  # how the command line begins its last line
STATUS = re.compile(r"exitcode\s*:\s*(-?\d+)")  # of a rank, as torchrun tells it


def load_config(preset: str | None = None, **fields: Any) -> Config:
    """The configuration of a preset, or the defaults, with other fields: `load_config("mini", **{"optim.lr": 1e-3})`.

    UserError names the field that is unknown or not valid. Code, MODULE:NAME, may be loaded once it is named here.
    """
    base = to_dict(named(preset) if preset is not None else Config())
    lay_over(base, _nested(fields))
    config = from_dict(base)
    _allow(flat(_nested(fields)))
    return config


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"data": {"beta": 0.5}} of {"data.beta": 0.5}."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise UserError(f"{name}: {name.removesuffix(f'.{last}')} has no fields; give each field once")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        inner[last] = _nested(value) if isinstance(value, Mapping) else value
    return nested


def _allow(fields: Mapping[str, Any]) -> None:
    """Let the code be loaded that the caller has named."""
    for field, value in fields.items():
        if field in registry.FIELDS and isinstance(value, str) and registry.is_reference(value):
            registry.allow(field, value)


def open_run(path: str | os.PathLike[str], **code: str) -> Run:
    """The run in a folder, also while it trains.

    A run made with code, MODULE:NAME, is opened where that is named again: `open_run(path, method="my_method:mine")`,
    `open_run(path, **{"model.kind": "my_model:net"})`. UserError if the folder holds no run.
    """
    if unknown := set(code) - set(registry.FIELDS):
        raise UserError(f"{min(unknown)}: is not code of a run; name {', '.join(registry.FIELDS)}")
    _allow(code)
    return Run(Path(path))


class Run:
    """A run's folder: `path`, and `config`, its configuration. The rest is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: holds no run; give the folder of one, which has a config.yaml")
        self.path = path
        self.config: Config = federation.read_config(path)

    def __repr__(self) -> str:
        return f"<fdiff run {self.path}: {self.config.method}, {len(self.rounds)} rounds>"

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A row for each round: loss, images, seconds, bytes; `pandas.DataFrame(run.rounds)` makes a table of it."""
        return federation.read_log(self.path, "rounds")

    @property
    def clients(self) -> list[dict[str, Any]]:
        """A row for each client in each round: its losses, images and seconds, and the bytes that it sent."""
        return federation.read_log(self.path, "clients")

    @property
    def scores(self) -> list[dict[str, Any]]:
        """A row for each model that `fdiff evaluate` has scored, with all that the score depends on."""
        return federation.read_log(self.path, "scores")

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The folder of each checkpoint that the run has kept, by its round."""
        return {generation.round: generation.path for generation in generations(self.path)}

    def model(
        self,
        client: int | None = None,
        ema: bool | None = None,
        *,
        round: int | None = None,
        device: str | torch.device = "cpu",
    ) -> nn.Module:
        """The model as an nn.Module in evaluation mode: `model(x, t, labels=None)` predicts the noise.

        Whose: by default client 0's where clients keep private parts, else the global one. `ema`: the moving average,
        by default if the run has it. `round`: by default the newest checkpoint's. UserError if there is no such model.
        """
        saved, client, ema = self._choose(client, ema, round)
        return federation.model_of(saved, client, ema).eval().to(_device(device))

    def sample(
        self,
        n: int,
        *,
        classes: Sequence[int] | None = None,
        seed: int | None = None,
        first: int = 0,
        client: int | None = None,
        ema: bool | None = None,
        round: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Images of a model, chosen as in `model`: float32 (n, C, H, W) in [0, 1], on the CPU.

        They are those of `fdiff sample`, drawn as the run says. `classes` are shown in turn, by default all; image i
        starts from its own noise of `seed`, by default the run's, and `first` is the number of the first one.
        """
        saved, client, ema = self._choose(client, ema, round)
        config = replace(saved.config, runtime=RuntimeConfig())  # as the command has it
        n, first, seed = _whole("n", n), _whole("first", first), None if seed is None else _whole("seed", seed)
        sampling.check_numbers(n, first, seed)
        if classes is not None:
            given = classes if isinstance(classes, Iterable) else [classes]
            classes = [_whole("classes", number) for number in given]
            sampling.check_classes(classes, config.model.classes, classes)
        trainer = Trainer(config, _device(device))
        saved.fill(trainer.buckets, client, ema)
        seeded = config if seed is None else replace(config, run=replace(config.run, seed=seed))
        drawn = sampling.draw_all(SoloCommunicator(), trainer, seeded, n, client, saved.round, first, classes)
        low, high = config.data.range or (0, 255)
        return ((drawn.float() - low) / (high - low)).clamp(0, 1)

    def _choose(self, client: int | None, ema: bool | None, round: int | None) -> tuple[Saved, int | None, bool]:
        """The checkpoint, the client and whether its moving average is meant."""
        kept = self.checkpoints
        client = None if client is None else _whole("client", client)
        if round is not None and _whole("round", round) not in kept:
            has = f"it has {', '.join(map(str, kept))}" if kept else "it has none yet"
            raise UserError(f"round: {round} has no checkpoint in {self.path}; {has}")
        saved = federation.open_checkpoint(self.path if round is None else kept[round])
        return saved, *federation.choose_model(saved, client, ema)


def _whole(name: str, value: Any) -> int:
    """The number. UserError if it is no whole one."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{name}: {value!r} is not valid; it must be a whole number")


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: {device!r} is not valid ({first_line(error)}); use cpu or cuda:0") from None


def train(config: Config, *, ranks: int = 1, resume: bool = False) -> Run:
    """Train a federation in this process, or in `ranks` processes on this machine, and open its run.

    The ranks are started as `torchrun` would; what they print is printed here. With `resume` it goes on from the
    newest checkpoint of the run folder. UserError and RunError have the line that the command would end with.
    """
    if not isinstance(config, Config):
        raise UserError(f"config: a {type(config).__name__} is not valid; make one by fdiff.load_config")
    _check_is_alone(ranks)
    if ranks == 1:
        _train_here(config, resume)
    else:
        _train_in(ranks, config, resume)
    return Run(config.run_dir)


def _check_is_alone(ranks: int) -> None:
    launch = launcher.detect()
    if launch.size > 1:
        raise UserError(
            f"fdiff.train: {launch.launcher} started {launch.size} ranks of this program, and each would train; start "
            f"it alone, with ranks={launch.size}, or use the command: fdiff train"
        )
    if type(ranks) is not int or not 1 <= ranks <= 1024:
        raise UserError(f"ranks: {ranks!r} is not valid; it must be a whole number from 1 to 1024")


def _train_here(config: Config, resume: bool) -> None:
    launch = launcher.detect()
    device = set_up(config.runtime, launch)
    comm = connect(config.runtime, launch, config.run_dir)
    in_main = threading.current_thread() is threading.main_thread()
    with heeding_signals(launcher.started_by()) if in_main else contextlib.nullcontext(Stop()) as stop:
        comm.open(device, config.runtime.share_gpu)
        federation.run(config, comm, device, resume, stop)
    comm.close()


def _train_in(ranks: int, config: Config, resume: bool) -> None:
    code = []
    for field in registry.FIELDS:
        if registry.is_registered(field, name := flat(to_dict(config))[field]):
            raise UserError(f"{field}: {name!r} is known to this process alone; name it as MODULE:NAME, for the ranks")
        if registry.is_reference(name):
            registry.find(field, name)  # as one rank would: refused unless the caller has named it
            code.append(f"--{field}={name}")
    flags = [*(["--resume"] if resume else []), *(["--data.changed=true"] if config.data.changed else [])]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(as_yaml(config), encoding="utf-8")
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", "fdiff", "train"]
        _carry_out([sys.executable, *start, "--config", str(file), *code, *flags])


def _carry_out(words: Sequence[str]) -> None:
    """Run a command of fdiff's on ranks to its end, and print what it prints; its line of an error is raised."""
    me = os.getpid()
    reason, statuses = "", set[str]()
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: die_with_parent(me),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                reason = reason or (line.removeprefix(ERROR).strip() if line.startswith(ERROR) else "")
                statuses |= set(STATUS.findall(line))
                if not reason:  # what follows is torchrun's traceback
                    print(line, end="", flush=True)
        except BaseException:  # the ranks finish what they keep of a stopped run, as after Ctrl-C in a terminal
            process.send_signal(signal.SIGTERM)
            for line in process.stdout:
                print(line, end="", flush=True)
            process.wait()
            raise
    if process.returncode:
        kind = UserError if statuses == {"2"} else RunError
        raise kind(reason or f"the ranks ended with status {process.returncode}; what they printed says why")
