"""The wheel, as somebody installs it who has no checkout: all files are in it, all modules import, and it trains."""

from __future__ import annotations

import ast
import re
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from forked_jobs import clean_env
from jobs import Done, execute, rows

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import fdiff
assert pathlib.Path(fdiff.__file__).is_relative_to(sys.prefix), fdiff.__file__
names = [m.name for m in pkgutil.walk_packages(fdiff.__path__, "fdiff.") if m.name != "fdiff.__main__"]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
METADATA = """
from importlib.metadata import metadata
print("\\n".join(sorted(metadata("fdiff").get_all("Provides-Extra"))))
"""


def extras() -> list[str]:
    """The extras of setup.py, by name."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
            return sorted(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no EXTRAS")


def test_every_extra_is_explained():
    table = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \| ", table.partition("## Extras")[2].partition("\n## ")[0], re.MULTILINE)
    assert sorted(explained) == extras()


def build(folder: Path) -> Path:
    """A wheel of what git tracks or would track, built beside the checkout, which stays as it is."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "fdiff", *BUILT_FROM]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, "."]
    execute(pip, folder / "source", env=clean_env()).check()
    (wheel,) = folder.glob("*.whl")
    return wheel


BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def environment(folder: Path, wheel: Path) -> Path:
    """The `bin` of a clean environment with the wheel and nothing else, and the packages that it needs from here.

    Those come last on the path, and only when the wheel is installed: else pip would find another fdiff among them.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    execute([*pip, wheel], folder, env=clean_env()).check()
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "of-the-tests.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    return folder / "bin"


@pytest.mark.rare  # minutes; the checkout is tested by all else, and what is in the wheel changes with setup.py alone
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_without_the_checkout(tmp_path):
    wheel = build(tmp_path)
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
    tracked = subprocess.run(["git", "ls-files", "fdiff"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needed = {name for name in tracked.splitlines() if (ROOT / name).exists() and not name.endswith("README.md")}
    assert needed - inside == set(), "left out of the wheel"

    bin_folder, away = environment(tmp_path / "env", wheel), tmp_path / "away"
    away.mkdir()
    env = {name: value for name, value in clean_env().items() if name != "PYTHONPATH"}

    def run(*words: object) -> Done:
        return execute(words, away, timeout_s=600, env=env).check()

    modules = {name for name in needed if name.endswith(".py") and not name.endswith("__main__.py")}
    assert int(run(bin_folder / "python", "-c", IMPORT_ALL).out) == len(modules) - 1  # fdiff itself
    assert run(bin_folder / "python", "-c", METADATA).out.split() == extras()
    run(bin_folder / "fdiff", "train", "--preset", "mini", "--federation.rounds", "1", "--run.dir", "run")
    assert [row["round"] for row in rows(away / "run")] == [1]
    run(bin_folder / "fdiff", "evaluate", "run", "--images", "20")
    run(bin_folder / "fdiff", "report", "run")
    assert "<title>fdiff: run</title>" in (away / "run" / "report.html").read_text(encoding="utf-8")
