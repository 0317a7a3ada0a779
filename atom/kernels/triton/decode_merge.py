"""Merging the parts of a request whose keys several programs share.

Of few requests and heads the program that ends last does it, which saves a launch; of many a kernel of its own, as the
registers for it would leave room for fewer programs. Either merges parts in their order, so that results don't depend
on which program came last.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from atom.kernels.triton.decode_split import first_key, split_length
from atom.kernels.triton.launcher import Launcher
from atom.kernels.triton.numerics import round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

MOST_COUNTERS = 1 << 12  # requests x key heads whose parts may be merged by their last program
_PARTS = 16  # merged at a time by the kernel


@cache
def arrivals(device: torch.device) -> torch.Tensor:
    """int32 [MOST_COUNTERS], zeros between launches: how many parts of each request and key head are there.

    Launches share it, so those on one device must run one after another.
    """
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def arrives_last(counter, num_parts):
    """Whether the others of num_parts programs came here before; what they stored until then can be read."""
    tl.debug_barrier()  # all of this program's threads have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1
    if last:
        tl.store(counter, 0)  # for the next launch
    return last


@triton.jit
def merge_parts(
    parts,
    parts_log,
    first_row,
    num_splits,
    num_parts,
    output,
    output_stride_head,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Weighted means of the parts of GROUP query heads, PARTS at a time.

    parts: float32 [rows, HEAD_DIM], parts_log: [rows]; head g's parts are the rows from first_row + g * num_splits on.
    output: the first head's row.
    """
    heads = tl.arange(0, PADDED_GROUP)
    columns = tl.arange(0, PADDED)
    rows = first_row + heads * num_splits
    real = heads < GROUP
    exists = real[:, None] & (columns < HEAD_DIM)[None, :]
    top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, PADDED], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = rows[:, None] + part[None, :]
        wanted = real[:, None] & (part < num_parts)[None, :]
        # Past the first-level cache, which may hold what was there before.
        logs = tl.load(parts_log + at, mask=wanted, other=float("-inf"), cache_modifier=".cg")
        inside = wanted[:, :, None] & (columns < HEAD_DIM)[None, None, :]
        source = parts + at[:, :, None] * HEAD_DIM + columns[None, None, :]
        values = tl.load(source, mask=inside, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(logs, axis=1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # of heads that are not real
        weights = tl.exp2(logs - reference[:, None])
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None] + tl.sum(values * weights[:, :, None], axis=1)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = output + heads[:, None] * output_stride_head + columns[None, :]
    tl.store(target, round_to(acc, output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["fill", "num_splits"])
def _merge_kernel(
    parts,
    parts_log,
    seq_lens,
    output,
    fill,
    num_splits,
    output_stride_token,
    output_stride_head,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (head, request): merges the request's parts, if it has several."""
    let_next_begin(OVERLAP)
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    num_keys = seq_len - first_key(seq_len, WINDOW)
    num_parts = tl.cdiv(num_keys, split_length(num_keys, fill, num_splits, KEYS))
    wait_for_inputs(OVERLAP)  # also where nothing is to merge, so that the next kernel waits for what was attended
    if num_parts <= 1:
        return
    first_row = (request * tl.num_programs(0) + head) * num_splits
    target = output + request * output_stride_token + head * output_stride_head
    merge_parts(
        parts, parts_log, first_row, num_splits, num_parts, target, output_stride_head, 1, 1, HEAD_DIM, PADDED, PARTS
    )


_launch_merge = Launcher(_merge_kernel)


def merge(
    parts: torch.Tensor,
    parts_log: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    fill: int,
    keys: int,
    padded: int,
    sliding_window: int,
    **overlap: bool,
) -> None:
    """parts: float32 [R, Hq, splits, D], parts_log: [R, Hq, splits]; keys: of which parts' lengths are multiples."""
    num_requests, num_heads, splits, head_dim = parts.shape
    _launch_merge(
        (num_heads, num_requests, 1),
        (parts, parts_log, seq_lens, output),
        (fill, splits, output.stride(0), output.stride(1)),
        (keys, head_dim, padded, sliding_window, _PARTS),
        num_warps=2,
        **overlap,
    )


def parts_at_once(padded_group: int, padded_head_dim: int, num_warps: int) -> int:
    """PARTS: so many that a thread holds 64 numbers."""
    return max(1, min(32, 2048 * num_warps // (padded_group * padded_head_dim)))
