"""Numbers that are not finite: a client's training ends in an error, and so does drawing, which names whose model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fdiff.config import Config
from fdiff.data import Shard, open_source
from fdiff.errors import RunError
from fdiff.federation.client import Client, Trainer
from fdiff.federation.sampling import Batch, draw
from fdiff.presets import mini

CPU = torch.device("cpu")
SMALL = replace(
    mini(),
    federation=replace(mini().federation, local_epochs=1),
    model=replace(mini().model, dim=4, dim_mults=(1,)),
    optim=replace(mini().optim, batch_size=4),
    sample=replace(mini().sample, steps=2),
)


def trainer_of(config: Config = SMALL) -> tuple[Trainer, Client]:
    """A trainer, and a client with one batch: its first step is its last."""
    client = Client(3, Shard(open_source(config.data, "train"), range(4), CPU))
    trainer = Trainer(config, CPU)
    trainer.prepare(client, 1)
    return trainer, client


def test_a_step_too_large_is_seen_though_no_step_follows_and_the_parameters_are_finite():
    trainer, client = trainer_of(replace(SMALL, optim=replace(SMALL.optim, lr=1e30)))
    with pytest.raises(RunError, match="^after the last step the loss is not a finite number; use a smaller optim.lr$"):
        trainer.train(client, 1)
    assert trainer.buckets.flat.isfinite().all()


@pytest.mark.parametrize("name", ["ema", "exp_avg_sq"])
def test_what_a_client_keeps_must_be_finite_where_parameters_and_loss_are(name):
    trainer, client = trainer_of()

    def spoil() -> None:
        trainer.working[name][5] = float("inf")

    with pytest.raises(RunError, match=f"^after the last step a value of {name} is not a finite number"):
        trainer.train(client, 1, spoil)


def test_the_check_after_the_last_step_changes_no_result(monkeypatch):
    (checked, client), (other, _) = trainer_of(), trainer_of()
    monkeypatch.setattr(other, "_find_diverged", lambda *_: None)
    for round in (1, 2):
        for trainer in (checked, other):
            trainer.prepare(client, round)
        assert checked.train(client, round).losses == other.train(client, round).losses
    assert torch.equal(checked.buckets.flat, other.buckets.flat)


@pytest.mark.parametrize(("model", "whose"), [(None, "the global model"), (3, "client 3")])
@pytest.mark.parametrize("spoil", [lambda flat: flat.fill_(float("nan")), lambda flat: flat.fill_(1e30)])
def test_images_that_are_not_finite_are_an_error_that_names_model_and_round(
    model: int | None, whose: str, spoil: Callable[[torch.Tensor], object]
):
    trainer, _ = trainer_of()
    spoil(trainer.buckets.flat)
    with pytest.raises(RunError, match=f"^{whose}, round 7: drawn images are not finite numbers; train with a smaller"):
        draw(trainer, SMALL, Batch(model, 0, 2, 0), 7)
