"""Data sets as sources of uint8 images with labels, and a client's shard of one on its device.

`open_source` opens a whole data set, `open_client_source` a client's own folder or file; both read this
machine's files and send nothing anywhere. Knows nothing of ranks, partitions or training.
"""

from fdiff.data.images import normalise
from fdiff.data.opening import open_client_source, open_source
from fdiff.data.shards import Shard
from fdiff.data.sources import Source, check_labels

__all__ = ["Shard", "Source", "check_labels", "normalise", "open_client_source", "open_source"]
