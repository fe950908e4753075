"""The first command of the README, as a newcomer types it, on an installation that is there already."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import ROOT, clean_env, execute, rows
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="needs the checkout's .venv: bash tests/run.sh makes it")
def test_the_quickstart_trains_and_says_where_everything_is(tmp_path):
    short = ["--federation.rounds", 2, "--data.limit", 512, "--run.dir", tmp_path / "run"]
    done = execute(["bash", ROOT / "launch" / "quickstart.sh", *short], tmp_path, env=clean_env()).check()
    assert f"run folder   {tmp_path / 'run'}" in done.out
    grid = tmp_path / "run" / "samples" / "round-000002.png"
    assert f"sample grid  {grid}" in done.out
    with Image.open(grid) as picture:  # a row of 16 images of each of the two clients
        assert picture.width > 16 * 16 and picture.height > 2 * 16
    table = [line.split() for line in done.out.splitlines() if line.startswith(("full ", "usplit", "ulatdec", "udec"))]
    assert [row[0] for row in table] == ["full", "usplit", "ulatdec", "udec"]
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 2 and losses[1] < losses[0]
