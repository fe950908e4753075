"""Checkpoints as files: one folder a round, HDF5 inside, visible only when complete.

Open `folder.py` first (names, and the rename that makes a round visible), then `file.py` (one HDF5 file with
checksums) and `commit.py` (writing while training goes on). Knows no model and sends no message.
"""

from __future__ import annotations

from fdiff.checkpoint.commit import VISIBLE_S, Committer, Contents
from fdiff.checkpoint.file import Damaged, Examined, checksum, examine, read_file, write_file
from fdiff.checkpoint.folder import (
    GLOBAL,
    Generation,
    clean,
    client_file,
    generation_name,
    generations,
    hold,
    inspect,
    layout_table,
    make_visible,
    partial_folder,
    prune,
    read_clients,
    read_generation,
    root,
    round_of,
    sync_folder,
    temporary_folder,
    verify,
)
