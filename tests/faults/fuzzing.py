"""Configurations and checkpoints as a fuzzer makes them: refused in one line, or harmless."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from faults import forging
from faults.damage import MORE, a_run, loads_otherwise
from faults.ledger import Row
from faults.runs import train
from fdiff import checkpoint
from fdiff import config as cfg
from fdiff.checkpoint.file import read_file
from fdiff.comm import SoloCommunicator
from fdiff.commands.flags import parse
from fdiff.errors import LINE, UserError, one_line
from fdiff.federation import snapshot
from fdiff.federation.assemble import set_up_rank
from fdiff.federation.saved import open_checkpoint
from fdiff.federation.validate import find_problems

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3)
)
FIELDS = ["method", *(f"{g}.{f}" for g, c in cfg.GROUPS.items() for f in c.__dataclass_fields__), "more", "run.more"]

TAGS = ("", "!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!!python/name:os.system", "!x")
WORDS = ("2001-99-99", "abc", "0b_", "0x", "-", "1_", ".", "1e999", ".nan", "12:61:61", "{a: b}", "[[a, b]]", "*a")
BOMB = "\n" + "\n".join(f" a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9))


def configurations(row: Row, cases: range, folder: Path) -> None:
    """Configuration files with fields of any type and value, or that are not YAML: refused in one line, or valid."""
    file = folder / "fuzzed.yaml"

    def one(text: bytes) -> None:
        file.write_bytes(text)
        _one(row, text, lambda: parse(["plan", "--config", str(file)]))

    fields = st.dictionaries(st.sampled_from(FIELDS), SCALARS, min_size=1, max_size=4).map(_nested_yaml)
    tagged = st.tuples(st.sampled_from(TAGS), st.sampled_from(WORDS)).map(" ".join)
    deep = st.tuples(st.sampled_from(["[", "{a: ", "- "]), st.integers(1, 20_000)).map(lambda x: x[0] * x[1])
    long = st.integers(4000, 100_000).map(lambda n: "9" * n)
    value = st.one_of(tagged, tagged, deep, long, st.just(BOMB))
    odd = st.tuples(st.sampled_from(FIELDS), value).map(lambda x: f"{x[0].replace('.', ': {')}: {x[1]}".encode())
    _fuzz(cases, st.one_of(fields, odd, odd, st.binary(max_size=60)), one)


def _nested_yaml(flat: dict) -> bytes:
    nested: dict = {}
    for name, value in flat.items():
        group, _, leaf = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[leaf] = value
    return yaml.safe_dump(nested).encode()


def checkpoints(row: Row, cases: range, folder: Path) -> None:
    """Checkpoint files with pieces overwritten, removed and repeated: refused, or as they were written."""
    file = checkpoint.generations(a_run(folder))[-1].path / checkpoint.GLOBAL
    whole, before, mangled = file.read_bytes(), read_file(file), folder / "mangled.h5"

    def one(edits: list[tuple[int, int, bytes]]) -> None:
        data = bytearray(whole)
        for start, length, junk in edits:
            data[start : start + length] = junk
        mangled.write_bytes(data)
        _one(row, edits, lambda: read_file(mangled), lambda: loads_otherwise(mangled, before))

    edit = st.tuples(st.integers(0, len(whole)), st.integers(0, 64), st.binary(max_size=64))
    _fuzz(cases, st.lists(edit, min_size=1), one)


def headers(row: Row, cases: range, folder: Path) -> None:
    """Headers that say anything, under checksums that are right: refused, or a federation goes back to such a state."""
    run = a_run(folder)
    sound, path = checkpoint.generations(run)[-1].path, folder / "round-000002"
    members = set_up_rank(_configuration(), SoloCommunicator(), torch.device("cpu"))
    before = read_file(sound / checkpoint.GLOBAL)[1]

    def one(edits: list[tuple[int, Any]]) -> None:
        header = copy.deepcopy(before)
        for where, value in edits:
            _set(header, where, value)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sound, path)
        forging.replace(path / checkpoint.GLOBAL, "header", forging.as_array(header), manifest=True)
        _one(row, edits, lambda: _use(path, members))

    tables = st.dictionaries(st.text(max_size=3), SCALARS, max_size=3)
    value = st.one_of(SCALARS, tables, st.lists(tables, max_size=3))
    _fuzz(cases, st.lists(st.tuples(st.integers(0, 10_000), value), min_size=1, max_size=3), one)


def _configuration() -> cfg.Config:
    return parse([str(word) for word in train("run", "udec", 3, *MORE)]).arguments["config"]


def _set(header: dict, where: int, value: Any) -> None:
    """Replace a value of a nested header, the `where`-th place of all."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(header)
    node, key = places[where % len(places)]
    node[key] = value


def _use(path: Path, members: Any) -> None:
    if found := find_problems(path):
        raise UserError(found[0])
    open_checkpoint(path).parameters(0, ema=True)
    snapshot.restore(path, members.host, members.images)


def _one(row: Row, what: object, use: Callable[[], object], silent: Callable[[], bool] = lambda: False) -> None:
    """Enter one case: it must be usable, or be refused in one line that is not too long."""
    try:
        use()
        good = True
    except UserError as error:
        good = "\n" not in str(error) and len(str(one_line(error))) < 2 * LINE
    except (Exception, SystemExit) as error:
        good = False
        row.notes.append(f"{str(what)[:300]}: {type(error).__name__}: {str(error)[:300]}")
    row.saw(good, silent=silent())


def _fuzz(cases: range, values: st.SearchStrategy, test: Callable[[Any], None]) -> None:
    quiet = settings(
        max_examples=len(cases),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seeded(cases.start)(quiet(given(values)(test)))()
