"""Benchmark of MSDNet: images leave at the exits where they left in Brainstorm's evaluation.

Shape letters: N images, C classes, H height, W width, K exits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt.errors import BrtError
from brt.passes import Context, FuseVertical
from brt_models.exits import ExitNetwork
from brt_models.msdnet import MSDNet, MSDNetConfig, exits_of, thresholds_for_shares
from brt_models.msdnet.thresholds import taken_exits

# Per cent of images that leave at each exit (Brainstorm's published artefact, figure 20).
MIXES = (
    "0/0/0/0/100",
    "0/0/0/40/60",
    "0/0/30/30/40",
    "10/10/20/30/30",
    "50/20/20/10/0",
    "50/30/20/0/0",
    "50/50/0/0/0",
    "100/0/0/0/0",
)
PRESETS: dict[str, tuple[Callable[[], MSDNetConfig], int]] = {
    "imagenet": (MSDNetConfig.imagenet, 224),
    "cifar": (MSDNetConfig.cifar, 32),
}
NUM_IMAGES = 20
COMPILED = "python if, torch.compile per stage (frozen)"
TOLERANCE = 1e-4  # float32 against float64, through at most a hundred convolutions


def early_exit(
    device: torch.device,
    dtype: torch.dtype,
    *,
    preset: str = "imagenet",
    mix: str = "10/10/20/30/30",
    batch: int = 1,
) -> Workload:
    """Random images through a network with random weights, whose thresholds give this mix."""
    if preset not in PRESETS:
        raise BrtError(f"msdnet: no preset {preset!r}: {', '.join(PRESETS)}")
    make, size = PRESETS[preset]
    torch.manual_seed(0)
    model = sharpened(MSDNet(make()), size).to(device, dtype)
    return exit_workload("msdnet", model, size, mix, batch, {"preset": preset})


def sharpened(model: ExitNetwork, size: int) -> ExitNetwork:
    """The same, with batch norms that expect what they get and logits of deviation 2.

    Of random weights as they are, all images would be equally sure but for rounding.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    x_NCHW = images_of((8, 3, size, size))
    with torch.no_grad():
        model.train().all_exits(x_NCHW)
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for head, logits_NC in zip(heads, model.eval().all_exits(x_NCHW), strict=True):
            head.weight *= 2 / logits_NC.std()
    return model


def images_of(shape: tuple[int, ...]) -> Tensor:
    """Noise of different contrast."""
    return torch.randn(shape) * (0.5 + torch.rand(shape[0], 1, 1, 1))


