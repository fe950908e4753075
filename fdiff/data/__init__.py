"""Images: read from the formats that users have, split among clients, served in batches; and written as pictures.

Open `sources.py` first (what a data set is), then `partition.py` (who gets which images) and `shards.py` (the batches
of one client). Knows no models and no ranks.
"""

from __future__ import annotations

from fdiff.data.cifar10 import CIFAR10_URL
from fdiff.data.folder import merge_classes
from fdiff.data.images import normalise
from fdiff.data.inspection import Findings, colours, infer_shape, inspect, merge
from fdiff.data.listing import fingerprint, first_difference, list_split
from fdiff.data.loaders import PATIENCE_S
from fdiff.data.opening import (
    as_source,
    open_client_source,
    open_source,
    read_client_split,
    read_split,
    split_source,
    without_unfit,
)
from fdiff.data.pictures import as_pictures, check_target, needs_array, save_array, save_grid, save_images
from fdiff.data.shards import Shard
from fdiff.data.sources import Source, Split, check_labels
