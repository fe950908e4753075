"""Code from outside: loaded only where somebody names it, and refused in one line where it cannot be."""

from __future__ import annotations

import sys

import pytest

from fdiff import registry
from fdiff.errors import UserError


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """A folder to work in, nothing registered, and no module left behind."""
    for name in ("_registered", "_allowed", "_expected"):
        monkeypatch.setattr(registry, name, {field: type(v)() for field, v in getattr(registry, name).items()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(text: str, name: str = "somebodys") -> None:
    with open(f"{name}.py", "w") as file:
        file.write(text)


def test_a_reference_is_loaded_from_the_current_folder_once_it_is_allowed():
    write("ran = True\ntable = {'decoder': len}\n")
    with pytest.raises(UserError, match="'somebodys:table' is code, .*; add --method somebodys:table"):
        registry.find("method", "somebodys:table")
    registry.allow("model.kind", "somebodys:table")  # for another field
    with pytest.raises(UserError, match="is code"):
        registry.find("method", "somebodys:table")
    assert "somebodys" not in sys.modules
    registry.allow("method", "somebodys:table")
    assert registry.find("method", "somebodys:table") == {"decoder": len}


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("", "nowhere:table", r"cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\); the module is"),
        ("", "somebodys:table", "cannot be used .*no attribute 'table'"),
        ("import nothing_at_all", "somebodys:table", "ModuleNotFoundError: No module named 'nothing_at_all'"),
        ("1 +", "somebodys:table", "SyntaxError"),
        ("raise SystemExit('bye')", "somebodys:table", "SystemExit: bye"),
        ("raise RuntimeError('one\\ntwo')", "somebodys:table", "RuntimeError: one"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(text, name, told):
    write(text)
    registry.allow("method", name)
    with pytest.raises(UserError, match=told) as refused:
        registry.find("method", name)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("method: ")


@pytest.mark.parametrize("name", ["a:b:c", "os", ":x", "x:", "a b:c", "../x:y", "a.:b", "1a:b", "a:b()"])
def test_nothing_else_is_a_reference(name):
    assert not registry.is_reference(name)
    with pytest.raises(UserError):
        registry.find("method", name)


def test_what_a_package_installs_goes_by_its_name_and_is_not_loaded_for_being_listed(tmp_path, monkeypatch):
    write("table = {'decoder': len}\nopened = 1\n", "installed")
    info = tmp_path / "a_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fdiff.methods]\npairs = installed:table\n[fdiff.models]\nnet = installed:table\n"
        "[fdiff.datasets]\nscans = installed:no\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for field, name in (("method", "pairs"), ("model.kind", "net"), ("data.dataset", "scans")):
        assert name in registry.names(field)
        registry.check_name(field, name)
    assert "installed" not in sys.modules
    assert registry.find("method", "pairs") == {"decoder": len}
    with pytest.raises(UserError, match="data.dataset: 'installed:no' cannot be used"):
        registry.find("data.dataset", "scans")
    with pytest.raises(UserError, match="'other' is not valid; choose one of full, usplit, ulatdec, udec, pairs, or"):
        registry.check_name("method", "other")
