"""A run's logs: JSON lines, appended row by row. A line that was cut short never spoils those after it.

A checkpoint holds the rows up to its round (see `snapshot`), so that a run that goes on from it has whole logs again.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fdiff import checkpoint
from fdiff.errors import UserError

LOGS = ("rounds", "clients")  # a line per round, and a line per round and client
MAX_LOG_BYTES = 2**34  # some fifty million rows, more than fit in most hosts' memory
MAX_BYTES = 2**28  # of another file of a run that is read whole
Row = dict[str, Any]


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a log; none if it does not exist. A last line that was cut short is left out.

    UserError names a line that is no row, and what makes the log whole again.
    """
    rows, problem = _parse(path)
    if problem:
        raise UserError(problem)
    return rows


def _parse(path: Path) -> tuple[list[Row], str]:
    """The rows up to the first line that is none, and what is wrong with that one; "" if all is well."""
    try:
        *lines, rest = read_regular(path, MAX_LOG_BYTES).split(b"\n")
    except FileNotFoundError:
        return [], ""
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            return rows, f"{path}: line {number} is no row of a log{remedy(path)}"
        rows.append(row)
    last = _row(rest)
    return [*rows, last] if last is not None else rows, ""


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("round")) is int else None


def remedy(path: Path) -> str:
    """What to do about a file of a run that is not as it should be, to end a message with."""
    if path.stem in LOGS:
        return f"; fdiff train --resume --run.dir {path.parent} makes it whole again"
    return "; remove that line" if path.suffix == ".jsonl" else "; remove that file"


def read_regular(path: Path, most_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file; FileNotFoundError if there is none, UserError if it is of another kind, or larger."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path}: is not a regular file; remove it")
        if status.st_size > most_bytes:
            raise UserError(f"{path}: has {status.st_size} bytes, and at most {most_bytes} are read; remove it")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); put it right or remove it") from None


def append_jsonl(path: Path, rows: Iterable[Row], sync: bool = True) -> None:
    """Append one line a row; with `sync` they are on the disk on return. OSError if the file is a link elsewhere.

    A last line that a kill cut short is completed if only its end is missing, else dropped.
    """
    with _naming(path), open(path, "r+b", buffering=0, opener=_open_log) as file:
        text = _mend(file).encode() + "".join(json.dumps(row) + "\n" for row in rows).encode()
        while text:
            text = text[file.write(text) :]
        if sync:
            os.fsync(file.fileno())


def _open_log(path: str, flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an OSError name the file, which one of a write does not do by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _mend(file: Any) -> str:
    """Cut off an unfinished last line; what is to be written first to finish one that lacks nothing but its end."""
    size = file.seek(0, os.SEEK_END)
    start, rest = size, b""
    while start and b"\n" not in rest:
        start = max(0, start - 2**16)
        file.seek(start)
        rest = file.read(size - start)
    rest = rest[rest.rfind(b"\n") + 1 :]
    if not rest:
        return ""
    if _row(rest) is not None:
        return "\n"
    file.truncate(size - len(rest))
    return ""


def sync_log(path: Path) -> None:
    """Have what was appended on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore_logs(run_dir: Path, last_round: int, saved: Mapping[str, Sequence[Row]] | None) -> list[str]:
    """Have the logs hold the rounds up to the last one and no other; the names of those that had to be made whole.

    `saved` has the rows that the checkpoint of that round holds, None if it is of a version that held none: then what
    is sound stays.
    """
    mended = []
    for name in (*LOGS, "scores"):
        path = run_dir / f"{name}.jsonl"
        found, problem = _parse(path)
        kept = [row for row in found if row["round"] <= last_round]
        rows = list(saved[name]) if saved is not None and name in saved else kept
        if problem or rows != kept:
            mended.append(path.name)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return mended


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text in one step; on return it is on the disk. A link is replaced, not followed."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with _naming(path), open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    checkpoint.sync_folder(path.parent)
