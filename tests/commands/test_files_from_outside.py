"""Configurations and exported models as a stranger may have made them: refused in one line, without taking memory."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fdiff import config as cfg
from fdiff import load_model
from fdiff.checkpoint.file import examine
from fdiff.comm import SoloCommunicator
from fdiff.commands import export as export_command
from fdiff.commands import verify
from fdiff.commands.main import main
from fdiff.commands.streams import PrintableFormatter, take_over
from fdiff.config import Config, to_dict
from fdiff.config_file import MAX_BYTES, apply_config_file
from fdiff.errors import LINE, RunError, UserError, one_line
from fdiff.federation import export
from fdiff.federation.voting import Votes, together
from fdiff.model import Buckets, build_model

BOMB = "method:\n" + "\n".join(f" a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9))
YAML = {
    "no such day": ("run: {dir: !!timestamp 2001-99-99}", "month must be in"),
    "no whole number": ("federation: {rounds: !!int abc}", "is not YAML"),
    "no number": ("optim: {lr: !!float x}", "is not YAML"),
    "no binary number": ("federation: {rounds: !!int 0b_}", "is not YAML"),
    "no truth": ("federation: {keep_optimizer: !!bool foo}", "is not YAML"),
    "no time": ("run: {dir: !!timestamp foo}", "is not YAML"),
    "sexagesimal": ("federation: {rounds: 1:30}", "rounds: '1:30' is not valid; it must be of type int"),
    "hexadecimal": ("federation: {rounds: 0x10}", "rounds: '0x10' is not valid"),
    "tagged": ("federation: {rounds: !!int 1:30}", "is not YAML"),
    "a word": ("federation: {keep_optimizer: on}", "keep_optimizer: 'on' is not valid; it must be of type bool"),
    "group twice": ("run: {}\nmethod: udec\nrun: {}", "line 3: 'run' is there twice"),
    "field twice": ("federation:\n  rounds: 3\n  rounds: 4", "line 3: 'rounds' is there twice"),
    "unknown": ("federation: {round: 3}", "federation.round: no such field; did you mean federation.rounds"),
    "not set": ("data: {root: $NOT_SET/x}", "data.root: '.NOT_SET/x': the variable NOT_SET is not set"),
    "vast number": ("federation: {rounds: " + "9" * 5000 + "}", "is not YAML"),
    "deep": ("method: " + "[" * 20_000, "more than 8 levels deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(300)), "more than 8 levels deep"),
    "bomb": (BOMB, "line 3: an alias, \\*a0; write its value"),
    "loop": ("method: &a [*a]", "an alias"),
    "object": ("method: !!python/object/apply:os.system [exit]", "is not YAML"),
    "large": ("# " + "x" * MAX_BYTES, f"more than {MAX_BYTES} bytes"),
    "not text": (b"\xff\xfe\x00", "is not YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_a_configuration_from_outside_is_refused_in_one_line(tmp_path, name):
    text, what = YAML[name]
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=what) as raised:
        apply_config_file(Config(), file)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < LINE and str(file) in str(raised.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "kilobytes"


def test_a_device_is_not_read_to_its_end():
    with pytest.raises(UserError, match="more than"):
        apply_config_file(Config(), Path("/dev/zero"))


def test_numbers_are_plain_decimal(tmp_path):
    (tmp_path / "config.yaml").write_text("federation: {rounds: 012}\noptim: {lr: 1e-4}\ndata: {beta: +.5E+1}")
    config = apply_config_file(Config(), tmp_path / "config.yaml")
    assert (config.federation.rounds, config.optim.lr, config.data.beta) == (12, 1e-4, 5.0)


def test_a_message_keeps_its_two_ends():
    said = str(one_line(UserError("method: " + "x" * 10**6 + " is not valid; choose one")))
    assert len(said) < LINE + 10 and said.startswith("method: x") and "x ... x" in said
    assert isinstance(one_line(ValueError("a\nb")), RunError) and str(one_line(ValueError("a\nb"))) == "ValueError: a b"


DENIED = PermissionError(errno.EACCES, "Permission denied", "run/global.h5")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DENIED, 2, "run/global.h5: Permission denied; give this user the right to it, or name another"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "x: No such file; check the path"),
        (FileExistsError(errno.EEXIST, "File exists", "x"), 2, "x: File exists; name another"),
        (OSError(errno.ENOSPC, "No space left", "x"), 1, "x: No space left; see to its disk, or name another place"),
        (OSError(errno.EIO, "I/O error", "x", None, "y"), 1, "x -> y: I/O error; see to its disk, or name"),
        (OSError("no file"), 1, "OSError: no file"),
    ],
)
def test_an_error_of_the_system_names_its_file(error, status, said):
    assert str(one_line(error)).startswith(said) and one_line(error).status == status


def test_what_cannot_be_read_is_one_line_of_every_command(monkeypatch, capsys):
    def denied(*_: object) -> None:
        raise DENIED

    monkeypatch.setattr(verify, "folders", denied)
    monkeypatch.setattr(export_command, "open_checkpoint", denied)
    monkeypatch.setattr("fdiff.commands.flags.Path.exists", denied)
    resume = ["train", "--resume", "--run.dir", "run"]
    for arguments, status in ((["verify", "run"], 1), (["export", "run", "x.safetensors"], 2), (resume, 2)):
        assert main(arguments) == status
        assert capsys.readouterr().err == f"fdiff: error: {one_line(DENIED)}\n"


def test_a_file_that_may_not_be_read_is_not_a_damaged_one(tmp_path, monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Unable to synchronously open file (unable to open file: errno = 13)")

    (tmp_path / "global.h5").touch()
    monkeypatch.setattr("fdiff.checkpoint.file.h5py.File", denied)
    with pytest.raises(PermissionError) as raised:
        examine(tmp_path / "global.h5")
    assert raised.value.filename == str(tmp_path / "global.h5")


def test_once_training_runs_an_error_of_the_system_is_the_runs():
    votes = Votes(SoloCommunicator())
    with votes.keeping_errors("run folder"):
        raise DENIED
    with pytest.raises(RunError, match="run folder: run/global.h5: Permission denied"):
        votes.vote()
    with pytest.raises(UserError, match="run folder: /dev/null/x: Not a directory; check the path"):
        together(SoloCommunicator(), lambda: open("/dev/null/x"), "run folder")


NAME = "é\x1b]0;owned\x07\u202e\udcff日\n.png"


def test_no_name_acts_on_the_terminal(monkeypatch, capfd):
    shown = r"é\x1b]0;owned\x07\u202e\udcff日"
    assert str(one_line(UserError(f"{NAME}: is bad"))) == shown + " .png: is bad"
    record = logging.makeLogRecord({"msg": "%s\r is bad", "args": (NAME,)})
    assert PrintableFormatter("%(message)s").format(record) == shown + r"\n.png\r is bad"
    terminal = SimpleNamespace(fileno=lambda: 1, encoding="utf-8", errors="strict", line_buffering=True)
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, terminal)
    take_over()
    print(NAME + "\r\t.")
    assert capfd.readouterr().out == shown + "\n.png\r\t.\n"


# --- exported models -----------------------------------------------------------------------------------------------

SMALL = Config(data=cfg.DataConfig(image_side=8), model=cfg.ModelConfig(dim=8, dim_mults=(1, 2), head_dim=8))


def exported(folder: Path, weights: dict | None = None, **metadata: str | None) -> Path:
    """A file as `export.save_model` makes it, but for some metadata; None: without it."""
    weights = dict(build_model(SMALL).named_parameters()) if weights is None else weights
    given = {"format": export.FORMAT, "config": json.dumps(to_dict(SMALL)), **metadata}
    save_file(weights, folder / "model.safetensors", {k: v for k, v in given.items() if v is not None})
    return folder / "model.safetensors"


def test_a_whole_file_is_loaded(tmp_path):
    model, config = load_model(exported(tmp_path))
    assert config == SMALL
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build_model(SMALL).parameters(), strict=True))


@pytest.mark.parametrize(
    "config", [None, "", "{", "[1]", "3", '{"method": "fedavg"}', '{"run": 3}', "[" * 100_000, "9" * 5000]
)
def test_an_export_with_a_bad_configuration_is_refused_in_one_line(tmp_path, config):
    with pytest.raises(UserError, match="configuration is not valid") as raised:
        load_model(exported(tmp_path, config=config))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 2 * LINE


def test_no_memory_is_taken_for_a_model_that_is_not_in_the_file(tmp_path):
    vast = {"dim": 4096, "dim_mults": [64, 64, 64, 64], "heads": 4, "head_dim": 32, "classes": 0}
    config = json.dumps({**to_dict(SMALL), "model": vast})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not those of the model"):
        load_model(exported(tmp_path, config=config))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "kilobytes"


def test_weights_of_other_types_are_refused(tmp_path):
    halves = {n: p.detach().half() for n, p in build_model(SMALL).named_parameters()}
    with pytest.raises(UserError, match="not those of the model"):
        load_model(exported(tmp_path, halves))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = {n: p.detach() / 0 for n, p in build_model(SMALL).named_parameters()}
    with pytest.raises(UserError, match="its weights are not finite .NaN or infinity.; export another checkpoint"):
        load_model(exported(tmp_path, weights))


class Saved:
    """What `export.save_model` needs of a checkpoint."""

    config, round = SMALL, 1

    def fill(self, buckets: Buckets, client: int | None, ema: bool) -> None:
        buckets.flat.zero_()


def test_a_clients_model_is_its_owners_alone(tmp_path):
    before = os.umask(0)
    try:
        export.save_model(tmp_path / "client.safetensors", Saved(), 1, ema=False)
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_beside_the_export_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".model.safetensors").symlink_to(tmp_path / "precious")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "precious")
    export.save_model(tmp_path / "model.safetensors", Saved(), None, ema=False)
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "model.safetensors").is_symlink()
