"""Class labels: 0 to classes - 1, and with dropped labels one more index, `no_class`, that stands for none of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fdiff.config import Config, ModelConfig


def no_class(model: ModelConfig) -> int:
    """The label of an image whose own was dropped, in training and where guidance draws without one."""
    return model.classes


def drop_labels(labels: Tensor, model: ModelConfig, stream: torch.Generator) -> Tensor:
    """The labels (B,), of which each is dropped with chance `model.class_dropout`; draws B numbers of the stream."""
    dropped = torch.rand(labels.shape, generator=stream, device=labels.device) < model.class_dropout
    return labels.masked_fill(dropped, no_class(model))


def unconditional(config: Config) -> Config:
    """The configuration without labels, and with neither of the options that need them."""
    model = replace(config.model, classes=0, class_dropout=0.0)
    return replace(config, model=model, sample=replace(config.sample, guidance=1.0))
