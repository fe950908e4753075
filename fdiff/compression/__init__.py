"""Compression inside the all-reduce: fewer bytes for the clients' updates, in sums that stay sums.

Open `sums.py` first (what is summed, among whom, in which order), then a kind: `quantize.py`, `sparsify.py`,
`low_rank.py`. `cost.py` has the bytes of each, in closed form. Knows ranks only through `fdiff.comm`, and no files.
"""

from __future__ import annotations

from fdiff.compression.cost import Payload, payload_for
from fdiff.compression.low_rank import factor_sizes, first_factors
from fdiff.compression.sums import Exchange, Share, average_updates
