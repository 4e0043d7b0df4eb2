"""Reading a traced branch as the steps of a conv chain.

Legend: C channels, P paths.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from brt.conv_steps import ConvStep
from brt.passes.fusion import NotFusableError

_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MUL = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_MAX_REGISTERS = 64
# In place of the position of a step: no step, and the cell that enters
_NONE, _ENTRY = -1, -2


@dataclass(frozen=True)
class Owned:
    """A parameter as its module holds it, so that a replaced parameter is found again."""

    module: nn.Module
    name: str

    def get(self) -> Tensor:
        """The parameter that is there now."""
        # Thousands of them a call: nn.Module's own look-up takes longer than some kernels
        found = self.module._parameters.get(self.name)
        return getattr(self.module, self.name) if found is None else found


@dataclass
class Params:
    """The parameters that the steps of all branches refer to by position, each once."""

    owned: list[Owned] = field(default_factory=list)
    _position: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, module: nn.Module, name: str) -> int:
        """The position of a module's parameter; -1 where it has none."""
        if getattr(module, name, None) is None:
            return -1
        key = (id(module), name)
        if key not in self._position:
            self._position[key] = len(self.owned)
            self.owned.append(Owned(module, name))
        return self._position[key]


@dataclass
class _Image:
    """What a node computes: the result of a step so far, or the cell that enters."""

    step: int
    channels: int | None
    grown: int = 1


