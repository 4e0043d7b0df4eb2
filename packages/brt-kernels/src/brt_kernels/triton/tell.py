"""How a Triton kernel tells of a bad index: as those of the CUDA library do.

Legend: P paths.
"""

# No postponed annotations here: Triton reads them. mypy does not see what its decorator makes.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def tell(errors, where, bad, value, bound, position):
    """Keep the first bad index as the CUDA library does: see csrc/cuda/device_error.cuh."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred bad, first;
        .reg .b32 taken;
        .reg .b64 found;
        setp.ne.b32 bad, $1, 0;
        mov.b32 taken, 1;
        @bad atom.global.cas.b32 taken, [$2], 0, 1;
        setp.eq.b32 first, taken, 0;
        @first ld.global.b64 found, [$2 + 8];
        @first st.volatile.global.b64 [found + 8], $4;
        @first st.volatile.global.b64 [found + 16], $5;
        @first st.volatile.global.b64 [found + 24], $6;
        @first fence.acq_rel.sys;
        @first st.volatile.global.b32 [found], $3;
        mov.b32 $0, taken;
        }""",
        "=r,r,l,r,l,l,l",
        [
            bad.to(tl.int32),
            errors,
            where,
            value.to(tl.int64),
            tl.zeros((), tl.int64) + bound,  # a number that is 1 is no tensor
            position.to(tl.int64),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def tell_offsets(errors, where, offsets_P1, num_rows, num_paths, here, PATHS: tl.constexpr):
    """Tell of offsets that do not rise from 0 to at most the number of rows, if ``here``."""
    p = tl.arange(0, PATHS)
    mask = (p < num_paths) & here
    begin = tl.load(offsets_P1 + p, mask=mask, other=0)
    end = tl.load(offsets_P1 + p + 1, mask=mask, other=0)
    bad = ((end < begin) | (end > num_rows)) & mask
    tell(errors, where, bad, end, num_rows, p + 1)
    bad = ((begin < 0) | (begin > num_rows)) & mask & (p == 0)
    tell(errors, where, bad, begin, num_rows, p)
