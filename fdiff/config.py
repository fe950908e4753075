"""Everything that a run can be told: frozen dataclasses, one per concern; see `presets` for those of the paper.

Flags beat the file given by `--config`, the file beats the preset, the preset beats the defaults below, which are
the paper's settings for Fashion-MNIST on the excerpt that ships with the package.
This module knows nothing of processes, files or devices; whether a root exists is found out where it is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fdiff import config_checks as checks
from fdiff import config_unet2d as unet2d
from fdiff import registry
from fdiff.config_checks import nearest
from fdiff.config_limits import LIMITS
from fdiff.errors import UserError

PARTS = registry.PARTS
"""The parts of the models in `KINDS`, in order."""
KINDS, DATASETS = registry.BUILT_IN["model.kind"], registry.BUILT_IN["data.dataset"]


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who trains, how often, and how the clients' parameters are weighted (paper, section 3)."""

    clients: int = 5
    """K, the number of clients."""
    rounds: int = 15
    """R, the number of communication rounds."""
    local_epochs: int = 5
    """E, the epochs that each selected client trains in a round."""
    fraction: float = 1.0
    """C, the share of the clients selected in a round, in (0, 1]; at least one client is."""
    weighting: Literal["size", "uniform"] = "size"
    """Weight of a reporter in the average: its number of images, or the same for all."""
    keep_optimizer: bool = False
    """Keep each client's Adam moments from round to round instead of a fresh Adam a round (the paper's)."""
    server: Literal["average", "momentum", "adam", "yogi"] = "average"
    """What becomes of the averaged update of the shared parts: taken as it is, or a step of an optimizer (FedOpt)."""
    server_lr: float | None = None
    """The server optimizer's learning rate; by default 1 for momentum, 0.01 for adam and yogi."""
    server_beta1: float = 0.9
    """Decay of its mean of updates."""
    server_beta2: float = 0.99
    """Decay of adam's and yogi's mean of squares."""
    server_tau: float = 1e-3
    """Added to the root of the mean of squares in adam and yogi; that mean begins as its square."""
    proximal_mu: float = 0.0
    """FedProx: mu/2 times the squared distance of the shared parts from where the round began joins the local loss."""
    on_client_failure: Literal["stop", "drop"] = "stop"
    """When a client's training fails: stop the run, or go on without that client for the round."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are split among the clients."""

    dataset: str = "embedded"
    """The data set: embedded (an excerpt of Fashion-MNIST in the package, 2,000 + 500 images), fashion-mnist, celeba,
    cifar10, folder, npz (arrays as MedMNIST has them), parquet (a folder as Hugging Face has them), silos (with
    partition `private`), or your own as MODULE:NAME."""
    root: str | None = None
    """Folder, or file, of the data set; with partition `private` a template with {client}: a folder or a file each."""
    image_side: int | None = None
    """Side of the square images that the model sees, in pixels; by default that of the images found."""
    channels: int | None = None
    """1 (greyscale), 3 (RGB), or of arrays any number up to 16; by default what the images found have."""
    range: tuple[float, float] | None = None
    """[LOW,HIGH], the values that stand for black and white, of images that are arrays of more than 8 bits; by default
    [0,65535] of image files of 16 bits a channel, and of 8-bit images, of which none may be given, 0 to 255."""
    axes: str | None = None
    """What the axes of a silo's HDF5 images are: N, H, W and C in their order, e.g. NHWC; by default inferred."""
    background: str = "white"
    """What shows through transparent pixels: white, black or #RRGGBB."""
    max_pixels: int = 64_000_000
    """Image files with more pixels are refused, before memory is taken for them."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """When an image file is unfit: refuse to start, or leave out all that are unfit when the run starts."""
    partition: Literal["iid", "label-skew", "quantity-skew", "label-count", "private"] = "iid"
    """How the training images are split; `private`: not at all, each client has its own folder or file."""
    beta: float = 0.5
    """Concentration of the Dirichlet distribution of the two skews; smaller is more skewed."""
    labels_per_client: int = 2
    """Classes of which each client has images with label-count."""
    seed: int = 2023
    """Seed of the split, for NumPy's legacy generator."""
    limit: int | None = None
    """Use only so many training images (of each client with `private`), drawn once with `seed`."""
    test_limit: int | None = None
    """Use only so many test images, drawn once with `seed`."""
    in_memory: Literal["auto", "always", "never"] = "auto"
    """Keep a client's images on the device, as uint8, or float32 if they have more bits; `auto`: where they take at
    most half of the free memory."""
    workers: int = 2
    """Loader processes for images that do not fit in memory."""
    flip: bool = False
    """Mirror each training image left to right with chance 1/2, anew at each step."""
    download: bool = False
    """Download Fashion-MNIST through torchvision where the root lacks it."""
    changed: bool = field(default=False, metadata={"stored": False})
    """Resume although the images are not those of before; for one start, and stored nowhere."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the images that the model sees; UserError where only the images can tell."""
        channels, side = self.channels or _CHANNELS.get(self.dataset), self.image_side or _SIDES.get(self.dataset)
        if channels is None or side is None:
            raise UserError(
                f"data.image_side, data.channels: not given, and only the images of {self.dataset} tell; give "
                "--data.image_side and --data.channels"
            )
        return channels, side, side

    @property
    def itemsize(self) -> int:
        """Bytes of a value of an image as it is held and sent: uint8, or float32 if it has a range."""
        return 1 if self.range is None else 4


