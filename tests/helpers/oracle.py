"""The whole federated training once more: plain, sequential, float64, a tensor at a time, K models in a list.

Written from the published description of FedDiffuse (arXiv 2406.12575), and not from the package: no bucket,
communicator, optimizer class or module. What the two share is input: the initial weights, the images, and the
random draws (which clients, which images in which order, which timesteps, which noise) through `fdiff.seeds`
and `fdiff.plan`. Parameters have names of their own; `package_names` says what the package calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiff.config import Config
from fdiff.plan import plan_round
from fdiff.seeds import torch_stream

Weights = dict[str, Tensor]  # oracle name -> float64

# --- the model ----------------------------------------------------------------------------------------------


def unet(w: Weights, config: Config, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """The noise in x (B, C, S, S) at the timesteps t (B,)."""
    stages = len(config.model.dim_mults)
    shape = config.model.heads, config.model.head_dim
    time = linear(w, "time2", gelu(linear(w, "time1", sinusoids(t, config.model.dim))))
    if labels is not None:
        time = time + w["class.weight"][labels]
    h = conv(w, "stem", x, padding=3)
    skips = {}
    for i in range(1, stages + 1):
        h = block(w, f"down{i}.first", h, time)
        h = block(w, f"down{i}.second", h, time)
        h = h + linear_attention(w, f"down{i}.attention", h, *shape)
        skips[i] = h
        if i < stages:
            h = conv(w, f"down{i}.halve", h, padding=1, stride=2)
    h = middle(w, config, h, time)
    for i in range(stages, 1, -1):
        h = block(w, f"up{i}.first", torch.cat([h, skips[i]], 1), time)
        h = block(w, f"up{i}.second", h, time)
        h = h + linear_attention(w, f"up{i}.attention", h, *shape)
        h = F.conv_transpose2d(h, w[f"up{i}.double.weight"], w[f"up{i}.double.bias"], stride=2, padding=1)
    return conv(w, "head.out", block(w, "head.block", h, None))


def middle(w: Weights, config: Config, h: Tensor, time: Tensor) -> Tensor:
    """Blocks with an attention amidst them, or what the configuration makes of it."""
    model = config.model
    if "middle.scores" in w:
        scores = w["middle.scores"]
        best = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
        best = best[: math.ceil(model.bottleneck_select * len(scores))]
        hard = torch.tensor([float(i in best) for i in range(len(scores))], dtype=scores.dtype)
        soft = 1 / (1 + torch.exp(-scores))
        h = h * (hard - soft.detach() + soft)[None, :, None, None]
    if "middle.in.weight" in w:
        h = conv(w, "middle.in", h)
    attend = {"softmax": softmax_attention, "linear": linear_attention}.get(model.bottleneck_attention)
    for i in range(model.bottleneck_blocks + 1):
        if i == math.ceil(model.bottleneck_blocks / 2) and attend:
            h = h + attend(w, "middle.attention", h, model.heads, model.head_dim)
        if i < model.bottleneck_blocks:
            h = block(w, f"middle.{_NUMBERS[i]}", h, time)
    return conv(w, "middle.out", h) if "middle.out.weight" in w else h


def block(w: Weights, name: str, x: Tensor, time: Tensor | None) -> Tensor:
    """A ConvNeXt block."""
    h = conv(w, f"{name}.depthwise", x, padding=3, groups=x.shape[1])
    if time is not None:
        h = h + linear(w, f"{name}.time", gelu(time))[:, :, None, None]
    h = conv(w, f"{name}.widen", norm(w, f"{name}.norm1", h), padding=1)
    h = conv(w, f"{name}.narrow", norm(w, f"{name}.norm2", gelu(h)), padding=1)
    return h + (conv(w, f"{name}.residual", x) if f"{name}.residual.weight" in w else x)


def softmax_attention(w: Weights, name: str, x: Tensor, heads: int, size: int) -> Tensor:
    """Every position looks at every position."""
    q, k, v = heads_of(w, name, x, heads, size)
    scores = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(size)
    seen = torch.einsum("bhij,bhdj->bhdi", softmax(scores, 3), v)
    return conv(w, f"{name}.out", seen.reshape(len(x), heads * size, *x.shape[2:]))


def linear_attention(w: Weights, name: str, x: Tensor, heads: int, size: int) -> Tensor:
    """q over features, k over positions; a norm behind it."""
    q, k, v = heads_of(w, name, x, heads, size)
    context = torch.einsum("bhdn,bhen->bhde", softmax(k, 3), v)
    seen = torch.einsum("bhde,bhdn->bhen", context, softmax(q, 2) / math.sqrt(size))
    seen = seen.reshape(len(x), heads * size, *x.shape[2:])
    return norm(w, f"{name}.norm_out", conv(w, f"{name}.out", seen))


def heads_of(w: Weights, name: str, x: Tensor, heads: int, size: int) -> list[Tensor]:
    """q, k, v of the normalised x: (B, heads, size, positions) each."""
    qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm_in", x))
    return [third.reshape(len(x), heads, size, -1) for third in qkv.chunk(3, 1)]


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """sin, then cos, of t at dim/2 frequencies from 1 down to 1/10000."""
    half = dim // 2
    angles = torch.stack([t.double() * 10_000.0 ** (-i / (half - 1)) for i in range(half)], 1)
    return torch.cat([torch.sin(angles), torch.cos(angles)], 1)


def conv(w: Weights, name: str, x: Tensor, padding: int = 0, stride: int = 1, groups: int = 1) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding, 1, groups)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """GroupNorm with one group."""
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((1, 2, 3), keepdim=True)
    scale, shift = (w[f"{name}.{end}"][None, :, None, None] for end in ("weight", "bias"))
    return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def softmax(x: Tensor, dim: int) -> Tensor:
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


# --- names --------------------------------------------------------------------------------------------------

_NUMBERS = ("first", "second", "third", "fourth")
_BLOCK = {"time": "time.1", "depthwise": "depthwise", "norm1": "net.0", "widen": "net.1", "norm2": "net.3"}
_BLOCK |= {"narrow": "net.4", "residual": "residual"}
_LINEAR = {"norm_in": "norm", "qkv": "fn.qkv", "out": "fn.out.0", "norm_out": "fn.out.1"}
_SOFTMAX = {"norm_in": "norm", "qkv": "fn.qkv", "out": "fn.out"}


def package_names(config: Config) -> dict[str, str]:
    """The package's name of each of the oracle's layers (those that a given model lacks included)."""
    stages = len(config.model.dim_mults)
    names = {"stem": "encoder.stem", "class": "encoder.label", "head.out": "decoder.out"}
    names |= {"time1": "encoder.time.1", "time2": "encoder.time.3"}
    names |= {"middle.in": "bottleneck.enter", "middle.out": "bottleneck.leave", "middle": "bottleneck"}  # its scores
    groups = {"middle": ("bottleneck", _LINEAR if config.model.bottleneck_attention == "linear" else _SOFTMAX)}
    for i in range(1, stages + 1):
        down, up = f"encoder.stages.{i - 1}", f"decoder.stages.{stages - i}"
        groups |= {f"down{i}": (down, _LINEAR), f"up{i}": (up, _LINEAR)}
        names |= {f"down{i}.halve": f"{down}.down", f"up{i}.double": f"{up}.up"}
    for ours, (theirs, attention) in groups.items():
        for i, number in enumerate(_NUMBERS, 1):
            names |= {f"{ours}.{number}.{k}": f"{theirs}.block{i}.{v}" for k, v in _BLOCK.items()}
        names |= {f"{ours}.attention.{k}": f"{theirs}.attention.{v}" for k, v in attention.items()}
    return names | {f"head.block.{k}": f"decoder.block.{v}" for k, v in _BLOCK.items()}


def renamed(state: dict[str, Tensor], config: Config) -> Weights:
    """float64 copies of the package's parameters under the oracle's names; KeyError if one is new."""
    theirs_to_ours = {theirs: ours for ours, theirs in package_names(config).items()}
    weights = {}
    for name, tensor in state.items():
        layer, end = name.rsplit(".", 1)
        weights[f"{theirs_to_ours[layer]}.{end}"] = tensor.detach().double().cpu().clone()
    return weights


def part_of(name: str) -> str:
    """Encoder: stem, time MLP, down stages; bottleneck: the middle; decoder: up stages, head."""
    if name.startswith(("up", "head")):
        return "decoder"
    return "bottleneck" if name.startswith("middle") else "encoder"


# --- training -----------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A client: n_k images (uint8), its model, Adam's moments, the moving average.

    `fragile` marks the elements whose gradient was next to zero when Adam started afresh: it then steps by
    the learning rate in the direction of the gradient's sign, which is a matter of rounding.
    """

    images: Tensor
    labels: Tensor
    weights: Weights
    average: Weights
    m: Weights = field(default_factory=dict)
    v: Weights = field(default_factory=dict)
    steps: int = 0
    fragile: Weights = field(default_factory=dict)

    def start_adam(self) -> None:
        self.m, self.v = ({name: torch.zeros_like(p) for name, p in self.weights.items()} for _ in range(2))
        self.steps = 0


