"""The architecture as a test: who may import whom, and where processes, MPI and the environment may be seen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fdiff"

# A module imports from lower layers only; those of one name share their layer and may import each other.
LAYERS = [
    {"errors", "directio", "__init__"},
    {"config", "seeds", "launcher", "partition", "unet", "noise", "arrayfile", "capture"},
    {"diffusion", "device", "signals", "plan", "schedule", "buckets", "pictures", "scores", "overlay", "submission"},
    {"comm"},
    {"data"},
    {"aggregate", "client", "checkpoint", "extractor"},
    {"hosting", "evaluate", "commit", "forecast", "inventory", "reference"},
    {"soundness", "dropping", "judge", "budget"},
    {"snapshot"},
    {"federator", "assembly"},
    {"federation", "scoring", "export"},
    {"verdict"},
    {"report", "sweeps", "bench"},
    {"commands"},
    {"flags"},
    {"cli"},
    {"__main__"},
]
# What the core may know of the rest, name by name: process, data and diffusion stay apart.
MAY_IMPORT = {
    "aggregate": {"comm", "plan"},
    "arrayfile": {"directio", "errors"},
    "buckets": {"errors"},
    "capture": set(),
    "checkpoint": {"arrayfile", "buckets"},
    "client": {"buckets", "capture", "config", "data", "diffusion", "errors", "plan", "seeds", "unet"},
    "comm": {"config", "errors", "launcher", "schedule"},
    "data": {"config", "device", "errors"},
    "directio": set(),
    "diffusion": {"capture", "config", "noise"},
    "federator": {"checkpoint", "config", "errors", "launcher", "pictures"},
    "partition": {"errors"},
    "plan": {"seeds", "unet"},
    "schedule": set(),
    "unet": set(),
}
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    """The module's name in the table: of a package, the package's."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The absolute names of all that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_from_lower_layers(path):
    name = owner(path)
    assert name in LAYER, f"{name} has no layer: give it one"
    for target in {n.split(".")[1] for n in imported(path) if n.startswith("fdiff.")} & LAYER.keys():
        assert LAYER[target] < LAYER[name] or target == name, f"{name} must not import {target}"
        assert not (name == target == "commands"), "commands do not import each other"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_core_knows_only_what_it_is_made_of(name):
    paths = [path for path in MODULES if owner(path) == name]
    targets = {n.split(".")[1] for path in paths for n in imported(path) if n.startswith("fdiff.")} & LAYER.keys()
    assert targets - {name} <= MAY_IMPORT[name]


@pytest.mark.parametrize("folder", ["launch", "slurm"])
def test_scripts_beside_the_package_only_call_it(folder):
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        assert not any(name.split(".")[0] == "fdiff" for name in imported(path)), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_processes_and_environment_are_seen_in_one_place(path):
    names = imported(path)
    if owner(path) != "comm":
        assert not {n for n in names if n.startswith(("torch.distributed", "mpi4py"))}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if owner(path) != "comm":
        assert "torch.distributed" not in attributes
    if owner(path) != "launcher":
        assert not attributes & {"os.environ", "os.getenv", "os.putenv"}
        assert not names & {"os.environ", "os.getenv"}


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


def test_every_layer_names_modules_that_exist():
    assert set(LAYER) == {owner(path) for path in MODULES}


def test_the_round_loop_knows_no_backend_file_format_or_rank():
    text = (PACKAGE / "federation.py").read_text(encoding="utf-8")
    for word in ("h5py", "torch.distributed", "mpi4py", "gloo", "nccl", "rank == 0", " open("):
        assert word not in text
