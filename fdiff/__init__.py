"""fdiff: FedDiffuse (arXiv 2406.12575) on many ranks: one DDPM, K clients, four ways to share it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdiff.config import Config
    from fdiff.model import UNet

__version__ = "0.1.0"


def load_model(path: Path) -> tuple[UNet, Config]:
    """The model in a file of `fdiff export`, on the CPU in the precision it was saved in, and its run's configuration.

    UserError if the file is not an export, or does not hold the model that it describes.
    """
    from fdiff.federation import load_model as load  # here, so that `import fdiff` does not take as long as torch

    return load(path)