def alpha_bar(config: Config) -> Tensor:
    """Π (1 - β) for β growing linearly, both ends included."""
    first, last, steps = config.diffusion.beta_start, config.diffusion.beta_end, config.diffusion.timesteps
    product, values = 1.0, []
    for t in range(steps):
        product *= 1.0 - (first + (last - first) * t / (steps - 1))
        values.append(product)
    return torch.tensor(values, dtype=torch.float64)


def huber(a: Tensor, b: Tensor) -> Tensor:
    d = (a - b).abs()
    return torch.where(d < 1, 0.5 * d * d, d - 0.5).mean()


def train(model: Model, config: Config, client: int, round: int) -> None:
    """E epochs over the client's images, reshuffled each epoch, the last short batch kept."""
    shuffling = torch_stream(config.run.seed, "shuffling", client, round)
    noise = torch_stream(config.run.seed, "noise", client, round)
    if not model.m:  # its first training: the average starts from the weights that it received
        model.average = dict(model.weights)
    if not (config.federation.keep_optimizer and model.m):
        model.start_adam()
    products, size = alpha_bar(config), config.optim.batch_size
    for _ in range(config.federation.local_epochs):
        order = torch.randperm(len(model.images), generator=shuffling)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            x0 = model.images[chosen].double() / 127.5 - 1.0
            t = torch.randint(config.diffusion.timesteps, (len(chosen),), generator=noise)
            epsilon = torch.randn(x0.shape, generator=noise).double()
            a = products[t].reshape(-1, 1, 1, 1)
            x = torch.sqrt(a) * x0 + torch.sqrt(1 - a) * epsilon
            step(model, config, x, t, epsilon, model.labels[chosen] if config.model.classes else None)


