"""Step 1: the tests marked `gpu`, in this process, each noted as soon as it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.record import Record

if TYPE_CHECKING:
    from tests.gpu.__main__ import Setting


LAST_S = 5.0  # no test begins with less


class Noting:
    """Notes how each test ended, and what it measured."""

    def __init__(self, record: Record) -> None:
        self._record, self._measured = record, {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._record.left_s < LAST_S:
            self._record.not_reached[item.name] = ""
            pytest.skip("no time left")
        self._record.begin(item.name)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self._record.failed[name] = str(report.longrepr).strip().splitlines()[-1][:300]
            print(report.longreprtext, flush=True)
        elif report.skipped:
            if name not in self._record.not_reached:
                self._record.skip(name, report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call":
            self._measured[name] = {"seconds": round(report.duration, 1), **dict(report.user_properties)}
            self._record.add(name, measured=self._measured)


def run(record: Record, setting: Setting) -> None:
    """All tests of this folder; on the CPU, in a dry run, those that need no GPU."""
    folder = Path(__file__).parent
    flags = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", f"--on={setting.device.type}"]
    status = pytest.main([str(folder), *flags], plugins=[Noting(record)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record.failed["pytest"] = f"ended with {status}"
