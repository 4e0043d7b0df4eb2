"""Which tiles a grouped product is cut into: by shapes alone, never by the loads or a tuning file.

Legend: R rows, P paths, M rows of a tile, N features out of a tile, K features in of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """One way to cut a grouped product; `grouped_gemm` has the kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    """The weight is the left operand: few rows then fill the narrow side of the tensor cores."""
    programs_per_sm: int = 1
    flatten: bool = False
    """One pipeline runs through all tiles of a program instead of one for each tile."""
    halves: bool = False
    """A tile leaves in two halves, which takes less shared memory."""
    group_m: int = 16
    """Tiles of rows that share a tile of weights one after another, from the L2 cache."""
    gather: bool = True
    """Read rows where the cells lie; else they are packed first, and fetched as whole boxes."""


@dataclass(frozen=True)
class Strip:
    """What a program of `one_cell` takes at a time: features out, features in of a step."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


# Measured on an H200
def strip_up(num_in: int, *, gated: bool) -> Strip:
    """For the hidden features of one cell."""
    if num_in > _MANY_FEATURES:
        return Strip(4, 512, num_stages=4)
    return Strip(8, 256 if gated else 512, num_stages=4)


def strip_down(num_hidden: int, num_choices: int) -> Strip:
    """For the result of one cell, whose choices are summed together."""
    if num_hidden < _MANY_FEATURES:
        return Strip(4, max(64, 1024 // power_of_two(num_choices)), num_warps=8)
    return Strip(2, max(64, (1024 if num_choices == 1 else 2048) // power_of_two(num_choices)))


def power_of_two(least: int) -> int:
    """The least one that is not below."""
    return 1 << max(least - 1, 0).bit_length()


_MANY_FEATURES = 2048

# Rows a path, on average, up to which reading weights takes longer than computing with them, and
# the rows of a tile then: loads vary around their mean
_STREAMING = ((8, 16), (20, 32), (40, 64), (96, 128))
# Measured on an H200 over the layers of benchmarks/expert_mlp_gpu.py; gated: two products in one
GATED = {
    16: Tile(16, 64, 128, num_warps=4, num_stages=3, swap=True, programs_per_sm=2),
    32: Tile(32, 64, 64, num_warps=4, num_stages=4, swap=True, programs_per_sm=2),
    64: Tile(64, 64, 64, num_warps=4, num_stages=4, swap=True, programs_per_sm=2),
    128: Tile(128, 128, 64, num_warps=8, num_stages=4, swap=True),
}
PLAIN = {
    16: Tile(16, 64, 128, num_warps=4, num_stages=4, swap=True, programs_per_sm=2),
    32: Tile(32, 128, 64, num_warps=4, num_stages=4, swap=True, programs_per_sm=2),
    64: Tile(64, 128, 64, num_warps=4, num_stages=4, swap=True, programs_per_sm=2),
    128: Tile(128, 128, 128, num_warps=4, num_stages=3, swap=True),
}
LARGE_GATED = Tile(128, 128, 64, num_warps=8, num_stages=4)
LARGE_PLAIN = Tile(128, 256, 64, num_warps=8, num_stages=4, flatten=True, halves=True, gather=False)
# Rows that are read for more features out than this, or more rows, are better packed first; and so
# are all before a flat pipeline, which does not read ahead through cells
_GATHERED_FEATURES = 2048
_GATHERED_ROWS = 512


def choose(
    num_rows: int, num_paths: int, weight_rows: int, *, gated: bool, gathers: bool = False
) -> Tile:
    """The tile for R rows in P paths of so many rows of weights; a gated one has two a feature."""
    mean = num_rows / max(num_paths, 1)
    for most, block_m in _STREAMING:
        # Packing rows costs less than gathering them for many features that are not halved
        if mean <= most and (gated or not gathers or block_m < 128):
            return (GATED if gated else PLAIN)[block_m]
    if not gated:
        return LARGE_PLAIN
    few = weight_rows <= _GATHERED_FEATURES and mean <= _GATHERED_ROWS
    return replace(LARGE_GATED, gather=few)


def fit_features_in(tile: Tile, num_in: int) -> Tile:
    """The tile with steps that divide the features in, which boxes of [K, N] must not pass."""
    block_k = tile.block_k
    while num_in % block_k:
        block_k //= 2
    return tile if block_k == tile.block_k else replace(tile, block_k=block_k)