def exit_workload(
    name: str, model: ExitNetwork, size: int, mix: str, batch: int, options: dict[str, object]
) -> Workload:
    """The workload of any network with exits on images of this size."""
    if batch < 1:
        raise BrtError(f"{name}: batch must be at least 1, got {batch}")
    first = next(model.parameters())
    model = model.eval()
    num_sets = -(-NUM_IMAGES // batch)

    def images() -> list[Tensor]:
        shape = (batch, 3, size, size)
        return [images_of(shape).to(first.device, first.dtype) for _ in range(num_sets)]

    timed, others = images(), images()
    logits_KNC = exits_of(model, timed)
    model.set_thresholds(thresholds_for_shares(parse_mix(name, mix, len(logits_KNC)), logits_KNC))
    exit_N = taken_exits(model.thresholds, logits_KNC)
    load_K = exit_N.bincount(minlength=len(logits_KNC)).tolist()
    macs_K = model.macs_K(timed[0])
    flops = 2.0 * sum(load * m for load, m in zip(load_K, macs_K, strict=True)) / num_sets

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(model, brt.profile(model, others), sample=others[0])

    return Workload(
        name=name,
        shapes=f"{[batch, 3, size, size]} images, {'/'.join(map(str, load_K))} leave at each exit",
        device=first.device,
        dtype=first.dtype,
        sets=[(x_NCHW,) for x_NCHW in timed],
        reference=_InDouble(model),
        tolerance=TOLERANCE if first.dtype == torch.float32 else 3e-2,
        options={**options, "mix": mix, "batch": batch},
        is_uneven=True,
        variants=[
            row("eager", "python if", lambda: PythonExit(model)),
            row("peer", COMPILED, lambda: PythonExit(model, compiled=True)),
            *([row("peer", *batched) for batched in _batched(model)] if batch > 1 else []),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt optimised", optimised),
            *(
                [row("oracle", "the stages taken, in one line", lambda: Oracle(model, timed))]
                if batch == 1
                else []
            ),
            row("limit", "dense product of as many operations", lambda: _product(first, flops)),
        ],
    )


def parse_mix(name: str, mix: str, num_exits: int) -> list[float]:
    """ "50/30/20" -> a number for each exit."""
    try:
        shares = [float(share) for share in mix.split("/")]
    except ValueError:
        shares = []
    if len(shares) != num_exits or min(shares) < 0 or sum(shares) <= 0:
        raise BrtError(
            f"{name}: mix must be {num_exits} shares like "
            f"{'/'.join(['20'] * num_exits)}, got {mix!r}"
        )
    return shares


Stage = Callable[[Any], tuple[Any, Tensor, Tensor]]
"""State -> (state, logits [N, C], the largest probability [N])."""


class PythonExit(nn.Module):
    """The same network as people write it: a Python `if` behind every stage.

    It shares the modules of the network that it is made of.
    """

    def __init__(self, model: ExitNetwork, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.thresholds = model.thresholds
        self.stages: list[Stage] = []
        for k in range(model.num_exits):
            stage = partial(self._stage, k)
            self.stages.append(frozen(stage) if compiled else stage)

    def _stage(self, exit_idx: int, state: Any) -> tuple[Any, Tensor, Tensor]:
        state, logits_NC = self.model.stage(exit_idx, state)
        return state, logits_NC, logits_NC.softmax(1).amax(1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C]."""
        return self._one(x_NCHW) if len(x_NCHW) == 1 else self._batch(x_NCHW)

    def _one(self, x: Any) -> Tensor:
        for threshold, stage in zip(self.thresholds, self.stages, strict=False):
            x, logits_NC, sure_N = stage(x)
            if sure_N.item() >= threshold:
                return logits_NC
        return self.stages[-1](x)[1]

    def _batch(self, x_NCHW: Tensor) -> Tensor:
        index_N = torch.arange(len(x_NCHW), device=x_NCHW.device)
        left, where = [], []
        x: Any = x_NCHW
        for threshold, stage in zip(self.thresholds, self.stages, strict=False):
            x, logits_NC, sure_N = stage(x)
            out_N = sure_N >= threshold
            left.append(logits_NC[out_N])
            where.append(index_N[out_N])
            x, index_N = pytree.tree_map(itemgetter(~out_N), x), index_N[~out_N]
            if not len(index_N):
                break
        else:
            left.append(self.stages[-1](x)[1])
            where.append(index_N)
        order_N = torch.cat(where).argsort()
        return torch.cat(left)[order_N]


def frozen(function: Any) -> Any:
    """A function compiled with its weights taken for constants: folded, and laid out once."""
    return torch.compile(function, options={"freezing": True})


def _batched(model: ExitNetwork) -> Iterator[tuple[str, Callable[[], Callable[[Tensor], Tensor]]]]:
    """What people do with a batch besides: no image leaves before the end, or one at a time."""
    yield "all stages for all images", lambda: AllStages(model)
    one = PythonExit(model)
    yield (
        "python if, image by image",
        lambda: lambda x_NCHW: torch.cat([one(image) for image in x_NCHW.split(1)]),
    )


class AllStages(nn.Module):
    """Every stage for the whole batch; each image gets the answer of its exit."""

    def __init__(self, model: ExitNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C]."""
        logits_KNC = torch.stack(self.model.all_exits(x_NCHW))
        sure_KN = logits_KNC.softmax(2).amax(2)
        wanted_K1 = sure_KN.new_tensor([*self.model.thresholds, 0.0])[:, None]
        exit_N = (sure_KN >= wanted_K1).int().argmax(0)
        return logits_KNC[exit_N, torch.arange(len(x_NCHW), device=x_NCHW.device)]


class Oracle(nn.Module):
    """Straight lines of the work that an image takes whose exit is known: no `if`, nothing unused.

    The answers of exits that an image passes are computed, as a real run needs them. Layers are
    fused as `fuse-vertical` does.
    """

    def __init__(self, model: ExitNetwork, images: Sequence[Tensor]) -> None:
        super().__init__()
        exit_N = taken_exits(model.thresholds, exits_of(model, images))
        self.exit_of = {
            x_NCHW.data_ptr(): int(exit_idx)
            for x_NCHW, exit_idx in zip(images, exit_N, strict=True)
        }
        self.lines = {k: fused(_Line(model, k)) for k in sorted(set(self.exit_of.values()))}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[1, 3, H, W], one of the images that it knows -> [1, C]."""
        out: Tensor = self.lines[self.exit_of[x_NCHW.data_ptr()]](x_NCHW)[-1]
        return out


class _Line(nn.Module):
    def __init__(self, model: ExitNetwork, last: int) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        state: Any = x_NCHW
        logits = []
        for k in range(self.last + 1):
            state, logits_NC = self.model.stage(k, state)
            logits.append(logits_NC)
        return tuple(logits)


def fused(line: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A module without routers, with the layers that `fuse-vertical` makes."""
    graph = brt.trace(line.eval())
    graph.graph.eliminate_dead_code()
    FuseVertical().run(graph, Context(FuseVertical.name, "", line))
    graph.recompile()
    return graph


class _InDouble(nn.Module):
    """The reference: the hand-written exits in float64."""

    def __init__(self, model: ExitNetwork) -> None:
        super().__init__()
        self.model = PythonExit(copy.deepcopy(model).double())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.model(x_NCHW.double())


def _product(like: Tensor, flops: float) -> Callable[[Tensor], Tensor]:
    width = 1024
    inner = max(1, round(flops / (2 * width**2)))
    a, b = like.new_ones(width, inner), like.new_ones(inner, width)
    return lambda x_NCHW: torch.mm(a, b)
