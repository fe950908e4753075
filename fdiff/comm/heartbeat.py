"""Signs of life through the store: each rank beats in a thread of its own, and who waits looks at the others' beats.

A rank that trains for long is then told from one that is gone, however long the time-out is. Of a rank on the same node
the kernel knows at once whether its process is there.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

log = logging.getLogger(__name__)

BEAT_S = 5.0
# So long may a library keep every thread of a rank from running, e.g. to write a large dataset to a slow disk. Counted
# in looks and not in seconds, so that nobody is taken for dead because the machine was suspended.
SILENT_LOOKS = 12


class Heartbeat:
    """This rank's beat, from now until `stop`. The store's connection must not be used for calls that wait."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[bytes, int]] = {}  # a rank's last beat, and how many looks found no newer one
        self._here = _this_kernel()
        self._neighbours: dict[int, int] = {}  # process ids of ranks on this node; 0 for those elsewhere
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="fdiff-heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        for count in itertools.count():
            try:
                if count == 0:
                    self._store.set(f"process/{self._rank}", json.dumps([self._here, os.getpid()]))
                self._store.set(f"beat/{self._rank}", str(count))
            except dist.DistError:  # the store is gone, which an exchange will tell
                return
            except Exception:  # such as a lack of memory: no reason to be taken for dead
                log.debug("a beat failed", exc_info=True)
            if self._stopped.wait(BEAT_S):
                return

    def gone(self, store: dist.Store, ranks: Sequence[int]) -> list[int]:
        """Those of the ranks whose process was on this node and is no more."""
        for rank in set(ranks) - self._neighbours.keys():
            if store.check([f"process/{rank}"]):  # else it is still on its way here
                kernel, process = json.loads(store.get(f"process/{rank}"))
                self._neighbours[rank] = process if kernel == self._here else 0
        return [r for r in ranks if (process := self._neighbours.get(r)) and not _lives(process)]

    def silent(self, store: dist.Store, ranks: Sequence[int]) -> list[int]:
        """Those of the ranks that beat once and have stopped; looks at most every BEAT_S, else finds nobody."""
        if time.monotonic() - self._looked < BEAT_S:
            return []
        self._looked = time.monotonic()
        for rank in ranks:
            if store.check([f"beat/{rank}"]):  # else it is still on its way here
                beat = store.get(f"beat/{rank}")
                before, looks = self._seen.get(rank, (b"", 0))
                self._seen[rank] = (beat, looks + 1 if beat == before else 0)
        return [r for r in ranks if r in self._seen and self._seen[r][1] >= SILENT_LOOKS]

    def stop(self) -> None:
        """The last call; does not wait for a store that does not answer."""
        self._stopped.set()
        self._thread.join(timeout=1.0)


def _this_kernel() -> str:
    """What two processes have in common that can see each other's process ids."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _lives(process: int) -> bool:
    """Whether it is there, and not a zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
