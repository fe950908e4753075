"""Feature extractors that generated and real images are scored with: images in, features and labels out.

Owns two networks and where their weights come from: the embedded Fashion-MNIST classifier (its distance is
`fd_fmnist`, never FID) and pytorch-fid's InceptionV3 (its distance is FID). Knows nothing of ranks, data sets
or scores. An image's features do not depend on how many images come with it, so that a score does not depend
on how images are dealt out over ranks.
"""

from __future__ import annotations

import hashlib
import http.client
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fdiff.config import DataConfig
from fdiff.errors import UserError, first_line

DISTANCES = {"fmnist-cnn": "fd_fmnist", "inception": "fid"}  # extractor: what its Fréchet distance is called
FEATURES = {"fmnist-cnn": 96, "inception": 2048}  # extractor: how many
CHANNELS = {"fmnist-cnn": (1,), "inception": (1, 3)}  # extractor: accepted numbers of image channels
FMNIST_WEIGHTS = Path(__file__).parents[1] / "assets" / "fmnist_cnn.safetensors"
FMNIST_ARCHITECTURE = "fmnist-cnn/1"  # stored with the weights; raised with every change of FmnistCnn
FMNIST_SIDE, FMNIST_CLASSES = 28, 10
FMNIST_TEXTURE, FMNIST_EMBEDDED = 32, 64  # features of the first stage, and of the last layer before the logits
INCEPTION_SIDE, INCEPTION_FEATURES = 299, 2048
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


class FmnistCnn(nn.Module):
    """Classifier of 28x28 greyscale images; the features are what it sees and what it concludes.

    They join its penultimate activations (64) with the mean activity of its first stage (32). A classifier is free
    to forget texture: by its last activations alone, images of pure noise lie amid real ones, so that precision
    and density would improve with noise. The first stage's edge detectors tell them apart.

    The fully connected layer is written as a 3x3 convolution over a 3x3 map, so that every layer in front of
    the features is a convolution and obeys the one precision switch that `Extractor` sets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_block(1, FMNIST_TEXTURE)
        self.middle = _conv_block(FMNIST_TEXTURE, 64)
        self.deep = _conv_block(64, 96)
        reduce = nn.Conv2d(96, FMNIST_EMBEDDED, 3, bias=False)
        self.embed = nn.Sequential(reduce, nn.BatchNorm2d(FMNIST_EMBEDDED))
        self.head = nn.Linear(FMNIST_EMBEDDED, FMNIST_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 28, 28) in [0, 1] to features (n, 96) and logits (n, 10)."""
        x = (images - 0.286) / 0.353  # mean and deviation of Fashion-MNIST's training pixels
        x = functional.max_pool2d(self.stem(x), 2)  # (n, 32, 14, 14)
        texture = x.mean((2, 3))
        x = functional.max_pool2d(self.middle(x), 2)  # (n, 64, 7, 7)
        x = functional.max_pool2d(self.deep(x), 2)  # (n, 96, 3, 3)
        embedded = functional.relu(self.embed(x)).flatten(1)
        return torch.cat([texture, embedded], 1), self.head(embedded)


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class InceptionFeatures(nn.Module):
    """pytorch-fid's InceptionV3 up to the last average pooling; its weights are loaded by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.network = inception_network()

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """(n, 1 or 3, H, W) in [0, 1] to features (n, 2048); greyscale is repeated to three channels."""
        net = self.network
        x = images.expand(-1, 3, -1, -1)
        x = functional.interpolate(x, (INCEPTION_SIDE, INCEPTION_SIDE), mode="bilinear", align_corners=False)
        x = net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(2 * x - 1)))
        x = functional.max_pool2d(x, 3, 2)
        x = functional.max_pool2d(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(x)), 3, 2)
        for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(net, f"Mixed_{block}")(x)
        return x.mean((2, 3)), None


def inception_network() -> nn.Module:
    """The network of pytorch-fid's `fid_inception_v3` without its download; the weights are uninitialised."""
    from pytorch_fid import inception as fid
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name, pool_features, inputs in (("5b", 32, 192), ("5c", 64, 256), ("5d", 64, 288)):
        setattr(network, f"Mixed_{name}", fid.FIDInceptionA(inputs, pool_features=pool_features))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(network, f"Mixed_{name}", fid.FIDInceptionC(768, channels_7x7=width))
    network.Mixed_7b = fid.FIDInceptionE_1(1280)
    network.Mixed_7c = fid.FIDInceptionE_2(2048)
    return network


