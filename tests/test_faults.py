"""The short fault suite: nothing is lost, nothing hangs, nothing damaged is loaded. See faults/__main__.py."""

from __future__ import annotations

import pytest
from faults.suite import FAULTS, run

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name):
    fault = FAULTS[name]
    if reason := fault.needs():
        pytest.skip(reason)
    row, _ = run(name, fault.short)
    assert row.passed, (row.cells(), row.notes)
