"""A method, a model and a data set of the user's own, as documented: trained, resumed, exported; and refused."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from forked_jobs import Job
from jobs import ROOT, TINY, arrays, fdiff, largest_difference, on_ranks
from safetensors.numpy import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
GUIDE = (ROOT / "launch" / "own_code.md").read_text()
SMALL = ["--data.limit", 120, "--federation.local_epochs", 1, "--optim.batch_size", 16, "--sample.every", 0]
SMALL += ["--runtime.threads", 1, "--model.dim", 8]


def example(title: str) -> tuple[str, str, list[list[str]]]:
    """The file of a section of the guide, its text, and its commands."""
    section = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", GUIDE, re.M | re.S)[1]
    code, commands = (re.search(rf"```{kind}\n(.*?)```", section, re.S)[1] for kind in ("python", "sh"))
    return code.splitlines()[0].removeprefix("# "), code, [shlex.split(line) for line in commands.splitlines()]


@pytest.mark.parametrize("title", ["A method", "A model", "A data set"])
def test_each_example_of_the_guide_trains_resumes_and_is_exported(tmp_path: Path, title: str) -> None:
    name, code, (train, resume, export) = example(title)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / name).write_text(code)
    assert train[:6] == "torchrun --standalone --nproc_per_node 2 -m fdiff".split()
    for rank in on_ranks(2, *train[6:], *SMALL, cwd=tmp_path):
        rank.check()
    fdiff(*resume[1:], cwd=tmp_path).check()
    fdiff(*export[1:], cwd=tmp_path).check()
    run, named = tmp_path / resume[resume.index("--run.dir") + 1], resume[-2:]
    assert len(load_file(tmp_path / export[3])) > 4 and arrays(run, 2)
    for command in (
        ["sample", run, "--images", 2, "--steps", 2, "--sampler", "ddim", "--out", "two.png"],
        ["verify", run],
    ):
        refused = fdiff(*command, cwd=tmp_path)
        if command[0] == "sample" and title == "A data set":
            continue  # it opens no images
        if title != "A data set":
            assert refused.status == 2 and refused.err.count("\n") == 1 and f"add {' '.join(named)}" in refused.err
        fdiff(*command, *named, cwd=tmp_path).check()
    refused = fdiff("train", "--resume", "--run.dir", run, cwd=tmp_path)
    assert refused.status == 2 and f"only where the command line names it; add {' '.join(named)}" in refused.err
    other = fdiff("export", run, "other.safetensors", named[0], "json:dumps", cwd=tmp_path)
    assert other.status == 2, other.err


def test_the_guides_commands_for_diffusers_and_weights_run_as_written(tmp_path: Path) -> None:
    section = re.search(r"^## diffusers' UNet.*?(?=^## )", GUIDE, re.M | re.S)[0]
    first, *others = [shlex.split(line) for line in re.search(r"```sh\n(.*?)```", section, re.S)[1].splitlines()]
    for rank in on_ranks(2, *first[6:], *SMALL, cwd=tmp_path):
        rank.check()
    for command in others:
        fdiff(*command[1:], *(SMALL if command[1] == "train" else []), cwd=tmp_path).check()
    tuned = arrays(tmp_path / "runs" / "tuned", 1)
    frozen = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert np.array_equal(tuned["global/frozen"][:72], frozen["conv_in.weight"].ravel())
    assert {name for name in tuned if "private/" in name} == {f"client-{c:04d}/private/bottleneck" for c in range(2)}


def test_any_parts_end_alike_on_two_ranks_stopped_and_resumed_on_one(tmp_path: Path) -> None:
    more = [
        "--optim.ema",
        0.9,
        "--federation.keep_optimizer",
        "--federation.fraction",
        0.5,
        "--runtime.reduction",
        "ordered",
    ]
    for method in ("encoder+decoder", "encoder"):
        request = ["train", *TINY, *more, "--method", method, "--run.dir"]
        fdiff(*request, f"one-{method}", cwd=tmp_path).check()
        two = f"two-{method}"
        for rank in on_ranks(2, *request, two, "--federation.rounds", 2, cwd=tmp_path):
            rank.check()
        fdiff(*request, two, "--resume", cwd=tmp_path).check()
        one, two = (arrays(tmp_path / run, 3) for run in (f"one-{method}", two))
        assert largest_difference(one, two) == 0
        assert {name for name in one if "parts/" in name} == {f"global/parts/{part}" for part in method.split("+")}
        private = {part for part in ("encoder", "bottleneck", "decoder") if part not in method.split("+")}
        assert {name.rpartition("/")[2] for name in one if "private/" in name} == private
        own = [one[f"client-{client:04d}/private/bottleneck"] for client in range(4)]
        assert not np.array_equal(own[0], own[1])
    fdiff("evaluate", "one-encoder+decoder", "--images", 8, "--steps", 2, "--metrics", "classes", cwd=tmp_path).check()
    fdiff("report", "one-encoder+decoder", "one-encoder", cwd=tmp_path).check()
    page = (tmp_path / "one-encoder+decoder" / "report.html").read_text()
    assert "encoder+decoder" in page


FROZEN = """
from pathlib import Path
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.lift = nn.Conv2d(channels, 4, 3, padding=1)
        self.lift.requires_grad_(False)
        with torch.no_grad():
            self.lift.weight.fill_(float(Path("weight").read_text()) if Path("weight").exists() else 0)
        self.drop, self.out = nn.Dropout(0.5), nn.Conv2d(4, channels, 3, padding=1)
        self.parts = {"lift": [self.lift], "out": [self.out]}

    def forward(self, x, t, labels=None):
        return self.out(self.drop(self.lift(x)))


