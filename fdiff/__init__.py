"""fdiff: FedDiffuse (arXiv 2406.12575) on many ranks: one DDPM, K clients, four ways to share it, and your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiff.registry import register_dataset, register_method, register_model

if TYPE_CHECKING:
    from torch import nn

    from fdiff.config import Config

__version__ = "0.1.0"


def load_model(path: Path, kind: str | None = None) -> tuple[nn.Module, Config]:
    """The model in a file of `fdiff export`, on the CPU in the precision it was saved in, and its run's configuration.

    A model that is code, MODULE:NAME, is loaded only where `kind` names it again. UserError if the file is not an
    export, or does not hold the model that it describes.
    """
    from fdiff.federation import load_model as load  # here, so that `import fdiff` does not take as long as torch

    return load(path, kind)


def __getattr__(name: str) -> Any:
    """`everyone`, for methods of one's own; later, since it imports torch."""
    if name == "everyone":
        from fdiff.plan import everyone

        return everyone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