@dataclass(frozen=True)
class Extractor:
    """A frozen network and what a score must say about it.

    Batches are padded with black images to `batch_size`: kernels are chosen by shape, so one shape makes an
    image's features the same to the last bit in any batch, hence a score the same for any number of ranks.
    """

    name: str
    metric_name: str  # of the Fréchet distance over these features
    checksum: str  # sha256 of the weights file, hex
    feature_dim: int
    side: int  # pixels; images of another side are resized
    batch_size: int
    prepare: Callable[[Tensor], Tensor]  # uint8 images -> the network's input
    network: nn.Module

    @property
    def classifies(self) -> bool:
        """Whether it tells labels as well."""
        return self.name == "fmnist-cnn"

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (n, C, H, W) to features (n, feature_dim), float32, on the images' device."""
        return self.see(images)[0]

    def labels(self, images: Tensor) -> Tensor:
        """uint8 images (n, C, H, W) to labels (n,), int64; UserError without a classifier."""
        if not self.classifies:
            raise UserError(f"--extractor: {self.name} has no classifier for labels; use fmnist-cnn")
        return self.see(images)[1]

    def check_shape(self, channels: int, height: int, width: int) -> None:
        """UserError unless images of this shape can be scored; callable before any image exists."""
        _check_shape(self.name, channels, height, width)

    def describe(self, side: int) -> dict[str, str | int]:
        """What a score of images of `side` pixels is stored with; `resized_from` where the side differs."""
        facts: dict[str, str | int] = {"extractor": self.name, "checksum": self.checksum}
        return facts if side == self.side else facts | {"resized_from": side}

    @torch.no_grad()
    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (n, C, H, W) to features and labels in one pass; labels are (0,) without a classifier."""
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise UserError(f"images: uint8 (n, C, H, W) expected, got {images.dtype} {tuple(images.shape)}")
        self.check_shape(*images.shape[1:])
        self.network.to(images.device)
        features = [torch.empty(0, self.feature_dim, device=images.device)]
        labels = [torch.empty(0, dtype=torch.int64, device=images.device)]
        for chunk in images.split(self.batch_size) if len(images) else ():
            seen, logits = self._one_batch(chunk)
            features.append(seen[: len(chunk)])
            if logits is not None:
                labels.append(logits[: len(chunk)].argmax(1))
        return torch.cat(features), torch.cat(labels)

    def _one_batch(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        missing = self.batch_size - len(images)
        batch = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        cudnn = torch.backends.cudnn
        # full float32 whatever the training's precision, so that scores agree between machines
        exact = cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(images.device.type, enabled=False):
            return self.network(self.prepare(batch))


def to_extractor_input(images: Tensor) -> Tensor:
    """uint8 (n, C, H, W) to float32 (n, C, 28, 28) in [0, 1]: what the embedded extractor sees.

    Real and generated images go through this one function. Larger images are averaged over areas, smaller
    ones interpolated: scores of one side compare with each other, not with those of another side.
    """
    x = images.float() / 255
    height = images.shape[-1]
    if height == FMNIST_SIDE:
        return x
    if height > FMNIST_SIDE:
        return functional.interpolate(x, (FMNIST_SIDE, FMNIST_SIDE), mode="area")
    return functional.interpolate(x, (FMNIST_SIDE, FMNIST_SIDE), mode="bilinear", antialias=True)


def load_extractor(name: str, inception_weights: str | Path | None = None, device: str = "cpu") -> Extractor:
    """The extractor of that name on `device`; UserError for an unknown name, or weights missing or unfit.

    `inception_weights` is a file for `inception`; without it torch hub's cache is used, then a download. On
    many ranks call it on rank 0 first, then on the others, so that one rank downloads.
    """
    if name == "fmnist-cnn":
        return _fmnist_extractor(FMNIST_WEIGHTS, device)
    if name == "inception":
        return _inception_extractor(_inception_file(inception_weights), device)
    raise UserError(f"--extractor: {name!r} is unknown; choose from {', '.join(DISTANCES)}")


def default_extractor(data: DataConfig) -> str:
    """The name of the extractor of a data set, where none is asked for; UserError where none suits by itself."""
    if data.shape[0] == 3:
        return "inception"
    if data.shape[0] != 1:
        raise UserError(f"--extractor: none of {', '.join(DISTANCES)} takes images of {data.shape[0]} channels")
    if knows_clothes(data):
        return "fmnist-cnn"
    raise UserError(
        f"--extractor: not given, and grey images of {data.dataset} have no usual one; choose inception, or "
        "fmnist-cnn, which knows clothes only"
    )


def check_images(name: str, data: DataConfig) -> None:
    """UserError if the extractor of that name was not made for such images; nothing is loaded."""
    if data.range is not None:
        low, high = data.range
        raise UserError(
            f"--extractor: {name} knows images of 8 bits only, and these have values from {low:g} to {high:g} "
            "(data.range), so there is no score of them"
        )
    if name in CHANNELS:
        _check_shape(name, *data.shape)


def _check_shape(name: str, channels: int, height: int, width: int) -> None:
    if channels not in CHANNELS[name] or height != width:
        wanted = " or ".join(map(str, CHANNELS[name]))
        hint = "; inception takes 3" if channels == 3 else ""
        shape = f"{channels}x{height}x{width}"
        raise UserError(f"--extractor: {name} takes square images of {wanted} channels, got {shape}{hint}")


def knows_clothes(data: DataConfig) -> bool:
    """Whether the data are Fashion-MNIST, which fmnist-cnn was trained to tell apart."""
    return data.dataset in ("embedded", "fashion-mnist")


def fmnist_metadata(path: Path = FMNIST_WEIGHTS) -> dict[str, str]:
    """What the training script stored with the weights: accuracy, training set, seed, architecture."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def find_inception_weights() -> Path | None:
    """pytorch-fid's weights in torch hub's cache, or None; loads nothing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return path if path.is_file() else None


def _fmnist_extractor(path: Path, device: str) -> Extractor:
    found = fmnist_metadata(path).get("architecture")
    if found != FMNIST_ARCHITECTURE:
        raise UserError(f"{path}: architecture is {found}, expected {FMNIST_ARCHITECTURE}; reinstall fdiff")
    network = FmnistCnn()
    network.load_state_dict(load_file(path))
    return Extractor(
        name="fmnist-cnn",
        metric_name=DISTANCES["fmnist-cnn"],
        checksum=_sha256(path),
        feature_dim=FMNIST_TEXTURE + FMNIST_EMBEDDED,
        side=FMNIST_SIDE,
        batch_size=64,
        prepare=to_extractor_input,
        network=network.to(device).eval().requires_grad_(False),
    )


def _inception_extractor(path: Path, device: str) -> Extractor:
    state = _read_state(path)
    network = InceptionFeatures()
    try:
        network.network.load_state_dict(state)
        # What torch converts to float32 without a word is another network, and NaN gives every image the same score.
        loaded = network.network.state_dict().items()
        fits = all(state[n].dtype == t.dtype and t.isfinite().all() for n, t in loaded if n in state)
    except Exception:  # values of any kind make torch's own code fail in any way
        fits = False
    if not fits:
        raise UserError(f"--weights: {path} holds no pytorch-fid InceptionV3 of finite float32; give {INCEPTION_FILE}")
    return Extractor(
        name="inception",
        metric_name=DISTANCES["inception"],
        checksum=_sha256(path),
        feature_dim=INCEPTION_FEATURES,
        side=INCEPTION_SIDE,
        batch_size=16,
        prepare=lambda images: images.float() / 255,
        network=network.to(device).eval().requires_grad_(False),
    )


def _inception_file(given: str | Path | None) -> Path:
    """The weights file: the given one, the cached one, or the one that is downloaded into the cache now."""
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"--weights: {given} is no file; give {INCEPTION_FILE} or leave it out")
        return Path(given)
    return find_inception_weights() or _download_inception()


def _download_inception() -> Path:
    from pytorch_fid.inception import FID_WEIGHTS_URL

    target = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    try:
        torch.hub.load_state_dict_from_url(
            FID_WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True, file_name=INCEPTION_FILE
        )
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: a wrong hash
        raise UserError(
            f"--extractor: inception's weights could not be downloaded ({first_line(error)}): put "
            f"{INCEPTION_FILE} at {target}, name it by --weights, "
            f"or score greyscale images by --extractor fmnist-cnn"
        ) from None
    return target


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """What a weights file holds, no pickle run; UserError whatever its bytes make the readers raise."""
    try:
        with warnings.catch_warnings(action="ignore"):  # they would not name the file
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}".split(". ")[0]  # torch goes on with how to run a pickle
        raise UserError(f"--weights: {path} cannot be read as weights ({reason}); give {INCEPTION_FILE}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