class Matcher:
    """Turns the nodes between a branch's input and its output into steps."""

    def __init__(self, graph: fx.GraphModule, params: Params) -> None:
        self._graph, self._params = graph, params
        self._steps: list[ConvStep] = []  # src, dst and add are steps here, registers at the end
        self._images: dict[fx.Node, _Image] = {}
        self._closed: set[int] = set()  # steps with a result that more than one node reads
        self._results: list[_Image] = []  # of each step

    def match(self, entry: fx.Node, nodes: list[fx.Node], result: fx.Node) -> list[ConvStep]:
        """The steps of a branch that takes ``entry`` and gives ``result``, by way of ``nodes``."""
        self._images[entry] = _Image(_ENTRY, None)
        inside = set(nodes)
        skip: set[fx.Node] = set()
        for node in nodes:
            if node in skip:
                continue
            if node.op == "get_attr":
                continue
            shuffle = unflatten_shuffle(node)
            if shuffle is not None:
                last, factor, middle = shuffle
                skip |= middle
                self._images[last] = self._shuffled(node, factor)
                self._close_if_shared(last, inside, result)
                continue
            self._images[node] = self._image(node)
            self._close_if_shared(node, inside, result)
        final = self._images.get(result)
        if final is None or final.step != len(self._steps) - 1 or not self._steps:
            raise NotFusableError("its result is not that of its last convolution")
        return self._with_registers()

    def _close_if_shared(self, node: fx.Node, inside: set[fx.Node], result: fx.Node) -> None:
        if len(node.users) != 1 or node is result or not set(node.users) <= inside:
            self._closed.add(self._images[node].step)

    def _image(self, node: fx.Node) -> _Image:
        module = None
        if node.op == "call_module":
            module = self._graph.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d):
            return self._convolution(node, module)
        if isinstance(module, nn.ReLU) or node.target in _RELU:
            return self._relu(node)
        if isinstance(module, nn.PReLU):
            return self._prelu(node, module)
        if isinstance(module, nn.Identity) or (
            isinstance(module, (nn.Dropout, nn.Dropout2d)) and not module.training
        ):
            return self._read(node.args[0], node)
        if isinstance(module, nn.PixelShuffle):
            return self._shuffled(node, module.upscale_factor)
        if node.target is F.pixel_shuffle:
            return self._shuffled(node, _plain(node, 1, "upscale_factor"))
        if node.target in _ADD:
            return self._add(node)
        if node.target in _MUL:
            return self._scaled(node)
        what = type(module).__name__ if module is not None else str(node.target)
        raise NotFusableError(f"{node.name} is {what}, which no step of a conv chain does")

    def _read(self, value: Any, node: fx.Node) -> _Image:
        if not isinstance(value, fx.Node) or value not in self._images:
            raise NotFusableError(f"{node.name} reads something other than the branch's images")
        return self._images[value]

    def _open(self, image: _Image, node: fx.Node) -> ConvStep:
        """The step of an image that only this node reads: the node may become part of it."""
        if image.step == _ENTRY or image.step in self._closed:
            raise NotFusableError(f"{node.name} follows no convolution of its own")
        return self._steps[image.step]

    def _change(self, image: _Image, **changes: Any) -> _Image:
        self._steps[image.step] = replace(self._steps[image.step], **changes)
        return image

    def _convolution(self, node: fx.Node, conv: nn.Conv2d) -> _Image:
        kernel = conv.kernel_size[0]
        same = {"same": kernel // 2, "valid": 0}
        padding = same[conv.padding] if isinstance(conv.padding, str) else conv.padding[0]
        if (
            conv.kernel_size not in ((1, 1), (3, 3))
            or conv.stride != (1, 1)
            or conv.dilation != (1, 1)
            or conv.groups != 1
            or padding != kernel // 2
            or conv.padding_mode != "zeros"
        ):
            raise NotFusableError(f"{node.name} is {conv}, not a 3x3 or 1x1 that keeps the size")
        image = self._read(node.args[0], node)
        position = len(self._steps)
        self._steps.append(
            ConvStep(
                src=image.step,
                dst=position,
                weight=self._params.add(conv, "weight"),
                bias=self._params.add(conv, "bias"),
            )
        )
        made = _Image(position, conv.out_channels, image.grown)
        self._results.append(made)
        return made

    def _relu(self, node: fx.Node) -> _Image:
        image = self._read(node.args[0], node)
        step = self._open(image, node)
        if step.shuffle != 1 or step.post or step.act:
            raise NotFusableError(f"{node.name} is a second activation")
        if step.add != _NONE or step.scale != 1.0:
            return self._change(image, post=True)
        return self._change(image, act=1)

    def _prelu(self, node: fx.Node, prelu: nn.PReLU) -> _Image:
        image = self._read(node.args[0], node)
        step = self._open(image, node)
        if step.shuffle != 1 or step.post or step.act or step.add != _NONE or step.scale != 1.0:
            raise NotFusableError(f"{node.name} does not follow a plain convolution")
        return self._change(image, act=2, slope=self._params.add(prelu, "weight"))

    def _scaled(self, node: fx.Node) -> _Image:
        a, b = node.args[:2]
        image, factor = (a, b) if isinstance(a, fx.Node) else (b, a)
        if not isinstance(factor, (int, float)) or not isinstance(image, fx.Node):
            raise NotFusableError(f"{node.name} multiplies by something other than a number")
        read = self._read(image, node)
        step = self._open(read, node)
        if step.add != _NONE or step.post or step.shuffle != 1:
            raise NotFusableError(f"{node.name} scales after an addition or a shuffle")
        return self._change(read, scale=step.scale * float(factor))

    def _add(self, node: fx.Node) -> _Image:
        alpha = node.kwargs.get("alpha", 1)
        first, second = (self._read(a, node) for a in node.args[:2])
        if not isinstance(alpha, (int, float)):
            raise NotFusableError(
                f"{node.name} scales what it adds by something other than a number"
            )
        # The later step takes the addition into itself: what it adds must be there by then
        for image, other, factor in ((second, first, float(alpha)), (first, second, 1.0)):
            if image is first and alpha != 1:
                break  # the scale belongs to the other one
            if image.step <= other.step or image.step in self._closed:
                continue
            step = self._steps[image.step]
            if step.add != _NONE or step.post or step.shuffle != 1:
                continue
            if other.channels not in (None, image.channels) or other.grown != image.grown:
                continue
            return self._change(image, add=other.step, scale=step.scale * factor)
        raise NotFusableError(f"{node.name} adds images in a way that no step does")

    def _shuffled(self, node: fx.Node, factor: int) -> _Image:
        image = self._read(node.args[0], node)
        step = self._open(image, node)
        assert image.channels is not None
        if step.shuffle != 1 or step.add != _NONE or image.channels % factor**2:
            raise NotFusableError(f"{node.name} shuffles what is not a plain convolution")
        self._change(image, shuffle=factor)
        made = _Image(image.step, image.channels // factor**2, image.grown * factor)
        self._results[image.step] = made
        return made

    def _with_registers(self) -> list[ConvStep]:
        """The steps with registers for results: few, as images take the places of dead ones."""
        last_read: dict[int, int] = {}
        for i, step in enumerate(self._steps):
            last_read[step.src] = i
            if step.add != _NONE:
                last_read[step.add] = i
        register = {_ENTRY: 0}
        num_registers = 1
        free: dict[tuple[int | None, int], list[int]] = {}
        made = []
        for i, step in enumerate(self._steps):
            alike = free.setdefault(self._shape(i), [])
            if alike:
                register[i] = alike.pop()
            else:
                register[i] = num_registers
                num_registers += 1
            add = _NONE if step.add == _NONE else register[step.add]
            made.append(replace(step, src=register[step.src], dst=register[i], add=add))
            for dead in {step.src, step.add} - {_NONE, _ENTRY}:
                if last_read[dead] == i:
                    free.setdefault(self._shape(dead), []).append(register[dead])
        if num_registers > _MAX_REGISTERS:
            raise NotFusableError(f"it keeps more than {_MAX_REGISTERS} images at a time")
        return made

    def _shape(self, step: int) -> tuple[int | None, int]:
        return self._results[step].channels, self._results[step].grown


def _plain(node: fx.Node, position: int, name: str) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    if not isinstance(value, int):
        raise NotFusableError(f"{node.name} has a {name} that is not a number")
    return value


def unflatten_shuffle(node: fx.Node) -> tuple[fx.Node, int, set[fx.Node]] | None:
    """(last node, factor, nodes after the first) where a pixel shuffle is written out as views."""
    chain = [node]
    for method in ("permute", "flatten", "flatten"):
        users = list(chain[-1].users)
        if len(users) != 1 or users[0].target != method:
            return None
        chain.append(users[0])
    first, permute, inner, outer = chain
    if first.target != "unflatten" or first.args[1:2] != (1,) or len(first.args) != 3:
        return None
    sizes = first.args[2]
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 3 or sizes[1] != sizes[2]:
        return None
    order = permute.args[1] if len(permute.args) == 2 else permute.args[1:]
    if tuple(order) != (0, 1, 4, 2, 5, 3):  # type: ignore[arg-type]
        return None
    if inner.args[1:] != (4, 5) or outer.args[1:] != (2, 3) or not isinstance(sizes[1], int):
        return None
    return outer, sizes[1], set(chain[1:])
