"""Make fdiff/assets/fashion_mnist_excerpt.npz: the first images of each class of the real set, in its order.

    python tests/tools/make_excerpt.py [FOLDER WITH THE IDX FILES]

The default folder is that of Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fdiff.data.fashion_mnist import DEBIAN_ROOT, EXCERPT, FILES, read_idx

PER_CLASS = {"train": 200, "test": 50}


def excerpt(folder: Path) -> dict[str, np.ndarray]:
    """Its four arrays: {train,test}_images uint8 (n, 28, 28) and {train,test}_labels uint8 (n,)."""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        image_file, label_file = (folder / f"{name}.gz" for name in FILES[split])
        images, labels = read_idx(image_file, dims=3), read_idx(label_file, dims=1)
        kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
        arrays |= {f"{split}_images": images[kept], f"{split}_labels": labels[kept]}
    return arrays


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN_ROOT
    target = Path(__file__).parents[2] / "fdiff" / "assets" / EXCERPT
    np.savez_compressed(target, **excerpt(source))
    print(f"{target}: {target.stat().st_size} bytes")
