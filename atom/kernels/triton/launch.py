"""Launch parameters: a static table for each kind of chip, nothing is searched at run time."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton

# "interpret": kernels run in numpy on a CPU (TRITON_INTERPRET=1), where large tiles cost the least.
Chip = Literal["hopper", "cdna3", "interpret"]
CHIP: Chip = "interpret" if triton.knobs.runtime.interpret else "cdna3" if torch.version.hip else "hopper"


@dataclass(frozen=True, slots=True)
class Tile:
    """rows x columns of a program's inner tile, and how the compiler should schedule it."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of a GPU; a small number in the interpreter."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlap_options(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels with OVERLAP: they may begin before the last kernel of the stream has ended.

    Programmatic dependent launch, of Hopper and later. Such a kernel calls `wait_for_inputs` before it writes and
    before it reads what another such kernel may have written: weights, and what the step is told of its requests, it
    may read at once. Some program must wait before it ends, as the kernel after this one waits for this one alone.
    """
    hopper = CHIP == "hopper" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if hopper else {"OVERLAP": False}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


_ROW_TILE = 4096  # elements a program holds at least; of short rows several


def row_tile(num_rows: int, size: int) -> tuple[int, int, int]:
    """(rows of a program that holds whole ones, padded columns, warps)."""
    columns = next_power_of_2(size)
    # Few rows: one each, so that all multiprocessors get some. Only two cases, so only two compilations.
    rows = max(1, _ROW_TILE // columns) if num_rows >= 4096 else 1
    return rows, columns, min(max(rows * columns // 512, 1), 16)


def wide_row_warps(num_rows: int) -> int:
    """Of a program that computes much for each of more than 8192 columns."""
    # A row with a multiprocessor of its own takes all threads; of many, one is read while others are computed.
    return 32 if CHIP == "hopper" and num_rows <= 132 else 8


@cache
def decode_tile(head_dim: int, itemsize: int, cache_itemsize: int, whole_parts: bool) -> Tile:
    """Query heads are padded to `rows`; `columns` keys are read at a time. head_dim is a power of two.

    whole_parts: programs are few and so are most programs' keys.
    """
    if CHIP == "interpret":
        return Tile(16, 64, 4, 1)
    if CHIP == "hopper" and cache_itemsize == 1 and head_dim <= 128:
        return Tile(16, 128, 4, 3)
    if CHIP == "hopper" and whole_parts and head_dim * itemsize <= 256:
        return Tile(16, 128, 4, 1)  # all of the shortest part
    columns = 64 if head_dim * itemsize <= 256 else 32 if head_dim * itemsize <= 512 else 16
    if CHIP == "cdna3":
        return Tile(16, columns, 4, 2 if head_dim * itemsize <= 256 else 1)
    return Tile(16, columns, 4, 3 if itemsize <= 2 else 2)


@cache
def decode_rows_tile(fills_chip: bool) -> Tile:
    """For `decode_rows_kernel`: `columns` keys at a time; fills_chip: without splitting requests."""
    if CHIP == "interpret":
        return Tile(1, 64, 4, 1)
    return Tile(1, 16, 1, 2) if fills_chip else Tile(1, 32, 2, 2)


# For `decode_float8_kernel`: `columns` keys at a time, a multiple of 16 for each warp.
DECODE_FLOAT8_TILE = Tile(8, 32, 2, 1)


@cache
def prefill_tile(head_dim: int, itemsize: int, fills_chip: bool) -> Tile:
    """rows = query tokens x heads of a group; columns = keys. head_dim is a power of two."""
    if CHIP == "interpret":
        return Tile(64, 64, 4, 1)
    if itemsize > 2:  # float32 multiplies without tensor cores, in registers
        return Tile(32, 32, 4, 1) if head_dim <= 128 else Tile(16, 32, 4, 1)
    if CHIP == "cdna3":  # 64 KiB of shared memory
        return Tile(128, 64, 4, 1) if head_dim <= 128 else Tile(64, 32, 4, 1)
    if head_dim <= 64:
        return Tile(128, 128, 8, 3)
    if head_dim <= 128:
        return Tile(128, 32, 4, 4) if fills_chip else Tile(128, 64, 8, 3)
    return Tile(128, 64, 8, 2)


@dataclass(frozen=True, slots=True)
class VectorTile:
    """Output rows of a program of a matrix-vector product, and how much of each it reads at a time."""

    rows: int
    columns: int
    num_warps: int


@cache
def vector_tile(itemsize: int, num_outputs: int) -> VectorTile:
    """num_outputs: sums held for each row, 2 when gate and up rows are read side by side."""
    if CHIP == "interpret":
        return VectorTile(16, 128, 4)
    return VectorTile(num_outputs, 1024 if itemsize <= 2 else 512, 4)


@cache
def expert_vector_tile(itemsize: int, size: int) -> VectorTile:
    """For one expert's matrix-vector product over `size` columns."""
    if CHIP == "interpret":
        return VectorTile(16, 128, 4)
    columns = min(next_power_of_2(size), 1024 if itemsize <= 2 else 512)
    return VectorTile(2, columns, 4 if columns >= 512 else 2)