# Of data sets whose images are all alike, so that nobody has to look at them.
_SIDES = {"embedded": 28, "fashion-mnist": 28, "cifar10": 32}
_CHANNELS = {"embedded": 1, "fashion-mnist": 1, "cifar10": 3, "celeba": 3}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet with ConvNeXt blocks; the defaults are the paper's for Fashion-MNIST (2,996,315 parameters)."""

    kind: str = "unet"
    """The model: unet (the paper's, with ConvNeXt blocks), unet2d (diffusers' UNet2DModel), or your own as
    MODULE:NAME."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Settings of unet2d (diffusers' own), or of your own model, each by its name: --model.options.NAME VALUE."""
    init: str | None = None
    """Start from these weights: a file of fdiff export, a run or checkpoint of fdiff (its moving average, if it has
    one), or a diffusers folder; by default from the seed."""
    init_client: int | None = None
    """Whose model of the run `init`, where its clients keep private parts."""
    train: str | None = None
    """Train only these parts, joined by +, e.g. bottleneck+decoder; the others stay as they begin, in no optimizer and
    in no sum; by default all."""
    dim: int = 28
    """Width of the first stage, in channels."""
    dim_mults: tuple[int, ...] = (1, 2, 4)
    """Width of each stage as a multiple of dim; the image is halved between stages."""
    heads: int = 4
    """Attention heads; of unet alone, as is all that begins with bottleneck."""
    head_dim: int = 32
    """Channels of an attention head; unet2d takes the largest number up to it that divides its widths."""
    classes: int = 0
    """Condition on so many class labels; 0: unconditional, as in the paper."""
    class_dropout: float = 0.0
    """Chance that a label is dropped in training, in [0, 1), so that `sample.guidance` can be used; 0: none is."""
    bottleneck_width: float = 1.0
    """Feature maps of the bottleneck as a multiple of the last width; unless 1, 1×1 convolutions lead in and out."""
    bottleneck_blocks: int = 2
    """ConvNeXt blocks of the bottleneck, 0 to 4; its attention follows the first half."""
    bottleneck_attention: Literal["softmax", "linear", "none"] = "softmax"
    """Attention of the bottleneck."""
    bottleneck_select: float = 1.0
    """Share of the encoder's feature maps that enter the bottleneck, in (0, 1]; which ones is learned."""

    @property
    def label_rows(self) -> int:
        """How many labels the model has to know: its classes, and one for none of them where labels are dropped."""
        return self.classes + (self.class_dropout > 0)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process, and what the model predicts of it."""

    timesteps: int = 1000
    """T, the number of diffusion steps."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise variances: linear from beta_start to beta_end, or cosine (Nichol and Dhariwal), which has no such ends."""
    beta_start: float = 1e-4
    """Noise variance of the first timestep of the linear schedule."""
    beta_end: float = 0.02
    """Noise variance of its last timestep, included."""
    objective: Literal["noise", "v"] = "noise"
    """What the model predicts: the noise ε, or v = √ᾱ ε - √(1-ᾱ) x₀ (Salimans and Ho)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Local training: Adam with default betas on the Huber loss of what the model predicts."""

    lr: float = 1e-4
    """Learning rate."""
    warmup_steps: int = 0
    """Steps of a client, counted over the whole run, in which its learning rate rises linearly to lr; 0: none."""
    grad_clip: float | None = None
    """Largest norm of a step's gradient, all parameters and FedProx's term together: a longer one is shortened."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW), of all parameters that are trained; 0: Adam."""
    batch_size: int = 128
    """B, images a step; the last short batch of an epoch is kept."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of each client's weights; 0: none, as in the paper."""
    ema_warmup: bool = False
    """Let that decay rise: after t steps of a client in the whole run it is at most (1 + t) / (10 + t), first 0."""

    @property
    def counts_steps(self) -> bool:
        """Whether something follows a client's steps over the whole run, so that it has to keep their number."""
        return self.warmup_steps > 0 or self.ema_warmup


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How the clients' updates of the shared parts are made smaller before they are summed; not in the paper."""

    kind: Literal["none", "quantize", "random-k", "top-k", "low-rank"] = "none"
    """Stochastic rounding to few levels, some random or the largest values only, or matrices as thin factors."""
    levels: int = 16
    """Levels of quantize, at least 2."""
    block: int = 1024
    """Values that share a scale in quantize, a power of two."""
    rotate: bool = False
    """Rotate each block of quantize at random before it is rounded, so that single large values cost less."""
    fraction: float = 0.1
    """Share of the values that random-k and top-k send, in (0, 1]."""
    rank: int = 4
    """Rank of the factors of low-rank."""
    error_feedback: bool | None = None
    """Add what a client's report left out to its next one; by default with top-k and low-rank."""

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep what their reports left out."""
        by_default = self.kind in ("top-k", "low-rank")
        return self.kind != "none" and (by_default if self.error_feedback is None else self.error_feedback)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are drawn from a model."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Ancestral sampling over all T steps with the fixed posterior variance, or DDIM with fewer."""
    steps: int = 50
    """Steps of DDIM, at most diffusion.timesteps."""
    clip: bool = False
    """Clamp the predicted clean image to [-1, 1] at each step."""
    guidance: float = 1.0
    """Classifier-free guidance g: ε_∅ + g (ε_c - ε_∅), with two predictions a step; 1: none."""
    images: int = 16
    """Images of a sample grid (of each client where clients keep private parts)."""
    every: int = 5
    """Rounds between two sample grids; the last round always has one; 0: none."""
    batch_size: int = 64
    """Images a sampling step; part of the result's last bits, so it does not follow the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run leaves behind, and the one seed from which all its randomness derives."""

    dir: str | None = None
    """Run folder; by default runs/DATASET-METHOD-PARTITION-kK-eE-sSEED."""
    seed: int = 0
    """The seed of every random stream but the data split's."""
    checkpoint_every: int = 1
    """Rounds between two checkpoints; the last round always has one."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept, at least 2."""
    keep_local: bool = False
    """Save with each client also its shared parts as it trained them, before the average: see `evaluate --local`."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how the job runs; nothing here may change the result but for rounding."""

    comm: Literal["auto", "torch", "mpi", "none"] = "auto"
    """Communicator: torch.distributed, MPI, a world of one, or what the launcher suggests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; `auto`: a GPU if there is one."""
    share_gpu: bool = False
    """Let several ranks share a GPU; they then communicate over gloo instead of NCCL."""
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    """Arithmetic of the model; parameters are float32 except under float64."""
    execution: Literal["auto", "eager", "captured", "compiled"] = "auto"
    """How steps run: op by op, captured into a CUDA graph, or fused by the compiler (and captured on a GPU); `auto`:
    compiled on a GPU (captured without triton), eager on a CPU."""
    layout: Literal["auto", "channels-first", "channels-last"] = "auto"
    """Memory layout of activations; `auto`: channels last on a CPU, first on a GPU and for the compiler."""
    reduction: Literal["fast", "ordered"] = "fast"
    """Sum of the reporters by all-reduce, or in client order: then bit-equal for any number of ranks."""
    partial_sums: Literal["auto", "library", "ring"] = "auto"
    """Sums that some ranks only receive: by the library, by a ring of sends, or `auto`: what was measured faster."""
    threads: int | None = None
    """CPU threads a rank; by default OMP_NUM_THREADS, else an equal share of the cores; 1 with reduction `ordered`."""
    timeout_s: float = 1800.0
    """Seconds that a rank waits for the others before it names the missing one and ends."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Raises UserError in one line if a value is out of its range."""

    method: str = "full"
    """What is shared: full (all), usplit (all, a half by each), ulatdec (bottleneck, decoder), udec (decoder), parts
    joined by + (encoder+decoder), or your own as MODULE:NAME."""
    federation: FederationConfig = field(default_factory=FederationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        silos = isinstance(self.data, DataConfig) and self.data.partition == "private"
        if silos and self.data.dataset in set(DATASETS) - {"npz", "parquet"}:
            object.__setattr__(self, "data", replace(self.data, dataset="silos"))
        validate(self)
        object.__setattr__(self, "method", _canonical(self.method, self.model.kind))
        object.__setattr__(self, "model", _canonical_model(self.model))

    @property
    def run_dir(self) -> Path:
        """The run folder, given or derived from what the run is."""
        fed, data = self.federation, self.data
        name = f"{data.dataset}-{self.method}-{data.partition}-k{fed.clients}-e{fed.local_epochs}-s{self.run.seed}"
        return Path(self.run.dir or f"runs/{name.replace(':', '.')}")

    def saves(self, round: int) -> bool:
        """Whether the run writes a checkpoint of this round by itself, without a signal."""
        return round % self.run.checkpoint_every == 0 or round == self.federation.rounds

    def samples(self, round: int) -> bool:
        """Whether the run draws a sample grid after this round."""
        every = self.sample.every
        return every > 0 and (round % every == 0 or round == self.federation.rounds)


GROUPS: dict[str, type] = {
    "federation": FederationConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "diffusion": DiffusionConfig,
    "optim": OptimConfig,
    "compression": CompressionConfig,
    "sample": SampleConfig,
    "run": RunConfig,
    "runtime": RuntimeConfig,
}

PATHS = ("data.root", "model.init", "run.dir")  # fields in which a person may write ~ and $NAME: see `config_file`


def _canonical(method: str, kind: str) -> str:
    """The name of a method that was given as parts of a model in `KINDS`: in their order, or that of the paper."""
    if kind not in KINDS or not set(method.split("+")) <= set(PARTS):
        return method
    shared = "+".join(part for part in PARTS if part in method.split("+"))
    return {"+".join(PARTS): "full", "bottleneck+decoder": "ulatdec", "decoder": "udec"}.get(shared, shared)


def _canonical_model(model: ModelConfig) -> ModelConfig:
    """The model with its trained parts in order, none where that is all, and options as they are kept."""
    if model.kind not in KINDS:
        return model
    trained = "+".join(part for part in PARTS if part in (model.train or "").split("+"))
    options = unet2d.stored(model) if model.kind == "unet2d" else model.options
    return replace(model, train=None if trained == "+".join(PARTS) else trained or None, options=options)


def validate(config: Config) -> None:
    """Check types, choices, ranges and the fields that depend on each other; UserError names field and remedy."""
    for name, value, annotation in _leaves(config):
        checks.check_type(name, value, annotation)
        allowed, right = LIMITS.get(name, (lambda _: True, ""))
        if not allowed(value):
            raise UserError(f"{name}: {value!r} is not valid; it must be {right}")
    checks.check_names(config.method, config.model.kind, config.data.dataset, PARTS)
    _check_relations(config)


def _leaves(config: Config) -> list[tuple[str, Any, Any]]:
    """(dotted name, value, annotation) of every field, e.g. ("federation.clients", 5, int)."""
    leaves = [("method", config.method, str)]
    for group, cls in GROUPS.items():
        if not isinstance(getattr(config, group), cls):
            raise UserError(f"{group}: {getattr(config, group)!r} is not valid; it must be a {cls.__name__}")
        hints = get_type_hints(cls)
        leaves += [(f"{group}.{n}", getattr(getattr(config, group), n), h) for n, h in hints.items()]
    return leaves


def _check_relations(config: Config) -> None:
    data, model, diffusion = config.data, config.model, config.diffusion
    if model.kind == "unet2d":  # before its levels are counted
        unet2d.check(model)
    factor = 2 ** (stages_of(model) - 1)
    side = data.image_side or _SIDES.get(data.dataset, factor)
    if side % factor:
        below = max(factor, side // factor * factor)
        of = "model.options.block_out_channels" if "block_out_channels" in model.options else "model.dim_mults"
        raise UserError(
            f"data.image_side: {side} cannot be halved evenly by the {stages_of(model)} stages of {of}; it must be a "
            f"multiple of {factor}, e.g. {below}"
        )
    if diffusion.schedule == "linear":
        checks.check_schedule(diffusion.beta_start, diffusion.beta_end, diffusion.timesteps)
    elif diffusion.objective == "noise":
        checks.check_clip(config.sample.clip)
    checks.check_guidance(model.classes, model.class_dropout, config.sample.guidance)
    checks.check_ema(config.optim.ema, config.optim.ema_warmup)
    if config.compression.kind == "quantize":
        checks.check_words(config.compression.levels, config.federation.clients)
    if config.sample.sampler == "ddim" and config.sample.steps > diffusion.timesteps:
        raise UserError(
            f"sample.steps: {config.sample.steps} is not valid; DDIM takes at most diffusion.timesteps = "
            f"{diffusion.timesteps}"
        )
    if model.kind == "unet" and model.options:
        raise UserError(f"model.options.{min(model.options)}: model.kind {model.kind} has no options; see --model.dim")
    if model.kind == "unet":
        checks.check_bottleneck(model.bottleneck_blocks, model.bottleneck_attention)
    if model.kind == "unet2d":
        channels, known = data.channels or _CHANNELS.get(data.dataset), data.image_side or _SIDES.get(data.dataset)
        unet2d.check_data(model, channels, known, diffusion.timesteps)
    checks.check_trained(model.train, PARTS if model.kind in KINDS else None)
    checks.check_init(model.init, model.init_client)
    if data.dataset == "silos" and data.partition != "private":
        raise UserError(
            f"data.dataset: silos is not valid with data.partition {data.partition}; each client opens its own with "
            "--data.partition private"
        )
    if data.dataset == "npz" and data.in_memory == "never":
        raise UserError("data.in_memory: never is not valid with data.dataset npz, which is held in memory; use auto")
    if data.partition == "private" and "{client}" not in (data.root or ""):
        raise UserError(
            f"data.root: {data.root!r} is not valid with data.partition private; it must be a path with {{client}} "
            "in it, e.g. /data/site-{client} or /data/site-{client}.h5"
        )


def stages_of(model: ModelConfig) -> int:
    """The stages between which the model halves the side of an image, as far as its configuration tells."""
    if model.kind == "unet2d":
        return unet2d.levels(model)
    return len(model.dim_mults) if model.kind in KINDS else 1


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of JSON types, without what is never stored; `from_dict` is its inverse."""
    return {
        k: to_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for k, v in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if _is_stored(f))
    }


def _is_stored(field: dataclasses.Field) -> bool:
    return field.metadata.get("stored", True)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.beta": 0.5, …} of {"data": {"beta": 0.5, …}, …}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def from_dict(values: dict[str, Any]) -> Config:
    """Config of a nested dict, as `to_dict` makes it; UserError names a field that is unknown or of a wrong type."""
    values = dict(values)
    groups: dict[str, Any] = {}
    for group, cls in GROUPS.items():
        given = values.pop(group, {})
        if not isinstance(given, dict):
            raise UserError(f"{group}: {given!r} is not valid; it must be a group of fields")
        if unknown := set(given) - {f.name for f in dataclasses.fields(cls)}:
            raise _no_such_field(f"{group}.{min(map(str, unknown))}")
        lists = {name for name, hint in get_type_hints(cls).items() if checks.tuple_of(hint)}
        given = {k: tuple(v) if k in lists and isinstance(v, list) else v for k, v in given.items()}
        groups[group] = cls(**given)
    if unknown := set(values) - {"method"}:
        raise _no_such_field(min(map(str, unknown)))
    return Config(**values, **groups)


def _no_such_field(name: str) -> UserError:
    near = nearest(name, [*GROUPS, *flat(to_dict(Config()))])
    return UserError(f"{name}: no such field; {near or 'fdiff train --help lists them'}")
