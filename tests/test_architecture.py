"""The architecture as a test: imports go down from floor to floor, and three things are seen in one room each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fdiff"

# From the top. A room imports from lower floors only; a module that lies flat in the package is a room of its own.
FLOORS = [
    {"__main__"},
    {"commands", "api"},
    {"sweeps", "report"},
    {"bench", "evaluation"},
    {"federation"},
    {"compression"},
    {"comm", "checkpoint", "data", "plan", "config_file"},
    {"runtime", "model", "presets"},
    {"config"},
    {"config_limits", "config_unet2d"},
    {"config_checks"},
    {"registry"},
    {"errors", "seeds"},
    {"__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room in which a module lies."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The absolute names of all that a module imports when it is imported, or later."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    """The other rooms from which a module imports; its own version is no room."""
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("fdiff.")}
    return rooms - {room_of(path), "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":  # what the package hands on to its users
        return
    upwards = {other for other in rooms_imported(path) if FLOOR[other] <= FLOOR[room]}
    assert not upwards, f"{room} must not import {', '.join(sorted(upwards))}"


def test_the_table_names_the_rooms_that_exist():
    assert set(FLOOR) == {room_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_processes_and_the_environment_are_seen_in_one_room_each(path):
    names = imported(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if room_of(path) != "comm":
        assert not {n for n in names if n.startswith(("torch.distributed", "mpi4py"))}
        assert "torch.distributed" not in attributes
    if room_of(path) != "runtime":
        assert not (attributes | names) & {"os.environ", "os.getenv", "os.putenv"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle_and_no_unsafe_yaml(path):
    assert not {n for n in imported(path) if n.split(".")[0] in ("shelve", "dill", "marshal", "joblib")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.startswith(("pickle.", "_pickle.")), "only the name of its error may be used"
            assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize("folder", ["launch", "slurm"])
def test_scripts_beside_the_package_only_call_it(folder):
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        assert not any(name.split(".")[0] == "fdiff" for name in imported(path)), path


def test_the_round_loop_knows_no_backend_file_format_or_rank():
    text = (PACKAGE / "federation" / "rounds.py").read_text(encoding="utf-8")
    for word in ("h5py", "torch.distributed", "mpi4py", "gloo", "nccl", "rank == 0", " open("):
        assert word not in text


if __name__ == "__main__":  # python tests/test_architecture.py: who imports whom
    arrows = sorted({(room_of(path), other) for path in MODULES for other in rooms_imported(path)})
    for room, other in arrows:
        print(f"{room:12} -> {other}")
    print(f"{len(arrows)} arrows between {len(FLOOR)} rooms on {len(FLOORS)} floors")
