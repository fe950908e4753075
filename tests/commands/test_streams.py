"""What is printed: every name stays in its line and does nothing, and any encoding can say it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from forked_jobs import clean_env
from hypothesis import given
from hypothesis import strategies as st
from jobs import TINY, Done, execute

from fdiff.commands.flags import COMMANDS
from fdiff.commands.streams import SPELLED, PrintableText
from fdiff.errors import UserError, one_line, printable, shown
from fdiff.sweeps.table import _escape

# Letters of all kinds, and more often those that act: line ends, escapes, marks that turn the text round, halves.
ACTING = "\n\r\v\f\x1b\x07\x00\x85\u2028\u2029\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2069\ufeff\udcff"
TEXT = st.text(st.one_of(st.characters(codec=None, exclude_categories=()), st.sampled_from(ACTING)))
ENCODINGS = st.sampled_from(["ascii", "latin-1", "cp1252", "koi8-r", "utf-8"])


def written(text: str, encoding: str) -> str:
    """What a terminal of that encoding is given."""
    raw = io.BytesIO()
    stream = PrintableText(raw, encoding)
    print(text, end="", file=stream, flush=True)
    return raw.getvalue().decode(encoding)


@given(TEXT, ENCODINGS)
def test_any_text_can_be_said_in_any_encoding_and_acts_in_none(text, encoding):
    said = written(text, encoding)
    assert not set(said) & (set(ACTING) - set("\n\r"))
    assert printable(said, keep="\n\r\t") == said
    plain = "".join(c for c in text if c.isprintable() and c.isascii())
    assert all(c in said for c in plain)
    if encoding == "utf-8":
        assert said == printable(text, keep="\n\r\t")


@given(TEXT)
def test_a_name_is_one_line_and_what_can_be_shown_of_it_stays(text):
    for line in (shown(text), str(one_line(UserError(text)))):
        assert line.isprintable() and len(line.splitlines()) <= 1
    if text.isprintable():
        assert shown(text) == text


@given(st.text(st.characters(codec="utf-8")))
def test_a_cell_of_a_latex_table_has_no_command_of_its_own(text):
    made = _escape(text)
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"$\pm$"):
        made = made.replace(command, "")
    for c in "%_&#${}":
        made = made.replace(rf"\{c}", "")
    assert not set(made) & set("%_&#${}\\~^")


def test_our_own_signs_are_spelled():
    assert written("µ ± 3 × 2²", "ascii") == r"\xb5 +- 3 x 2^2"
    assert all(spelled.isascii() and spelled for spelled in SPELLED.values())
    assert written("é ± 1", "latin-1") == "é ± 1"


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help_can_be_said_in_ascii(command, monkeypatch, capfd):
    """In this process, which has imported all there is; where it would print, something stands in for a terminal."""
    from fdiff.commands.main import main

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", PrintableText(raw, "ascii"))
    try:
        status = main([command, "--help"] if command else ["--help"])
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    assert not status and raw.getvalue().startswith(b"usage: fdiff ") and len(raw.getvalue().splitlines()) > 12


@pytest.mark.slow
@pytest.mark.rare  # what it prints by the same streams as the texts of help
def test_a_terminal_without_our_signs_gets_the_result(tmp_path):
    """The scores of two clients have a mean ± deviation, and their folder a name with a line of its own."""
    words = [*TINY, "--federation.clients", 2, "--federation.rounds", 1, "--method", "udec", "--run.dir", "ü\n\u202eb"]
    ascii_only = clean_env(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    trained = in_ascii(ascii_only, tmp_path, "train", *words)
    assert r"run folder   \xfc\n\u202eb" in trained.out.splitlines()
    scored = in_ascii(ascii_only, tmp_path, "evaluate", "ü\n\u202eb", "--images", 8, "--runtime.threads", 1)
    assert "+- deviation" in scored.out and scored.out.isascii()
    assert scored.out.startswith(r"\xfc\n\u202eb/checkpoints/round-000001: round 1")
    for line in scored.out.splitlines() + trained.out.splitlines():
        assert line.isprintable()


def in_ascii(env: dict[str, str], folder, *words: object) -> Done:
    return execute([sys.executable, "-m", "fdiff", *words], folder, env=env).check()


@pytest.mark.slow
@pytest.mark.rare  # a locale that few have
def test_a_locale_that_cannot_name_a_file_is_one_line(tmp_path):
    """Python has such a name as halves of letters, with which TensorBoard would fail after the first round."""
    env = clean_env(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    words = [sys.executable, "-m", "fdiff", "train", *TINY, "--run.dir", "ü"]
    done = subprocess.run([str(w).encode() for w in words], cwd=tmp_path, env=env, capture_output=True, timeout=240)
    said = done.stderr.decode("ascii").splitlines()
    assert done.returncode == 2 and len(said) == 1 and r"run.dir: '\udcc3\udcbc' is no UTF-8" in said[0]
