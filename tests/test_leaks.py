"""That a test which leaves something behind fails, for each kind of thing, and one that does not passes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from jobs import ROOT, Done, clean_env, execute

CONFTEST = """
from pathlib import Path
import leaks
from leaks import leaves_nothing_behind
leaks.GRACE_S = 0.3
leaks.ROOT, leaks.SHARED_MEMORY = Path("checkout"), Path("shared")
"""
LEAKS = {
    "environment variable": "import os; os.environ['LEFT'] = 'behind'",
    "thread": "import threading, time; threading.Thread(target=time.sleep, args=(5,), daemon=True).start()",
    "file in the checkout": "open('checkout/left', 'w').close()",
    "process": "import subprocess; subprocess.Popen(['sleep', '5'])",
    "orphan": "import subprocess; subprocess.run(['sh', '-c', 'setsid sleep 5 &'])",
    "process group": (
        "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"
    ),
    "shared memory": "open('shared/torch_left', 'w').close()",
}
CLEAN = """
import os, subprocess, threading, time
def test_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "and gone")
    (tmp_path / "file").touch()
    subprocess.run(["true"])
    threading.Thread(target=time.sleep, args=(0.1,)).start()  # ends within the time that a test is given
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    """pytest on one test that leaks of each kind, and a clean one."""
    folder: Path = tmp_path_factory.mktemp("leaks")
    for name in ("checkout", "shared"):
        (folder / name).mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    tests = [f"def test_{name.replace(' ', '_')}():\n    {leak}\n" for name, leak in LEAKS.items()]
    (folder / "test_tiny.py").write_text(CLEAN + "\n".join(tests))
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder, "-rA", folder]
    return execute(words, folder, env=clean_env(PYTHONPATH=str(ROOT / "tests" / "helpers")))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_left_behind_fails_the_test(done, name):
    kind = "process" if name == "orphan" else name
    section = done.out.partition(f"ERROR at teardown of test_{name.replace(' ', '_')} ")[2]
    assert re.match(rf"_+\nleft behind:\n{kind}: .*\n_", section.replace("=", "_")), done.out


@pytest.mark.slow
def test_a_test_that_cleans_up_passes(done):
    assert "PASSED test_tiny.py::test_clean" in done.out and "of test_clean" not in done.out
    assert done.status == 1 and f"{len(LEAKS) + 1} passed, {len(LEAKS)} errors in" in done.out