def net(shape, model):
    return Net(shape[0])


def unlike(shape, model):
    made = Net(shape[0])
    made.out.weight.data.copy_(torch.from_numpy(np.random.default_rng().normal(size=made.out.weight.shape)))
    return made
"""


def test_a_file_of_an_array_may_not_name_code(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('loaded', 'w').close()\nm = {'decoder': lambda s: s.selected}\n")
    (tmp_path / "one.yaml").write_text("method: evil:m\n")
    local = ["submit", *TINY, "--cluster", "local", "--array", "one.yaml", "--log_dir", "logs"]
    refused = fdiff(*local, cwd=tmp_path)
    assert refused.status == 2 and "'evil:m' is code, which is loaded only where" in refused.err
    whole = fdiff("train", *TINY, "--model.kind", "evil:m", "--model.options", "{}", cwd=tmp_path)
    assert whole.status == 2 and "--model.options: is a group of settings; give each by itself" in whole.err
    assert not (tmp_path / "loaded").exists()


def test_what_is_frozen_is_kept_sent_nowhere_and_needs_no_file_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "frozen.py").write_text(FROZEN)
    (tmp_path / "weight").write_text("0.25")
    request = ["train", *TINY, "--model.kind", "frozen:net", "--runtime.reduction", "ordered", "--run.dir"]
    fdiff(*request, "one", cwd=tmp_path).check()
    for rank in on_ranks(2, *request, "two", "--federation.rounds", 1, cwd=tmp_path):
        rank.check()
    (tmp_path / "weight").unlink()
    fdiff(*request, "two", "--resume", cwd=tmp_path).check()
    one, two = (arrays(tmp_path / run, 3) for run in ("one", "two"))
    assert largest_difference(one, two) == 0  # with dropout, too
    assert (one["global/frozen"][:36] == 0.25).all() and set(one) == {
        "global/frozen",
        "global/parts/out",
        "global/samples",
    }
    fdiff("export", "two", "two.safetensors", "--model.kind", "frozen:net", cwd=tmp_path).check()
    weights = load_file(tmp_path / "two.safetensors")
    assert (weights["lift.weight"] == 0.25).all() and np.array_equal(
        weights["out.weight"].ravel(), one["global/parts/out"][:36]
    )


RANKS = """
import os
from fdiff import everyone
import frozen

RANK = int(os.environ["RANK"])
later = {"encoder": lambda selection: selection.selected[: 3 if selection.round < 5 or RANK else 2]}
fails_later = {"encoder": lambda selection: selection.selected if selection.round < 5 or not RANK else {}[5]}
one_each = {"encoder": lambda selection: [selection.selected[RANK]]}


def frozen_apart(shape, model):
    made = frozen.net(shape, model)
    made.lift.weight.data.add_(RANK)
    return made


def other_layout(shape, model):
    made = frozen.net(shape, model)
    if RANK:
        made.out.bias = None
    return made
"""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--method ranks:one_each", r"the plan's checksum: \w{12} on rank 0, \w{12} on rank 1"),
        (
            "--model.kind ranks:frozen_apart",
            r"the frozen parameters: \w{12} on rank 0, \w{12} on rank 1; give all ranks",
        ),
        ("--model.kind ranks:other_layout", r"the model's parameters: \w{12} on rank 0"),
        (
            "--method ranks:later --federation.rounds 6",
            r"the plan of round 5: rank 1 has another than rank 0",
        ),
        ("--method ranks:fails_later --federation.rounds 6", r"fails for the part encoder in round 5 \(KeyError: 5\)"),
        ("--model.kind frozen:unlike", r"rank 1 has other initial weights than rank 0; draw them from torch's own"),
    ],
)
def test_ranks_that_see_different_code_are_told(tmp_path: Path, flags: str, told: str) -> None:
    (tmp_path / "frozen.py").write_text(FROZEN)
    (tmp_path / "ranks.py").write_text(RANKS)
    job = Job(["train", *TINY, "--run.dir", "run", "--runtime.timeout_s", 20, *flags.split()], 2, tmp_path)
    assert job.wait(60) and job.statuses() == [1 if "the plan of" in told else 2] * 2, job.said()
    assert len(job.errors()) == 1 and re.search(told, job.errors()[0]), job.said()