def step(model: Model, config: Config, x: Tensor, t: Tensor, epsilon: Tensor, labels: Tensor | None) -> None:
    """One step of Adam by hand (default betas and epsilon), then of the moving average."""
    leaves = {name: p.clone().requires_grad_() for name, p in model.weights.items()}
    loss = huber(unet(leaves, config, x, t, labels), epsilon)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    model.steps += 1
    for (name, p), g in zip(model.weights.items(), gradients, strict=True):
        if model.steps == 1:
            model.fragile[name] = model.fragile.get(name, False) | (g.abs() < 1e-3 * g.square().mean().sqrt())
        model.m[name] = 0.9 * model.m[name] + 0.1 * g
        model.v[name] = 0.999 * model.v[name] + 0.001 * g * g
        m = model.m[name] / (1 - 0.9**model.steps)
        v = model.v[name] / (1 - 0.999**model.steps)
        model.weights[name] = p - config.optim.lr * m / (torch.sqrt(v) + 1e-8)
        if keep := config.optim.ema:
            model.average[name] = keep * model.average[name] + (1 - keep) * model.weights[name]


# --- the federation -----------------------------------------------------------------------------------------

SHARED = {
    "full": ("encoder", "bottleneck", "decoder"),
    "usplit": ("encoder", "bottleneck", "decoder"),
    "ulatdec": ("bottleneck", "decoder"),
    "udec": ("decoder",),
    "encoder+decoder": ("encoder", "decoder"),
}


def run(config: Config, initial: Weights, images: list[Tensor], labels: list[Tensor]) -> list[Model]:
    """All rounds, with each client's images and labels. Returns the clients as they are at the end."""
    models = [Model(i, y, dict(initial), dict(initial)) for i, y in zip(images, labels, strict=True)]
    for round in range(1, config.federation.rounds + 1):
        selected, reporters = who(config, round)
        for client in selected:
            train(models[client], config, client, round)
        averages = mean_of_parts([m.weights for m in models], reporters, [len(m.images) for m in models])
        for model in models:
            model.weights |= averages
    return models


def mean_of_parts(clients: list[Weights], reporters: dict[str, list[int]], sizes: list[int]) -> Weights:
    """Σ n_k θ_k / Σ n_k over the clients that report the part of θ, for every shared tensor."""
    averages = {}
    for name in clients[0]:
        if part_of(name) in reporters:
            theirs = reporters[part_of(name)]
            averages[name] = sum(sizes[c] * clients[c][name] for c in theirs) / sum(sizes[c] for c in theirs)
    return averages


def who(config: Config, round: int) -> tuple[list[int], dict[str, list[int]]]:
    """The selected clients, and the reporters of each shared part. Only the draws are the package's."""
    fed = config.federation
    plan = plan_round(config.method, fed.clients, round, config.run.seed, fed.fraction)
    selected = list(plan.selected)
    assert len(set(selected)) == max(1, math.floor(fed.fraction * fed.clients + 0.5))
    if config.method == "usplit":
        reporters = {part: list(clients) for part, clients in plan.reporters.items()}
        check_halves(selected, reporters)
        return selected, reporters
    return selected, {part: selected for part in SHARED[config.method]}


def check_halves(selected: list[int], reporters: dict[str, list[int]]) -> None:
    """USPLIT's rule: is there a pairing of which these are the reports?

    In a pair one reports the encoder, the other the decoder, one of the two also the bottleneck: so encoder
    and decoder have a reporter a pair, no client in both, and the bottleneck as many. A client without a
    partner is one more in the bottleneck and in one of the other two. A single client reports all.
    """
    ends = {part: set(reporters[part]) for part in ("encoder", "decoder")}
    middle, pairs, odd = set(reporters["bottleneck"]), len(selected) // 2, len(selected) % 2
    assert all(len(set(clients)) == len(clients) for clients in reporters.values())
    if len(selected) == 1:
        assert all(clients == selected for clients in reporters.values())
        return
    fewer, more = sorted(ends.values(), key=len)
    assert not fewer & more and fewer | more == set(selected) and middle <= set(selected)
    assert (len(fewer), len(more), len(middle)) == (pairs, pairs + odd, pairs + odd)
    assert not odd or more & middle
