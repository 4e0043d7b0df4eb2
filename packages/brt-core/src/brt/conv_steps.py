"""What a convolutional branch is made of, as data: the steps of `brt.ops.conv_chain`.

Legend: R rows, P paths, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from brt.errors import RouteError


@dataclass(frozen=True)
class ConvStep:
    """One step of a branch: ``dst = shuffle(post(act(conv(src) + bias) * scale + add))``.

    Images live in registers; register 0 is the cell that enters, the last step's ``dst`` leaves.
    Convolutions are 3x3 with padding 1, or 1x1, of stride 1. ``weight``, ``bias`` and ``slope``
    are positions in the list of parameters, ``add`` a register; -1 = none.

    Attributes:
        act: 0 nothing, 1 ReLU, 2 PReLU with ``slope`` (of one or of as many values as channels).
        post: whether a ReLU follows the addition.
        shuffle: the factor of a pixel shuffle at the end; 1 = none.
    """

    src: int
    dst: int
    weight: int
    bias: int = -1
    slope: int = -1
    add: int = -1
    act: int = 0
    post: bool = False
    shuffle: int = 1
    scale: float = 1.0

    def numbers(self) -> list[int]:
        """The nine integers that the operator takes for a step."""
        return [
            self.src, self.dst, self.add, self.weight, self.bias, self.slope, self.act,
            int(self.post), self.shuffle,
        ]  # fmt: skip


def flatten_branches(
    branches: Sequence[Sequence[ConvStep]],
) -> tuple[list[int], list[float], list[int]]:
    """(steps, scales, step_offsets) as the operator takes them."""
    steps, scales, step_offsets_P1 = [], [], [0]
    for branch in branches:
        if not branch:
            raise RouteError("conv_chain: a branch needs at least one step")
        for step in branch:
            steps += step.numbers()
            scales.append(float(step.scale))
        step_offsets_P1.append(len(scales))
    return steps, scales, step_offsets_P1


@dataclass(frozen=True, eq=False)
class ConvProgram:
    """The branches of a chain as the operator takes them, made once for many calls."""

    steps: tuple[int, ...]
    step_offsets_P1: tuple[int, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, branches: Sequence[Sequence[ConvStep]]) -> ConvProgram:
        """The program of some branches."""
        steps, scales, step_offsets_P1 = flatten_branches(branches)
        return cls(tuple(steps), tuple(step_offsets_P1), tuple(scales))

    def arguments(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
        """Steps, step offsets and scales, in the order of the operator."""
        return self.steps, self.step_offsets_P1, self.scales


def unflatten_branch(
    steps: Sequence[int], scales: Sequence[float], first: int, last: int
) -> list[ConvStep]:
    """Steps ``first`` to ``last`` (exclusive) of the flat lists that the operator takes."""
    found = []
    for i in range(first, last):
        src, dst, add, weight, bias, slope, act, post, shuffle = steps[9 * i : 9 * i + 9]
        found.append(
            ConvStep(src, dst, weight, bias, slope, add, act, bool(post), shuffle, scales[i])
        )
    return found


def image_shape(
    x_RCHW: Tensor, params: Sequence[Tensor], branch: Sequence[ConvStep]
) -> tuple[int, int, int]:
    """``(C', H', W')`` that a branch makes of rows like these."""
    shapes = {0: tuple(x_RCHW.shape[1:])}
    for step in branch:
        _, height, width = shapes[step.src]
        channels = params[step.weight].shape[0] // step.shuffle**2
        shapes[step.dst] = (channels, height * step.shuffle, width * step.shuffle)
    return shapes[branch[-1].dst]  # type: ignore[return-value]
