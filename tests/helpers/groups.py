"""Which tests pytest-xdist must give to one worker, told from their names."""

from __future__ import annotations

import re

from xdist.scheduler import LoadScopeScheduling

# They share the one Slurm test cluster of a session.
ON_SLURM = re.compile(r"srun|slurm|requeue")
# Each parameter of these is a job of its own, and most of the time the test waits for it.
JOBS = ("launch/test_launchers.py", "faults/test_faults.py")


def group_of(test: str) -> str:
    """What is on Slurm is one group; else a module is one, because its fixtures would be made by each worker."""
    module, _, name = test.partition("::")
    if ON_SLURM.search(test):
        return "slurm"
    return name.partition("[")[2] or module if module.endswith(JOBS) else module


class Scheduler(LoadScopeScheduling):
    """Deals out tests by group; its base class does so by class or module."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
