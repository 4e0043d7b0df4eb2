"""What each ATen operator does with cells: the table, and nothing is assumed of others."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from brt.cellflow.call import (
    RULES,
    Call,
    Rule,
    broadcast,
    dims_of,
    only,
    product_of,
    rule,
    varies,
)
from brt.cellflow.states import Along, Mixed, State, as_expr, same, size_of, whole

_moves = itertools.count(1)


def find(func: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator; in-place variants have that of their plain form."""
    name = func._schema.name
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return found


@rule("copy", "masked_fill", "where", "_to_copy", "clone", "detach", "alias", "lift_fresh")
@rule("lift_fresh_copy", "contiguous", "fill", "zero", "hardswish")
def pointwise(call: Call) -> State:
    """Every element is made of the elements at its place."""
    out = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    return broadcast(call, call.tensors(), out.ndim)


@rule(
    *("zeros", "ones", "full", "empty", "empty_strided", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor"),
    sizes=True,
)
def filled(call: Call) -> State:
    """All elements are the same: a dim of the number of cells may stand for the cells."""
    value = call.args.get("fill_value", call.args.get("s"))
    if call.axis.mentioned_in(value):
        return Mixed(f"{call.name} uses the number of cells as a value")
    if call.name.endswith("_like"):
        return call.along(call.first())
    ratios = [(d, call.axis.ratio(s)) for d, s in enumerate(call.out.shape)]
    along = [(d, r) for d, r in ratios if r and call.axis.mentioned_in(call.out.shape[d])]
    if len(along) > 1:
        return Mixed(f"{call.name} makes several dims of the number of cells")
    return Along(along[0][0], outer=along[0][1]) if along else None


# Dims that are moved, split and merged


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", sizes=True)
def view(call: Call) -> State:
    """Elements keep their order: the cell is ``index // stride % N``, before and after."""
    found = only(call, call.first())
    if isinstance(found, Mixed):
        return found
    shape, out_shape = list(call.first().shape), list(call.out.shape)
    stride = found.inner * product_of(shape[found.dim + 1 :])
    for dim, size in enumerate(out_shape):
        inside = product_of(out_shape[dim + 1 :])
        inner = whole(stride / inside) if inside != 0 else None
        outer = whole(as_expr(size) / (call.axis.expr * inner)) if inner else None
        if inner and outer:
            return Along(dim, outer, inner, found.moved)
    return Mixed("cells are spread over several dims")


@rule("permute", "transpose", "t")
def transposed(call: Call) -> State:
    """Dims change places."""
    found = only(call, call.first())
    if isinstance(found, Mixed):
        return found
    ndim = call.first().ndim
    if "dims" in call.args:
        order = dims_of(call["dims"], ndim)
    elif "dim0" in call.args:
        order = list(range(ndim))
        a, b = call["dim0"] % ndim, call["dim1"] % ndim
        order[a], order[b] = order[b], order[a]
    else:
        order = list(reversed(range(ndim)))
    return found.at(order.index(found.dim))


@rule("unsqueeze")
def unsqueezed(call: Call) -> State:
    """A dim of size 1 more."""
    found = only(call, call.first())
    if isinstance(found, Mixed):
        return found
    return found.at(found.dim + (call["dim"] % call.out.ndim <= found.dim))


@rule("squeeze")
def squeezed(call: Call) -> State:
    """Dims of size 1 go."""
    x = call.first()
    found = only(call, x)
    if isinstance(found, Mixed):
        return found
    dims = dims_of(call.args.get("dim"), x.ndim)
    gone = [d for d in dims if same(size_of(x, d), 1)]
    if x.ndim - len(gone) != call.out.ndim or found.dim in gone:
        return Mixed("squeezes a dim of cells")
    return found.at(found.dim - sum(d < found.dim for d in gone))


@rule("expand", "repeat", "broadcast_to", sizes=True)
def repeated(call: Call) -> State:
    """Dims are repeated; a constant that is, as often as there are cells, is the same for each."""
    x, out = call.first(), call.out
    lead = out.ndim - x.ndim
    found = call.along(x)
    if found is not None:
        dim = found.dim + lead
        kept = same(size_of(out, dim), size_of(x, found.dim))
        return found.at(dim) if kept else Mixed("repeats cells")
    grown = [d for d in range(out.ndim) if call.axis.mentioned_in(size_of(out, d))]
    if len(grown) != 1:
        return Mixed("repeats along several dims as often as there are cells")
    before = 1 if grown[0] < lead else size_of(x, grown[0] - lead)
    inner = whole(as_expr(before))
    outer = call.axis.ratio(size_of(out, grown[0]) // before) if inner else None
    return Along(grown[0], outer, inner) if outer and inner else Mixed("repeats a constant")


# Parts of a dim, and several tensors in one


@rule("select", "slice", "unbind", "split", "split_with_sizes", sizes=True)
def taken(call: Call) -> State | list[State]:
    """A part, or all parts, of one dim."""
    x = call.first()
    found = only(call, x)
    if isinstance(found, Mixed):
        return found
    dim = call["dim"] % x.ndim
    outs = call.out if isinstance(call.out, (list, tuple)) else [call.out]
    if dim == found.dim:
        whole_dim = len(outs) == 1 and outs[0].ndim == x.ndim
        if whole_dim and same(size_of(outs[0], dim), size_of(x, dim)):
            return found
        return Mixed("takes some of the cells")
    if call.uses_number():
        return Mixed("takes a part that depends on the number of cells")
    return found.at(found.dim - (outs[0].ndim < x.ndim and dim < found.dim)) if outs else found


@rule("cat", "concat")
def joined(call: Call) -> State:
    """Tensors one after another along a dim."""
    tensors = [t for t in call["tensors"] if t.ndim > 1 or not same(t.numel(), 0)]
    found = broadcast(call, tensors, call.out.ndim)
    if isinstance(found, Along) and call["dim"] % call.out.ndim == found.dim:
        return Mixed("concatenates along cells")
    return found


@rule("stack")
def stacked(call: Call) -> State:
    """Tensors side by side along a new dim."""
    tensors = call["tensors"]
    found = broadcast(call, tensors, tensors[0].ndim)
    if not isinstance(found, Along):
        return found
    return found.at(found.dim + (call["dim"] % call.out.ndim <= found.dim))


@rule("flip", "roll")
def moved(call: Call) -> State:
    """Elements change places along dims."""
    x = call.first()
    found = only(call, x)
    if isinstance(found, Mixed):
        return found
    if found.dim not in dims_of(call["dims"], x.ndim):
        return found
    if found.outer != 1 or found.inner != 1 or not call["dims"]:
        return Mixed("moves parts of cells")
    return Along(found.dim, moved=next(_moves))


# Along dims: reductions, and what looks at a whole dim


@rule(
    *("sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all"),
    *("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "nansum"),
    *("median", "nanmedian", "mode", "kthvalue", "count_nonzero", "aminmax"),
)
def reduced(call: Call) -> State:
    """Dims go, or become 1."""
    x = call.first()
    found = only(call, x)
    if isinstance(found, Mixed):
        return found
    dims = dims_of(call.args.get("dim"), x.ndim)
    if found.dim in dims:
        return Mixed(f"{call.name} reduces over cells")
    keepdim = call.args.get("keepdim", False)
    return found if keepdim else found.at(found.dim - sum(d < found.dim for d in dims))


@rule(
    *("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod"),
    *("cummax", "cummin", "logcumsumexp", "sort", "topk", "argsort", "glu", "tril", "triu"),
)
def along_dim(call: Call) -> State:
    """Whole dims are looked at; they stay in their places."""
    x = call.first()
    found = only(call, x)
    if isinstance(found, Mixed):
        return found
    if call.name in ("aten::tril", "aten::triu"):
        dims = [x.ndim - 2, x.ndim - 1]
    else:
        dims = dims_of(call.args.get("dim", -1), x.ndim)
    return Mixed(f"{call.name} works along cells") if found.dim in dims else found


def _lastdims(call: Call, num_dims: int) -> State:
    """The last dims are worked on, each of the others apart."""
    x = call.first()
    found = only(call, x)
    if isinstance(found, Mixed):
        return found
    return found if found.dim < x.ndim - num_dims else Mixed(f"{call.name} works along cells")


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def normalised(call: Call) -> State:
    """The last dims are normalised."""
    return _lastdims(call, len(call["normalized_shape"]))


@rule("native_group_norm", sizes=True)
def group_norm(call: Call) -> State:
    """Channels are normalised in groups, for each row of dim 0."""
    found = only(call, call["input"])
    if isinstance(found, Along) and found.dim != 0:
        return Mixed("group norm works along cells")
    return found


@rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "miopen_batch_norm"),
)
def batch_norm(call: Call) -> State | list[State]:
    """In training, each channel (dim 1) is normalised over all else; in eval, by constants."""
    x = call["input"]
    training = call.args.get("training", call.args.get("train", False))
    training = training or call.args.get("running_mean") is None
    num_more = len(call.out) - 1
    found = call.along(x)
    if found is None:
        return Mixed("batch norm takes cells as its weights")
    per_channel = [t for t in call.tensors() if t is not x]
    if found.dim == 1:  # merged into the channels: instance norm
        ours = Along(0, found.outer, found.inner, found.moved)
        if any(call.along(t) != ours for t in per_channel):
            return Mixed("batch norm takes weights that differ from cell to cell")
    elif training or any(call.along(t) is not None for t in per_channel):
        return Mixed("batch norm in training mode takes the statistics of all cells")
    return [found, *[Mixed("statistics of batch norm")] * num_more]


@rule("convolution", "_convolution", "conv1d", "conv2d", "conv3d")
def convolved(call: Call) -> State:
    """Each row of dim 0 by itself."""
    found = only(call, call["input"])
    if isinstance(found, Along) and (found.dim != 0 or call["input"].ndim != call["weight"].ndim):
        return Mixed("convolves along cells")
    return found


@rule("im2col", "col2im")
def unfolded(call: Call) -> State:
    """Patches of each row of dim 0."""
    x = call.first()
    if x.ndim != (4 if call.name == "aten::im2col" else 3):
        return Mixed(f"{call.name} of one cell works along cells")
    return _lastdims(call, x.ndim - 1)


@rule("max_pool1d", "max_pool1d_with_indices", "avg_pool1d", "adaptive_max_pool1d")
@rule("_adaptive_avg_pool1d", "reflection_pad1d", "replication_pad1d", "upsample_nearest1d")
@rule("upsample_linear1d", "_upsample_nearest_exact1d")
def over_last(call: Call) -> State:
    """One spatial dim."""
    return _lastdims(call, 1)


@rule("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "adaptive_max_pool2d")
@rule("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "reflection_pad2d", "replication_pad2d")
@rule("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa")
@rule("_upsample_bilinear2d_aa", "_upsample_nearest_exact2d")
def over_last_two(call: Call) -> State:
    """Two spatial dims."""
    return _lastdims(call, 2)


@rule("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "pixel_shuffle")
@rule("pixel_unshuffle", "replication_pad3d", "reflection_pad3d", "upsample_nearest3d")
@rule("channel_shuffle", "native_channel_shuffle", "upsample_trilinear3d")
def over_last_three(call: Call) -> State:
    """Three dims: spatial ones, or channels with two of them."""
    return _lastdims(call, 3)


@rule("constant_pad_nd", "pad")
def padded(call: Call) -> State:
    """The last dims grow."""
    return _lastdims(call, len(call["pad"]) // 2)


@rule("unfold")
def windows(call: Call) -> State:
    """Windows of one dim, whose places become the last dim."""
    found = only(call, call.first())
    if isinstance(found, Along) and call["dimension"] % call.first().ndim == found.dim:
        return Mixed("windows over cells")
    return found


# Products


def _matrix_product(call: Call, a: Tensor, b: Tensor) -> State:
    """``[..., n, k] @ [..., k, m]`` of equal batch dims."""
    of_a, of_b = call.along(a), call.along(b)
    batch = a.ndim - 2
    found = of_a if of_a is not None else of_b
    assert found is not None
    for along, tensor in ((of_a, a), (of_b, b)):
        if found.dim < batch:
            if along is None and varies(tensor, found.dim):
                return Mixed(f"{call.name} takes a constant that differs from cell to cell")
            if along is not None and along != found:
                return Mixed(f"{call.name} combines cells that lie in different places")
    if found.dim < batch:
        return found
    if of_a is not None and of_b is not None:
        return Mixed(f"{call.name} multiplies cells with cells")
    if found.dim == (batch if of_a is not None else batch + 1):
        return found
    return Mixed(f"{call.name} sums over cells")


@rule("mm", "bmm", "_int_mm")
def multiplied(call: Call) -> State:
    """A product of matrices, or of each of a batch."""
    a, b = call.tensors()[:2]
    return _matrix_product(call, a, b)


@rule("addmm", "baddbmm")
def multiplied_and_added(call: Call) -> State:
    """A product, and something that is broadcast to it."""
    added, a, b = call.tensors()[:3]
    carries = call.along(a) is not None or call.along(b) is not None
    found: State = _matrix_product(call, a, b) if carries else None
    if isinstance(found, Mixed):
        return found
    of_added = call.along(added)
    lead = call.out.ndim - added.ndim
    if of_added is not None:
        here = of_added.at(of_added.dim + lead)
        return here if here == found else Mixed(f"{call.name} adds cells in another place")
    if found is not None and varies(added, found.dim - lead):
        return Mixed(f"{call.name} takes a constant that differs from cell to cell")
    return found


@rule("linear")
def linear(call: Call) -> State:
    """The last dim becomes another."""
    found = only(call, call["input"])
    if isinstance(found, Along) and found.dim == call["input"].ndim - 1:
        return Mixed("linear sums over cells")
    return found


@rule("mv")
def vectorproduct(call: Call) -> State:
    """A matrix times a vector."""
    found = only(call, call["self"])
    return Mixed("mv sums over cells") if isinstance(found, Along) and found.dim != 0 else found


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
)
def attention(call: Call) -> State | list[State]:
    """Batch and heads (dims 0 and 1) apart, tokens together."""
    query, key, value = call["query"], call["key"], call["value"]
    masks: list[Tensor] = [
        m for m in map(call.args.get, ("attn_mask", "attn_bias")) if m is not None
    ]
    if call.args.get("dropout_p"):
        return Mixed("attention drops at random")
    batch = query.ndim - 2
    found = broadcast(call, [query, key, value, *masks], query.ndim)
    if not isinstance(found, Along):
        return found
    if found.dim >= batch or not same(size_of(query, found.dim), size_of(key, found.dim)):
        return Mixed("attention looks at all cells")
    return [found, *[Mixed("by-products of attention")] * (len(call.out) - 1)]


# Look-ups


@rule("embedding")
def looked_up(call: Call) -> State:
    """A row of the table for each index."""
    return only(call, call["indices"])


@rule("index_select")
def rows_selected(call: Call) -> State:
    """Places along one dim."""
    x, index = call["self"], call["index"]
    of_x, of_index = call.along(x), call.along(index)
    dim = call["dim"] % max(x.ndim, 1)
    if of_x is None:
        assert of_index is not None
        return of_index.at(dim)
    if of_index is not None:
        return Mixed("which cells are taken depends on cells")
    if dim != of_x.dim:
        return of_x
    return Mixed("takes some of the cells")


@rule("gather", "scatter", "scatter_add", "scatter_reduce")
def gathered(call: Call) -> State:
    """Places along one dim, for each place in the others."""
    x = call["self"]
    tensors = call.tensors()
    found = broadcast(call, tensors, x.ndim)
    if not isinstance(found, Along):
        return found
    if any(t.ndim != x.ndim for t in tensors):
        return Mixed(f"{call.name} takes tensors of different rank")
    if any(not same(size_of(t, found.dim), size_of(x, found.dim)) for t in tensors):
        return Mixed("takes some of the cells")
    return Mixed(f"{call.name} works along cells") if call["dim"] % x.ndim == found.dim else found


@rule("index", "_unsafe_index")
def indexed(call: Call) -> State:
    """Places along some dims, by integer tensors that are broadcast to each other."""
    x, indices = call["self"], list(call["indices"])
    at = [d for d, index in enumerate(indices) if index is not None]
    given = [indices[d] for d in at]
    if any(t.dtype in (torch.bool, torch.uint8) for t in given):
        return Mixed("how many rows are taken depends on cells")
    num_index_dims = max(t.ndim for t in given)
    together = at == list(range(at[0], at[0] + len(at)))
    front = at[0] if together else 0
    of_x, of_indices = call.along(x), broadcast(call, given, num_index_dims)
    if isinstance(of_indices, Mixed):
        return of_indices
    if of_x is None:
        assert of_indices is not None
        return of_indices.at(front + of_indices.dim)
    if of_indices is not None:
        return Mixed("which elements are taken depends on cells")
    if of_x.dim in at:
        return Mixed("takes some of the cells")
    kept_before = of_x.dim - sum(d < of_x.dim for d in at)
    return of_x.at(kept_before + (num_index_dims if kept_before >= front else 0))
