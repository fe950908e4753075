"""The configuration: presets that say what the paper says, and flags over file over preset."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from fdiff.commands.flags import COMMANDS, parse
from fdiff.config import GROUPS, Config, RunConfig, from_dict, to_dict
from fdiff.config_file import apply_config_file, as_yaml
from fdiff.errors import UserError
from fdiff.presets import preset

NUMBERS = ("int", "float", "int | None")


def parsed(*arguments: object) -> Config:
    return parse(["train", *map(str, arguments)]).arguments["config"]


def test_the_presets_are_the_papers_settings():
    fmnist, celeba = preset("fmnist"), preset("celeba")
    fed = fmnist.federation
    assert (fed.rounds, fed.clients, fed.local_epochs, fmnist.optim.batch_size) == (15, 5, 5, 128)
    assert (fmnist.model.dim, fmnist.data.image_side, fmnist.data.channels) == (28, 28, 1)
    fed = celeba.federation
    assert (fed.rounds, fed.clients, fed.local_epochs, celeba.optim.batch_size) == (30, 5, 5, 64)
    assert (celeba.model.dim, celeba.data.image_side, celeba.data.channels) == (64, 64, 3)
    for config in (fmnist, celeba):
        assert (config.optim.lr, config.optim.ema, config.federation.keep_optimizer) == (1e-4, 0.0, False)
        assert (config.model.dim_mults, config.model.heads, config.model.head_dim) == ((1, 2, 4), 4, 32)
        schedule = config.diffusion
        assert (schedule.timesteps, schedule.beta_start, schedule.beta_end) == (1000, 1e-4, 0.02)
        assert (config.data.partition, config.data.beta, config.data.seed) == ("iid", 0.5, 2023)
        assert config.sample.sampler == "ddpm" and not config.sample.clip


def test_variants_of_a_preset():
    config = preset("fmnist-k10-e1-quantity-skew")
    assert (config.federation.clients, config.federation.local_epochs) == (10, 1)
    assert config.data.partition == "quantity-skew"
    assert preset("celeba-label-skew").data.partition == "label-skew"
    assert preset("mini-k5-label-count").data.partition == "label-count"
    for name in ("fmnist-e1-k10", "fmnist-k0", "fmnist-kx", "imagenet", ""):
        with pytest.raises(UserError):
            preset(name)


def test_flags_beat_the_file_and_the_file_beats_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: ulatdec\nfederation: {clients: 3, rounds: 7}\nmodel: {dim_mults: [1, 2]}\n")
    for order in (["--config", file, "--federation.rounds", 9], ["--federation.rounds=9", "--config", file]):
        config = parsed("--preset", "mini", *order)
        assert (config.method, config.federation.clients, config.federation.rounds) == ("ulatdec", 3, 9)
        assert config.model.dim_mults == (1, 2)
        assert config.optim == preset("mini").optim


def test_the_printed_configuration_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["train", "--preset", "celeba-k3", "--optim.ema", "0.5", "--print-config"])
    assert end.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parsed("--config", file) == parsed("--preset", "celeba-k3", "--optim.ema", "0.5")
    for name in ("1e-4", "08", "on", "1:30", "2001-01-01", "null", "0x1"):
        named = replace(Config(), run=RunConfig(dir=name))
        file.write_text(as_yaml(named))
        assert apply_config_file(Config(), file) == named and yaml.safe_load(as_yaml(named))["run"]["dir"] == name
    assert from_dict(to_dict(preset("mini"))) == preset("mini")


def test_a_bare_switch_is_true():
    for flags in (["--json"], ["--json", "true"], ["--json=true"]):
        assert parse(["plan", *flags]).arguments["json"] is True
    assert parse(["plan", "--json", "false"]).arguments["json"] is False
    assert parsed("--federation.keep_optimizer").federation.keep_optimizer is True
    assert parse(["train", "--resume", "--method", "udec"]).arguments["resume"] is True


def test_resume_alone_takes_the_runs_configuration(tmp_path):
    config = parsed("--preset", "mini", "--method", "full")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    resumed = parsed("--resume", "--run.dir", tmp_path, "--federation.rounds", 99)
    assert resumed.method == "full" and resumed.optim == config.optim
    assert resumed.federation.rounds == 99 and resumed.run_dir == Path(tmp_path)


@pytest.mark.parametrize("flags", [[], ["--runtime.threads", "1"]])
def test_resume_alone_where_no_run_is_does_not_train_the_defaults(tmp_path, flags, monkeypatch):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("method: udec")
    for command in ("train", "submit"):
        with pytest.raises(UserError, match="--resume: there is no run in run.dir '.*/typo' .*; name a run's folder"):
            parse([command, "--resume", *flags, "--run.dir", str(tmp_path / "typo")])
        with pytest.raises(UserError, match="--resume: there is no run in .*; did you mean .*/run\\?"):
            parse([command, "--resume", *flags, "--run.dir", str(tmp_path / "run" / "checkpoints")])
    for says_what in (["--preset", "mini"], ["--federation.rounds", "3"], ["--method=udec"]):
        assert parsed("--resume", "--run.dir", tmp_path / "typo", *says_what).run_dir == tmp_path / "typo"
    assert parsed("--resume=true", "--run.dir", tmp_path / "run").method == "udec"
    assert parsed("--resume", "false", "--run.dir", tmp_path / "typo").method == "full"
    assert parse(["submit", "--resume", "--sweep", "mini-methods", "--run.dir", str(tmp_path / "typo")])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # it was stopped before it had made its folder
    assert parsed("--resume", *flags, "--run.dir", tmp_path / "typo").method == "full"


def test_paths_are_expanded_as_a_shell_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SITE", "site-$SITE")
    (tmp_path / "mine.yaml").write_text("data: {root: '~/${SITE}-{client}', partition: private}\nrun: {dir: ~}")
    config = parsed("--config", "~/mine.yaml", "--run.dir=~")
    assert (config.data.root, config.run_dir) == (f"{tmp_path}/site-$SITE-{{client}}", tmp_path)
    assert parsed("--config", "$HOME/mine.yaml") == config
    assert parsed("--run.dir", "a~$5$/b").run_dir == Path("a~$5$/b") and parsed("--run.dir", "null").run.dir is None
    sample = parse(["sample", "~/run", "--out", "$HOME/x.png"]).arguments
    assert (sample["checkpoint"], sample["out"]) == (tmp_path / "run", tmp_path / "x.png")
    assert parse(["report", "run", "~/b"]).arguments["runs"] == [Path("run"), tmp_path / "b"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--federation.clients", "two"], ["federation.clients", "'two'", "int"]),
        (["--model.dim_mults", "1,2"], ["model.dim_mults", "list of whole numbers"]),
        (["--model.dim", "7"], ["model.dim: 7", "even number"]),
        (["--optim.lr", ".nan"], ["optim.lr", "finite"]),
        (["--optim.lr", "-1"], ["optim.lr: -1", "greater than 0"]),
        (["--diffusion.beta_start", "0.5"], ["diffusion.beta_start: 0.5", "diffusion.beta_end = 0.02"]),
        (["--diffusion.beta_start", "1e-20"], ["diffusion.beta_start: 1e-20", "in [1e-12, 1)"]),
        (["--diffusion.timesteps", "20000"], ["diffusion.timesteps: 20000", "ᾱ_T would be 1.3e-88", "fewer timesteps"]),
        (
            ["--diffusion.beta_start", "0.9", "--diffusion.beta_end", "0.99"],
            ["diffusion.timesteps: 1000 is not valid with", "beta_end = 0.99", "ᾱ_T would be 0,"],
        ),
        (["--sample.sampler", "ddim", "--diffusion.timesteps", "10"], ["sample.steps: 50", "diffusion.timesteps = 10"]),
        (["--run.keep_checkpoints", "1"], ["run.keep_checkpoints: 1", "between 2 and 1000000"]),
        (["--json"], ["--json", "--help"]),
        (["--federation.client", "3"], ["--federation.client", "did you mean --federation.clients?"]),
        (["--federation", "{rounds: 5}"], ["--federation: is a group of fields"]),
        (["--federation.rounds", "1:30"], ["federation.rounds: '1:30'", "plain decimal number"]),
        (["--federation.rounds=0x10"], ["federation.rounds: '0x10'", "plain decimal number"]),
        (["--model.dim_mults", "[1, 0b10]"], ["model.dim_mults: '0b10'", "plain decimal number"]),
        (["--optim.lr=1" + "0" * 400], ["optim.lr: '1000", "finite number"]),
        (["--federation.rounds", "9" * 5000], ["federation.rounds: '9999", "finite number"]),
        (["--run.dir", "$NOT_SET/runs"], ["run.dir: '$NOT_SET/runs'", "NOT_SET is not set"]),
        (["--data.root", "/data/${EMPTY}"], ["data.root", "EMPTY is not set or empty"]),
        (["--run.dir="], ["run.dir: '' is not valid"]),
        (["--run.dir", "~no-such-user/x"], ["run.dir", "~no-such-user is nobody's home", "./~no-such-user"]),
        (["--config", "$NOT_SET.yaml"], ["--config", "NOT_SET is not set"]),
        (["--preset"], ["--preset"]),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, words, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError) as caught:
        parsed(*flags)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_every_number_has_an_upper_limit(tmp_path):
    numbers = [(f"{g}.{f.name}", g, f.name) for g, cls in GROUPS.items() for f in fields(cls) if f.type in NUMBERS]
    assert len(numbers) > 25
    for name, group, field in numbers:
        for huge in (10**30, 10**400):
            if huge == 10**30 and name == "optim.lr":
                continue  # a number like any other, though it will not learn
            with pytest.raises(UserError, match=rf"{name}: 1000.* is not valid; it must be ") as caught:
                from_dict({group: {field: huge}})
            assert "\n" not in str(caught.value)
    file = tmp_path / "huge.yaml"
    file.write_text(f"federation: {{clients: {'9' * 9000}}}\n")
    with pytest.raises(UserError, match="--config: .*huge.yaml is not YAML .*4300 digits"):
        parsed("--config", file)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"federation": {"client": 3}}, "federation.client: no such field; did you mean federation.clients?"),
        ({"federated": {}}, "federated: no such field; did you mean federation?"),
        ({"rounds": 5}, "rounds: no such field; did you mean federation.rounds?"),
        ({"data": {"batch_size": 5}}, "data.batch_size: no such field; did you mean optim.batch_size or sample.batch"),
        ({"x": 5}, "x: no such field; fdiff train --help lists them"),
        ({"data": {"beta": 1e308}}, "data.beta: 1e+308 is not valid; it must be greater than 0, and at most 1000000"),
        ({"model": [1]}, "model: [1] is not valid"),
        ({"model": {"dim": "8"}}, "model.dim: '8' is not valid; it must be of type int"),
        ({"model": {"dim": True}}, "model.dim: True is not valid"),
        ({"method": 3}, "method: 3 is not valid"),
    ],
)
def test_bad_tables_are_named_in_one_line(values, words):
    with pytest.raises(UserError, match=".*") as caught:
        from_dict(values)
    assert words in str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command, capsys):
    with pytest.raises(SystemExit) as end:
        parse([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in [line.split()[0] for line in text.splitlines() if line.startswith("  --")]:
        assert option.startswith("--")
    if "--federation.clients" in text:
        assert "K, the number of clients" in text and "default: 5" in text
