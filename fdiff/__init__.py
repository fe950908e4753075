"""fdiff: FedDiffuse (arXiv 2406.12575) on many ranks: one DDPM, K clients, four ways to share it."""

__version__ = "0.1.0"
