"""Every operation in plain torch: the specification that each kernel is tested against.

Nothing here waits for the device, except `grouped_linear` and what is built on it, which loop
over the paths with sizes on the host.

Legend: N cells, R routed rows, K choices per cell, P paths, E entries (n, k) of a choice,
G groups of cells, S trailing cell dims, I O H D feature sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from brt import checks
from brt.conv_steps import image_shape, unflatten_branch
from brt.errors import KernelError
from brt.path_conv import activate_image, extra_of, unflatten_convs

# Above this many choices a cell, `combine` walks rows on CPU instead of choices.
_MANY_CHOICES = 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def route(
    choice_NK: Tensor,
    num_paths: int,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn choices into rows grouped by path: (cell_R, slot_R, row_NK, offsets_P1), all int64.

    Rows of path p lie at ``[offsets[p], offsets[p + 1])``, in cell order. Where ``capacity`` binds,
    first choices of all cells come before second choices, then cells of higher priority, then
    earlier cells; it counts within groups of ``group_size`` consecutive cells (0: one group).
    ``multiple`` pads every path; padding rows, and rows past the last offset, are -1. A choice
    of -1 is none; others outside ``[0, P)`` are an error (on CUDA at the next `brt.check`).
    R = N * K, plus P * (multiple - 1) where paths are padded.
    """
    num_cells, num_choices = choice_NK.shape
    device = choice_NK.device
    path_E = choice_NK.reshape(-1).to(torch.int64)
    there_E = (path_E >= 0) & (path_E < num_paths)
    checks.check_values(
        (there_E | (path_E == -1)).all(),
        "route: choices must be paths, or -1 for none",
        detail=lambda: _first_bad(path_E, num_paths),
        error=KernelError,
    )
    path_E = torch.where(there_E, path_E, -1)
    if capacity is not None:
        path_E = _drop_overflow(
            path_E, (num_cells, num_choices), num_paths, capacity, priority_N, group_size
        )
    num_entries = num_cells * num_choices
    num_rows = num_entries + num_paths * (multiple - 1)

    # Sort entries by path, those of no path last; count them
    key_E = torch.where(path_E < 0, num_paths, path_E)
    order_E = torch.argsort(key_E, stable=True)
    count = torch.zeros(num_paths + 1, dtype=torch.int64, device=device)
    count.scatter_add_(0, key_E, torch.ones_like(key_E))
    load_P = count[:num_paths]
    padded_P = load_P if multiple == 1 else (load_P + multiple - 1) // multiple * multiple
    offsets_P1 = torch.zeros(num_paths + 1, dtype=torch.int64, device=device)
    torch.cumsum(padded_P, 0, out=offsets_P1[1:])

    # Row of each sorted entry; entries of no path go to a row that is cut off
    first_P = torch.cumsum(load_P, 0) - load_P
    sorted_key_E = key_E.index_select(0, order_E)
    path_or_last_E = sorted_key_E.clamp(max=num_paths - 1) if num_paths else sorted_key_E
    rank_E = torch.arange(num_entries, device=device) - first_P.index_select(0, path_or_last_E)
    row_E = offsets_P1.index_select(0, path_or_last_E) + rank_E
    row_E = torch.where(sorted_key_E == num_paths, num_rows, row_E)

    slot_R = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
    slot_R.scatter_(0, row_E, order_E)
    slot_R = slot_R[:num_rows].clone()
    row_NK = torch.empty(num_entries, dtype=torch.int64, device=device)
    row_NK.scatter_(0, order_E, torch.where(sorted_key_E == num_paths, -1, row_E))
    cell_R = torch.div(slot_R, max(num_choices, 1), rounding_mode="floor")
    return cell_R, slot_R, row_NK.view(num_cells, num_choices), offsets_P1


def _first_bad(path_E: Tensor, num_paths: int) -> str:
    position = int(((path_E < -1) | (path_E >= num_paths)).nonzero()[0])
    return f"choice_NK must be in [-1, {num_paths}), got {path_E[position]} at position {position}"


