"""What every test has: a check that it leaves nothing behind, and the Slurm cluster for those that ask for one.

And what a call of the tests has: the flag --all, and a worker for each group of tests that share something.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from leaks import leaves_nothing_behind  # noqa: F401
from slurm_cluster import slurm_cluster  # noqa: F401

# How fast an example is drawn and tried says how busy the machine is, and nothing about fdiff.
settings.register_profile("fdiff", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fdiff")

# A minute each, and late in the alphabet: started last, they would leave the other workers idle at the end.
EARLY = ("model/test_capture.py", "report/test_report.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked rare, too: before a release")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests that share something stay with one worker; only where pytest-xdist is there and in use."""
    from groups import Scheduler

    return Scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is rare, unless all is asked for; what takes long and comes late starts early."""
    if not config.getoption("--all"):
        rare = [item for item in items if item.get_closest_marker("rare")]
        config.hook.pytest_deselected(items=rare)
        items[:] = [item for item in items if not item.get_closest_marker("rare")]
    items.sort(key=lambda item: not item.path.as_posix().endswith(EARLY))  # all else stays in order
