"""fdiff: FedDiffuse (arXiv 2406.12575) on many ranks: one DDPM, K clients, four ways to share it, and your own.

What `__all__` lists is for everyone; all other names are fdiff's own and may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fdiff.errors import RunError, UserError
from fdiff.registry import register_dataset, register_method, register_model

if TYPE_CHECKING:
    from fdiff.api import Run, load_config, open_run, train
    from fdiff.federation import load_model
    from fdiff.plan import everyone

__version__ = "0.1.0"
_HOMES = {"everyone": "fdiff.plan", "load_model": "fdiff.federation"}  # of those that are not at home in fdiff.api
__all__ = [
    "Run",
    "RunError",
    "UserError",
    "everyone",
    "load_config",
    "load_model",
    "open_run",
    "register_dataset",
    "register_method",
    "register_model",
    "train",
]


def __getattr__(name: str) -> Any:
    """The names of `__all__` that need torch, when they are asked for: importing fdiff alone takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "fdiff.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
