"""The shape of a dynamic routing network."""

from __future__ import annotations

from dataclasses import dataclass

from brt.errors import BrtError


@dataclass(frozen=True)
class DynamicRoutingConfig:
    """Shape of the network: scale s has ``channels * 2**s`` channels and 1/(4 * 2**s) of the size.

    Layer l has ``min(l + 2, num_scales)`` cells. With ``small_gate`` gates look at their input at a
    quarter of its size. ``gate_bias`` is what a gate starts from. ``budget_share`` is the part of
    all multiply-adds that training pulls an image's expected ones towards, by ``budget_weight``
    times the squared difference.

    Source: Li et al., CVPR 2020, section 3; the authors' configurations.
    """

    num_layers: int = 4
    num_scales: int = 4
    channels: int = 8
    num_classes: int = 5
    small_gate: bool = True
    gate_bias: float = 1.5
    budget_weight: float = 0.0
    budget_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_scales", "num_classes"):
            if getattr(self, name) < 1:
                raise BrtError(
                    f"DynamicRoutingConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.num_scales > self.num_layers + 1:
            raise BrtError(
                f"DynamicRoutingConfig: {self.num_layers} layers reach {self.num_layers + 1} "
                f"scales, not {self.num_scales}"
            )
        if self.channels < 2 or self.channels % 2:
            raise BrtError(f"DynamicRoutingConfig: channels must be even, got {self.channels}")
        if self.budget_weight < 0 or not 0 <= self.budget_share <= 1:
            raise BrtError(
                "DynamicRoutingConfig: budget_weight must be from 0 and budget_share from 0 to 1; "
                f"got {self.budget_weight} and {self.budget_share}"
            )

    @classmethod
    def cityscapes(cls, name: str = "A") -> DynamicRoutingConfig:
        """The published networks A, B, C and Raw: 16 layers, four scales, 19 classes.

        A, B and C were trained towards different budgets and have the same shape; Raw had no
        budget, and gates that look at all of their input.
        """
        budgets = {"A": (0.8, 0.1), "B": (0.5, 0.1), "C": (0.5, 0.2), "Raw": (0.0, 0.0)}
        if name not in budgets:
            raise BrtError(f"DynamicRoutingConfig: no network {name!r}: {', '.join(budgets)}")
        weight, share = budgets[name]
        return cls(
            num_layers=16,
            channels=64,
            num_classes=19,
            small_gate=name != "Raw",
            budget_weight=weight,
            budget_share=share,
        )

    @property
    def divisor(self) -> int:
        """What the sides of an image must be multiples of."""
        return 4 * 2 ** (self.num_scales - 1) * (4 if self.small_gate else 1)

    def num_cells(self, layer: int) -> int:
        """Cells of layer 0, 1, ...; -1 is the one before."""
        return min(layer + 2, self.num_scales)
