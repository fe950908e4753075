"""Every line that a README, a template or launch/ tells a user to start: its flags, its ranks, the files it names."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from jobs import ROOT

from fdiff.commands.flags import COMMANDS, parse

ROOMS = ("fdiff", "launch", "slurm", "tests")
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
READMES = [ROOT / "README.md", *sorted(p for room in ROOMS for p in (ROOT / room).rglob("README.md"))]
OTHER = (".md", ".ipynb")
SCRIPTS = [*TEMPLATES, *sorted(p for p in (ROOT / "launch").iterdir() if p.is_file() and p.suffix not in OTHER)]
TEXTS = [*READMES, *SCRIPTS]
PLACEHOLDER = re.compile(r"\[[^]]*\] ?")  # `sbatch [sbatch options] FILE [--] FLAGS`


def lines_of(text: str) -> list[list[str]]:
    """The words of each line to start: in a code block, in backticks, or behind a colon in a comment."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for piece in re.split(r"`|: |\"\"\"", line.removeprefix("exec ")):
            try:
                words = shlex.split(PLACEHOLDER.sub("", piece), comments=True)
            except ValueError:  # an apostrophe: prose
                continue
            of_ranks = words[:1] and Path(words[0]).name in ("torchrun", "mpirun")
            if request_of(words) and ("--preset" in words or of_ranks):
                found.append([word for word in words if word != "$@"])
    return found


def request_of(words: list[str]) -> list[str]:
    """What fdiff is told: COMMAND FLAGS; [] if the line only names a launcher or a flag."""
    for i, word in enumerate(words):
        rest = words[i + 1 :]
        if word.endswith(".sbatch") and rest:
            return ["train", *rest[rest[0] == "--" :]]
        if word.endswith("submit.py"):
            return ["submit", *rest]
        if word == "fdiff" and rest and rest[0] in COMMANDS:
            return rest
    return []


def ranks_of(words: list[str]) -> int:
    """How many ranks a line starts: what it says goes over what its template asks for."""
    asked = argparse.ArgumentParser(allow_abbrev=False)
    asked.add_argument("-n", "--nproc_per_node", type=int)
    asked.add_argument("--nodes", type=int, default=1)
    asked.add_argument("--tasks_per_node", "--ntasks-per-node", type=int, default=1, dest="tasks")
    own = [option for t in TEMPLATES if t.name in shlex.join(words) for option in sbatch_options(t)]
    found, _ = asked.parse_known_args([*own, *words])
    return found.nproc_per_node or found.nodes * found.tasks


def sbatch_options(template: Path) -> list[str]:
    return re.findall(r"^#SBATCH (--\S+)", template.read_text(), re.M)


LINES = [(str(path.relative_to(ROOT)), words) for path in TEXTS for words in lines_of(path.read_text())]


@pytest.mark.parametrize(("where", "words"), LINES, ids=[f"{name}: {shlex.join(words)}" for name, words in LINES])
def test_a_line_is_understood_and_has_no_more_ranks_than_clients(where: str, words: list[str]) -> None:
    if config := parse(request_of(words)).arguments.get("config"):
        assert ranks_of(words) <= config.federation.clients


def test_no_line_is_overlooked() -> None:
    named = {Path(words[0]).name for where, words in LINES if where == "README.md"}
    assert named == {"torchrun", "mpirun", "srun", "sbatch", "fdiff"}
    with_lines = {where for where, _ in LINES}
    starting = {path for path in SCRIPTS if path.name not in ("venv.sh", "plain_fedavg.py")}
    assert with_lines >= {str(path.relative_to(ROOT)) for path in starting}
    assert with_lines >= {"launch/README.md", "slurm/README.md", "fdiff/sweeps/README.md"}
    assert [ranks_of(words) for where, words in LINES if where.endswith(".sbatch")] == [4, 4, 4]


def test_files_that_are_named_exist() -> None:
    folders = "|".join(ROOMS)
    for path in TEXTS:
        text = path.read_text()
        named = re.findall(rf"(?<![\w/.$-])((?:{folders})/[\w./-]*\w|\w+\.sbatch)\b", text)
        for name in named:
            assert (ROOT / name).exists() or (ROOT / "slurm" / name).exists(), f"{path.name} names {name}"


def test_links_lead_somewhere() -> None:
    for path in READMES:
        for target in re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", path.read_text()):
            assert not target or (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_the_first_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
