"""A run's folder as data from anywhere: configuration, setting and logs, each field of the type that readers count on.

What the federator and `fdiff evaluate` have not written so is named with its file, its line and what it should be.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fdiff.config import Config, from_dict
from fdiff.config_file import read_fields
from fdiff.errors import UserError, first_line
from fdiff.federation.logs import LOGS, Row, read_jsonl, read_regular, remedy

LARGEST = 1e100  # of a number: so that sums, and what charts make of them, stay finite
WORD = r"[\w.-]{1,99}"  # what a chart may write and a page may hold as it is
Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # not so of NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) < 40 and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table_of(check: Check, name: str = WORD) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(re.fullmatch(name, k) and check(v) for k, v in value.items())

    return fits


def _rows_of(fields: str) -> Check:
    return _list_of(lambda value: isinstance(value, dict) and not _problem(value, FIELDS[fields]))


def _is_scores(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    numbers = dict(value)
    missing = numbers.pop("missing_classes", [])
    return _table_of(_is_number)(numbers) and _list_of(_is_count)(missing)


KINDS: dict[str, Check] = {
    "a finite number": _is_number,
    "a list of finite numbers": _list_of(_is_number),
    "a table of finite numbers": _table_of(_is_number),
    "a whole number": _is_count,
    "a whole number or null": lambda value: value is None or _is_count(value),
    "a round's number": lambda value: _is_count(value) and value > 0,
    "a list of whole numbers": _list_of(_is_count),
    "a table of whole numbers": _table_of(_is_count),
    "a table of lists of whole numbers": _table_of(_list_of(_is_count)),
    "a time, as 2026-11-28T12:00:00+00:00": _is_time,
    "text": lambda value: isinstance(value, str),
    "text or null": lambda value: value is None or isinstance(value, str),
    "a word": lambda value: isinstance(value, str) and bool(re.fullmatch(WORD, value)),
    "a table of text by client": _table_of(lambda value: isinstance(value, str), "[0-9]{1,9}"),
    "true or false": lambda value: isinstance(value, bool),
    "a table of numbers, with missing_classes a list": _is_scores,
    "a list of ranks, each with host and device": _rows_of("rank"),
    "a list of clients, each with its images": _rows_of("client"),
}

# What is written of each field, by file; one with a question mark may be missing.
FIELDS: dict[str, dict[str, str]] = {
    "rounds": {
        "round": "a round's number",
        "loss": "a finite number",
        "images": "a whole number",
        "images_per_s": "a finite number",
        "seconds": "a table of finite numbers",
        "selected": "a list of whole numbers",
        "dropped?": "a table of text by client",
        "reporters": "a table of lists of whole numbers",
        "communicated_parameters": "a whole number",
        "wire_bytes": "a whole number",
        "bytes_by_purpose?": "a table of finite numbers",
        "began?": "a time, as 2026-11-28T12:00:00+00:00",
        "ranks?": "a whole number",
        "peak_memory?": "a whole number",
    },
    "clients": {
        "round": "a round's number",
        "client": "a whole number",
        "loss": "a finite number",
        "losses": "a list of finite numbers",
        "images": "a whole number",
        "images_per_s": "a finite number",
        "seconds": "a table of finite numbers",
        "parameters_sent": "a whole number",
        "bytes_sent": "a whole number",
    },
    "scores": {
        "round": "a round's number",
        "client": "a whole number or null",
        "selected?": "a whole number or null",
        "ema": "true or false",
        "local": "true or false",
        "n": "a whole number",
        "split": "text",
        "n_real": "a whole number",
        "extractor": "a word",
        "checksum": "a word",
        "resized_from?": "a whole number or null",
        "sampler": "a word",
        "steps": "a whole number",
        "scores": "a table of numbers, with missing_classes a list",
    },
    "setting": {
        **dict.fromkeys(("fdiff?", "python?", "torch?", "system?", "communicator?"), "text"),
        "job?": "text or null",
        "ranks?": "a list of ranks, each with host and device",
        "clients?": "a list of clients, each with its images",
    },
    "rank": {"host": "text", "device": "text"},
    "client": {"images": "a whole number", "labels?": "a table of whole numbers"},
}


def read_config(run_dir: Path) -> Config:
    """The configuration of a run; UserError names the folder that is no run's, or the file that is not valid."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: is not a run folder of fdiff train (it has no file config.yaml); give a run")
    fields = read_fields(file, "run")
    try:
        return from_dict(fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_setting(run_dir: Path) -> dict[str, Any]:
    """What `setting.json` says, all fields that are there of the type they should have; empty if there is no file.

    UserError names the file, and what is wrong with it.
    """
    file = run_dir / "setting.json"
    try:
        setting = json.loads(read_regular(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: is no JSON ({first_line(error)}){remedy(file)}") from None
    problem = _problem(setting, FIELDS["setting"]) if isinstance(setting, dict) else "is no table"
    if problem:
        raise UserError(f"{file}: {problem}{remedy(file)}")
    return setting


def images_of(setting: Mapping[str, Any], clients: int) -> dict[int, int] | None:
    """Training images of each of so many clients, by a run's setting; None where it does not say."""
    images = {client: row["images"] for client, row in enumerate(setting.get("clients", []))}
    return images if len(images) == clients and all(images.values()) else None


def read_log(run_dir: Path, name: str) -> list[Row]:
    """The rows of a log by its name, one of rounds, clients and scores, each as FIELDS says; none if it is not there.

    UserError names the file and the line that is no such row.
    """
    file = run_dir / f"{name}.jsonl"
    rows = read_jsonl(file)
    for number, row in enumerate(rows, 1):
        if problem := _problem(row, FIELDS[name]):
            raise UserError(f"{file}: line {number}: {problem}{remedy(file)}")
    return rows


def find_gaps(run_dir: Path) -> list[str]:
    """A line for each log of rounds that is not whole: a line is no row, or a round is missing or there twice."""
    return [problem for name in LOGS if (problem := log_problem(run_dir, name) or _gap(run_dir, name))]


def log_problem(run_dir: Path, name: str) -> str:
    """What keeps `read_log` from reading it; "" if nothing does."""
    try:
        read_log(run_dir, name)
    except UserError as error:
        return str(error)
    return ""


def _gap(run_dir: Path, name: str) -> str:
    file = run_dir / f"{name}.jsonl"
    keys = [(row["round"], row.get("client")) for row in read_log(run_dir, name)]
    rounds = {number for number, _ in keys}
    if len(set(keys)) < len(keys):
        number = next(key for key, times in Counter(keys).items() if times > 1)[0]
        return f"{file}: has round {number} twice{remedy(file)}"
    if missing := set(range(1, len(rounds) + 1)) - rounds:
        return f"{file}: lacks round {min(missing)}{remedy(file)}"
    return ""


def _problem(row: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """What is wrong with a row; "" if all its known fields are there and of their kind."""
    for field, kind in fields.items():
        name = field.removesuffix("?")
        if name not in row:
            if name == field:
                return f"has no {name}"
        elif not KINDS[kind](row[name]):
            return f"{name} is {_shown(row[name])}, it must be {kind}"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