def _drop_overflow(
    path_E: Tensor,
    sizes_NK: tuple[int, int],
    num_paths: int,
    capacity: Sequence[int],
    priority_N: Tensor | None,
    group_size: int,
) -> Tensor:
    """The path of each entry, -1 where the path has no room for it."""
    num_cells, num_choices = sizes_NK
    device = path_E.device
    # Filled in place: a tensor made of a list would wait for the device
    limit_P = torch.full((num_paths,), capacity[0], dtype=torch.int64, device=device)
    for p, limit in enumerate(capacity):
        if limit != capacity[0]:
            limit_P[p] = limit
    group_size = group_size or max(num_cells, 1)
    num_groups = -(-num_cells // group_size)

    # Entries in the order in which they are served: choice, priority, cell
    cell_N = torch.arange(num_cells, device=device)
    if priority_N is not None:
        cell_N = torch.argsort(priority_N, descending=True, stable=True)
    choice_K = torch.arange(num_choices, device=device)
    served_E = (cell_N[None, :] * num_choices + choice_K[:, None]).reshape(-1)

    # Rank of each entry within its path and group
    path_served_E = path_E.index_select(0, served_E)
    group_E = torch.div(served_E, num_choices * group_size, rounding_mode="floor")
    segment_E = torch.where(
        path_served_E < 0, num_paths * num_groups, path_served_E * num_groups + group_E
    )
    order_E = torch.argsort(segment_E, stable=True)
    segment_E = segment_E.index_select(0, order_E)
    count = torch.zeros(num_paths * num_groups + 1, dtype=torch.int64, device=device)
    count.scatter_add_(0, segment_E, torch.ones_like(segment_E))
    first = torch.cumsum(count, 0) - count
    rank_E = torch.arange(path_E.numel(), device=device) - first.index_select(0, segment_E)

    entry_E = served_E.index_select(0, order_E)
    path_kept_E = path_E.index_select(0, entry_E)
    kept_E = rank_E < limit_P.index_select(0, path_kept_E.clamp(min=0))
    return torch.empty_like(path_E).scatter_(0, entry_E, torch.where(kept_E, path_kept_E, -1))


def route_mask(
    mask_NP: Tensor,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` for a mask ``[N, P]``: cell n goes to every path p with ``mask[n, p]``; K = P."""
    num_paths = mask_NP.shape[1]
    path_P = torch.arange(num_paths, device=mask_NP.device)
    choice_NP = torch.where(mask_NP != 0, path_P, -1)
    return route(choice_NP, num_paths, capacity, priority_N, group_size, multiple)


def dispatch(
    x_NS: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """``rows[r] = weight[r] * x[cell[r]]``, zero where ``cell[r]`` is -1; rows ``[R, *S]``."""
    num_rows = cell_R.shape[0]
    if x_NS.shape[0] == 0 or num_rows == 0:
        return x_NS.new_zeros((num_rows, *x_NS.shape[1:]))
    rows_RS = x_NS.index_select(0, cell_R.clamp(min=0))
    if weight_R is not None:
        rows_RS = (rows_RS * _along_rows(weight_R.to(_wide(x_NS)), x_NS)).to(x_NS.dtype)
    if x_NS.device.type == "cpu" and not bool((cell_R < 0).any()):
        return rows_RS
    return rows_RS.masked_fill_(_along_rows(cell_R < 0, x_NS), 0)


def combine(
    rows_RS: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """``out[n] = sum_k weight[row[n, k]] * rows[row[n, k]]`` over ``row[n, k] >= 0``; ``[N, *S]``.

    ``cell_R`` must be the inverse of ``row_NK``: the cell that owns each row, -1 for none. Sums in
    float32 (float64 rows: in float64); the result has the dtype of the rows. Deterministic: no
    atomics.
    """
    num_cells, num_choices = row_NK.shape
    out_NS = rows_RS.new_zeros((num_cells, *rows_RS.shape[1:]), dtype=_wide(rows_RS))
    if rows_RS.shape[0] == 0 or num_cells == 0:
        return out_NS.to(rows_RS.dtype)
    if num_choices > _MANY_CHOICES and rows_RS.device.type == "cpu":
        there_R = cell_R >= 0
        cells, part = cell_R[there_R], rows_RS[there_R].to(out_NS.dtype)
        if weight_R is not None:
            part = part * _along_rows(weight_R[there_R].to(part.dtype), part)
        return out_NS.index_add_(0, cells, part).to(rows_RS.dtype)
    for k in range(num_choices):
        row_N = row_NK[:, k]
        index_N = row_N.clamp(min=0)
        part = rows_RS.index_select(0, index_N).to(out_NS.dtype)
        if weight_R is not None:
            part = part * _along_rows(weight_R.index_select(0, index_N).to(part.dtype), part)
        out_NS += part.masked_fill_(_along_rows(row_N < 0, part), 0)
    return out_NS.to(rows_RS.dtype)


def row_dot(rows_RS: Tensor, cells_NS: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
    """``out[r] = <rows[r], cells[cell[r]]>``, zero where ``cell[r]`` is -1; ``[R]``.

    The gradient of a row's weight. Sums in float32 (float64: in float64); that is its dtype.
    """
    wide = _wide(rows_RS)
    if cells_NS.shape[0] == 0 or rows_RS.shape[0] == 0:
        return rows_RS.new_zeros(rows_RS.shape[0], dtype=wide)
    picked_RS = cells_NS.index_select(0, cell_R.clamp(min=0))
    dot_R = rows_RS.to(wide) * picked_RS.to(wide)
    if dot_R.ndim > 1:
        dot_R = dot_R.flatten(1).sum(1)
    return dot_R.masked_fill_(cell_R < 0, 0)


def path_sizes(offsets_P1: Tensor) -> list[Tensor]:
    """P empty tensors ``[load_p, 0]``: loads on the host, as shapes, by one read of the device."""
    loads = offsets_P1.diff().tolist()
    return [offsets_P1.new_empty((load, 0)) for load in loads]


def compact(keep_N: Tensor) -> tuple[Tensor, Tensor]:
    """(index_N, count_1): the indices where ``keep`` holds, in order, then -1; their number."""
    num_cells = keep_N.shape[0]
    keep = keep_N != 0
    place_N = torch.cumsum(keep, 0) - 1
    index = torch.full((num_cells + 1,), -1, dtype=torch.int64, device=keep_N.device)
    cell_N = torch.arange(num_cells, device=keep_N.device)
    index.scatter_(0, torch.where(keep, place_N, num_cells), torch.where(keep, cell_N, -1))
    return index[:num_cells].clone(), keep.sum().reshape(1)


def grouped_linear(
    x_RI: Tensor,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Rows of path p times ``weight[p].T`` plus ``bias[p]``, activated; ``[R, O]``.

    Rows past the last offset are zero.
    """
    act = ACTIVATIONS[activation]
    offsets = offsets_P1.tolist()
    out_RO = x_RI.new_zeros((x_RI.shape[0], weight_POI.shape[1]))
    for p, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop > start:
            bias = None if bias_PO is None else bias_PO[p]
            out_RO[start:stop] = act(F.linear(x_RI[start:stop], weight_POI[p], bias))
    return out_RO


def grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
    """``out[p] = y_p.T @ x_p`` over the rows of path p: the gradient of weights; ``[P, O, I]``."""
    offsets = offsets_P1.tolist()
    out_POI = x_RI.new_zeros((len(offsets) - 1, y_RO.shape[1], x_RI.shape[1]))
    for p, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop > start:
            torch.mm(y_RO[start:stop].t(), x_RI[start:stop], out=out_POI[p])
    return out_POI


def expert_mlp(
    x_ND: Tensor,
    cell_R: Tensor,
    row_NK: Tensor,
    offsets_P1: Tensor,
    weight_R: Tensor | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
) -> Tensor:
    """Dispatch, ``down[p] @ act(up[p] @ x + up_bias[p]) + down_bias[p]``, weighted combine.

    ``activation`` "swiglu" takes ``up`` of 2H rows, gate first: ``silu(gate) * up``. ``[N, D]``.
    """
    rows_RD = dispatch(x_ND, cell_R, row_NK, None)
    if activation == "swiglu":
        gate_RH, up_RH = grouped_linear(rows_RD, offsets_P1, up_PHD, up_bias_PH).chunk(2, 1)
        hidden_RH = F.silu(gate_RH) * up_RH
    else:
        hidden_RH = grouped_linear(rows_RD, offsets_P1, up_PHD, up_bias_PH, activation)
    out_RD = grouped_linear(hidden_RH, offsets_P1, down_PDH, down_bias_PD)
    return combine(out_RD, row_NK, cell_R, weight_R)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums run."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype


def _along_rows(values_R: Tensor, like: Tensor) -> Tensor:
    return values_R.view(-1, *([1] * (like.ndim - 1)))


def conv_chain(
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """Branch p's steps, one after another, on the rows of path p; ``[R, C', H', W']``.

    A step is nine integers (see `brt.conv_steps.ConvStep`) and a scale:
    ``dst = shuffle(post(act(conv(src) + bias) * scale + add))``. Rows past the last offset are
    zero.
    """
    offsets = offsets_P1.tolist()
    made = []
    for p, (start, stop) in enumerate(itertools.pairwise(offsets)):
        branch = unflatten_branch(steps, scales, step_offsets_P1[p], step_offsets_P1[p + 1])
        registers = {0: x_RCHW[start:stop]}
        for step in branch:
            weight = params[step.weight]
            bias = None if step.bias < 0 else params[step.bias]
            image = F.conv2d(registers[step.src], weight, bias, padding=weight.shape[-1] // 2)
            if step.act == 1:
                image = F.relu(image)
            elif step.act == 2:
                image = F.prelu(image, params[step.slope])
            if step.scale != 1.0:
                image = image * step.scale
            if step.add >= 0:
                image = registers[step.add] + image
            if step.post:
                image = F.relu(image)
            # torch's pixel shuffle has no backward for zero rows; `_shuffle` has
            registers[step.dst] = _shuffle(image, step.shuffle)
        made.append(registers[branch[-1].dst])
    rest = x_RCHW.shape[0] - offsets[-1]
    first = unflatten_branch(steps, scales, 0, step_offsets_P1[1])
    made.append(x_RCHW.new_zeros((rest, *image_shape(x_RCHW, params, first))))
    return torch.cat(made)


def conv_chain_backward(
    grad_RCHW: Tensor,
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    """Gradients of `conv_chain` in the rows and in every parameter: the steps, computed again."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x_RCHW, *params)]
        out = conv_chain(inputs[0], offsets_P1, inputs[1:], steps, step_offsets_P1, scales)
        grads = torch.autograd.grad(out, inputs, grad_RCHW, allow_unused=True)
    return [
        torch.zeros_like(t) if grad is None else grad for t, grad in zip(inputs, grads, strict=True)
    ]


def grouped_conv2d(
    x_P: Sequence[Tensor],
    weight_P: Sequence[Tensor],
    extras: Sequence[Tensor],
    convs: Sequence[int],
    activation: str,
) -> list[Tensor]:
    """``act(conv2d(x[p], weight[p], bias) + residual)`` for every path p, contiguous.

    ``convs`` has six integers a path (see `brt.path_conv.PathConv`).
    """
    made = []
    for x, weight, conv in zip(x_P, weight_P, unflatten_convs(convs), strict=True):
        bias = extra_of(extras, conv.bias)
        image = F.conv2d(x, weight, bias, conv.stride, conv.padding, 1, conv.groups)
        if conv.residual >= 0:
            image = image + extras[conv.residual]
        slope = extra_of(extras, conv.slope)
        made.append(activate_image(image, activation, slope).contiguous())
    return made


def _shuffle(image: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return image
    apart = image.unflatten(1, (-1, factor, factor))
    return apart.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
