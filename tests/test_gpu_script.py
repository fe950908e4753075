"""`tests/gpu.sh`: its dry run does all that it can without a GPU, and leaves what a real one would."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from jobs import BIN, ROOT, clean_env

STEPS = ("tests", "step", "profile", "run", "others")
SCRIPT = ROOT / "tests" / "gpu.sh"


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = clean_env(PATH=f"{BIN}:/usr/bin:/bin")
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.rare  # a minute and more; each path that it takes has a test of its own
def test_a_dry_run_does_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script(out, "--dry-run")
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-3000:]
    files = list(out.iterdir())
    assert len(files) <= 8 and all(f.is_file() and f.stat().st_size < 16 << 20 for f in files)
    found = {step: json.loads((out / f"{step}.json").read_text()) for step in STEPS}
    for step in found.values():
        assert step["done"] and step["dry_run"] and step["ran"] and not step["failed"] and not step["not_reached"]
        for why in step["skipped"].values():
            assert why == "needs a GPU"
    assert len(found["tests"]["ran"]) > len(found["tests"]["skipped"]) == 4
    assert done.stdout.splitlines()[: len(STEPS)] == [
        line for step in STEPS for line in done.stdout.splitlines() if line.startswith(f"{step}: ") and "ran" in line
    ]
    assert "| what | measured | beside | ratio |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "steps", "out"], "steps: no such step; there are tests step profile run others"),
        (["--quick", "out"], "--quick: no such flag"),
        (["--only"], "--only wants a value"),
        ([], "no OUT given"),
    ],
)
def test_a_wrong_call_is_refused_in_a_line(arguments: list[str], told: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2 and told in done.stderr