@cache
def experts_vector_tile(itemsize: int, choices: int) -> VectorTile:
    """For the products of several experts at once, the same rows of each."""
    if CHIP == "interpret":
        return VectorTile(16, 128, 4)
    return VectorTile(max(1, 32 // next_power_of_2(choices)), 256 if itemsize <= 2 else 128, 8)


@dataclass(frozen=True, slots=True)
class GemmTile:
    """m x n x k of a matrix product's inner tile."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@cache
def gemm_tile(num_tokens: int, itemsize: int, num_outputs: int) -> GemmTile:
    """For a dense product; num_outputs: accumulators held at once."""
    if CHIP == "interpret":
        return GemmTile(16, 64, 64, 4, 1)
    if itemsize > 2:
        return GemmTile(16, 32, 64, 4, 3 if CHIP == "hopper" else 1)
    if num_tokens <= 16:
        if num_outputs > 1:
            return GemmTile(16, 32, 128, 4, 3 if CHIP == "hopper" else 2)
        return GemmTile(16, 32, 256, 4, 5) if CHIP == "hopper" else GemmTile(16, 32, 128, 4, 2)
    if num_tokens <= 64:
        return GemmTile(64, 64, 128, 4, 3) if CHIP == "hopper" else GemmTile(64, 64, 64, 4, 2)
    return GemmTile(128, 256 // num_outputs, 64, 8, 3) if CHIP == "hopper" else GemmTile(128, 128, 32, 8, 2)


@cache
def quant_gemm_tile(num_tokens: int, num_rows: int) -> GemmTile:
    """For a dense product of operands in eight bits; k is the group of columns that share a scale."""
    if CHIP == "interpret":
        return GemmTile(16, 64, 128, 4, 1)
    if num_tokens <= 16:
        return GemmTile(16, 32, 128, 4, 6 if CHIP == "hopper" else 2)
    if CHIP == "cdna3":
        return GemmTile(64, 64, 128, 4, 2) if num_tokens <= 64 else GemmTile(128, 128, 128, 8, 2)
    if num_tokens <= 64:
        return GemmTile(64, 64, 128, 4, 4) if num_rows >= 16384 else GemmTile(64, 32, 128, 4, 7)
    # Two programs to a multiprocessor: one scales while the other multiplies.
    if -(-num_tokens // 64) * -(-num_rows // 128) > 132:
        return GemmTile(64, 128, 128, 4, 4)
    return GemmTile(128, 64, 128, 8, 4)


@cache
def grouped_gemm_tile(rows_per_group: int, itemsize: int, num_outputs: int) -> GemmTile:
    """rows_per_group: expected, rounded up to a power of two; num_outputs: accumulators held at once."""
    if CHIP == "interpret":
        return GemmTile(16, 64, 64, 4, 1)
    if itemsize > 2:
        return GemmTile(16, 64, 32, 4, 2 if CHIP == "hopper" else 1)
    stages = 4 if CHIP == "hopper" else 2
    if rows_per_group <= 16:
        return GemmTile(16, 64, 128 if CHIP == "hopper" else 64, 4, stages)
    if rows_per_group <= 64:
        return GemmTile(64, 64 if num_outputs > 1 else 128, 64, 4, stages)
    return GemmTile(128, 128 // num_outputs, 64, 8, stages if CHIP == "cdna3" else 3)
