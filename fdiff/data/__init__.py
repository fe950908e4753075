"""Images: read from the formats that users have, split among clients, served in batches; and written as pictures.

Open `sources.py` first (what a data set is), then `partition.py` (who gets which images) and `shards.py` (the batches
of one client). Knows no models and no ranks.
"""

from __future__ import annotations

from fdiff.data.cifar10 import CIFAR10_URL
from fdiff.data.images import normalise
from fdiff.data.listing import first_difference, list_source
from fdiff.data.loaders import PATIENCE_S
from fdiff.data.opening import open_client_source, open_source
from fdiff.data.pictures import check_target, save_grid, save_images
from fdiff.data.shards import Shard
from fdiff.data.sources import Source, check_labels
