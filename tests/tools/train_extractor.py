"""Trains the embedded extractor on all 60,000 Fashion-MNIST training images and writes its weights.

    python tests/tools/train_extractor.py --data /usr/share/datasets/fashion-mnist

Reads Debian's dataset-fashion-mnist (gzipped IDX files). One seed, one thread: the same machine and torch
version give the same file. Prints the accuracy on the 10,000 test images, which take no part in training.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fdiff.evaluation.extractors import FMNIST_ARCHITECTURE, FMNIST_WEIGHTS, FmnistCnn

DEBIAN_DATA = Path("/usr/share/datasets/fashion-mnist")
BATCH = 128
PEAK_LR = 4e-3
SHIFT = 2  # pixels, of the random translation


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims, header = raw[3], 4 + 4 * raw[3]
    return np.frombuffer(raw, np.uint8, offset=header).reshape(np.frombuffer(raw, ">i4", dims, offset=4))


def read_split(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of `train` or `t10k`."""
    images = read_idx(root / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(root / f"{split}-labels-idx1-ubyte.gz")
    return torch.tensor(images)[:, None].float() / 255, torch.tensor(labels).long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images and shifts the batch by up to SHIFT pixels."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    return functional.pad(images, (SHIFT,) * 4)[..., top : top + 28, left : left + 28]


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> FmnistCnn:
    """The classifier after `epochs` passes with AdamW and a one-cycle learning rate."""
    torch.manual_seed(seed)  # a script of its own: nobody else draws from the global generator
    model, generator = FmnistCnn().train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = functional.cross_entropy(model(augment(images[batch], generator))[1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        took_s = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {took_s:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: FmnistCnn, images: Tensor, labels: Tensor) -> float:
    """The share of images whose label the classifier finds."""
    predicted = torch.cat([model(chunk)[1].argmax(1) for chunk in images.split(500)])
    return (predicted == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEBIAN_DATA, help="folder of the IDX .gz files")
    parser.add_argument("--out", type=Path, default=FMNIST_WEIGHTS, help="the safetensors file to write")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=2023)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = train(*read_split(args.data, "train"), args.epochs, args.seed)
    score = accuracy(model, *read_split(args.data, "t10k"))
    metadata = {
        "architecture": FMNIST_ARCHITECTURE,
        "training_set": "Fashion-MNIST, all 60000 training images",
        "test_accuracy": f"{score:.4f}",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
    }
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, args.out, metadata)
    print(f"{args.out}: {args.out.stat().st_size} bytes, test accuracy {score:.4f}")


if __name__ == "__main__":
    main()
