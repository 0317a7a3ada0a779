"""Reads the weights of a GGUF file under the names and in the layout of the Hugging Face checkpoint.

Architectures: llama (with Mistral and Mixtral), qwen2, qwen3, qwen3moe. Types: F32, F16, BF16, F64 and whatever the
`gguf` package dequantizes (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, the K-quants, ...).
"""

import math
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atom.model_loader.checkpoint import CheckpointFile, CheckpointTensor, FileSpan
from atom.utils.errors import ModelLoadError
from atom.utils.gguf_file import GGUFFile, GGUFTensor, read_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# (module of the router, {GGUF part: checkpoint part}) of the two spellings of a mixture of experts
_MIXTRAL = ("block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"})
_QWEN_MOE = ("mlp", {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"})

_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+?)(?:\.(\d+))?\.(weight|bias)")
_EXPERTS = re.compile(r"ffn_(gate|down|up)(_exps)?")
# Written by llama.cpp's converter for Llama 3; the config's rope parameters say the same.
_COMPUTED = {"rope_freqs.weight"}
_CHUNK_BYTES = 1 << 17  # of quantized data at a time: the float32 temporaries stay in the cache


def read_gguf_tensors(path: str | Path, dtype: torch.dtype) -> Iterator[CheckpointTensor]:
    """Every weight of the file, dequantized to `dtype` when asked for.

    Raises ModelLoadError for an unsupported architecture or tensor type, and for a truncated file.
    """
    file = read_gguf(path)
    if file.architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"GGUF file {path}: architecture {file.architecture!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    source = CheckpointFile(path)
    data = np.memmap(path, mode="c", dtype=np.uint8)  # copy-on-write: torch dislikes read-only arrays
    moe = _QWEN_MOE if file.architecture == "qwen3moe" else _MIXTRAL
    for tensor in file.tensors.values():
        if tensor.name in _COMPUTED:
            continue
        raw = _Raw(source, data, tensor, dtype)
        if tensor.name in _TOP:
            yield raw.whole(_TOP[tensor.name])
            continue
        match = _BLOCK.fullmatch(tensor.name)
        if match is None:
            yield raw.whole(tensor.name)  # the loader reports it as surplus
            continue
        layer, part, expert, kind = match.groups()
        prefix = f"model.layers.{layer}"
        experts = _EXPERTS.fullmatch(part)
        if part == "ffn_gate_inp":
            yield raw.whole(f"{prefix}.{moe[0]}.gate.{kind}")
        elif experts and experts[2]:  # all experts in one tensor
            for index in range(tensor.shape[0]):
                yield raw.expert(index, f"{prefix}.{moe[0]}.experts.{index}.{moe[1][experts[1]]}.{kind}")
        elif experts and expert is not None:  # one tensor an expert, as older files have it
            yield raw.whole(f"{prefix}.{moe[0]}.experts.{expert}.{moe[1][experts[1]]}.{kind}")
        elif part in _LAYER:
            heads = _interleaved_heads(file, part)
            if heads is not None and tensor.shape[0] % (2 * heads):
                raise ModelLoadError(
                    f"GGUF file {path}: {tensor.name} {list(tensor.shape)} doesn't divide into {heads} heads"
                )
            yield raw.whole(f"{prefix}.{_LAYER[part]}.{kind}", heads)
        else:
            yield raw.whole(tensor.name)


class _Raw:
    """A tensor's bytes in the mapped file."""

    def __init__(self, source: CheckpointFile, data: np.ndarray, tensor: GGUFTensor, dtype: torch.dtype) -> None:
        import gguf

        path = source.path
        try:
            self.kind = gguf.GGMLQuantizationType(tensor.ggml_type)
            block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
            _check_decodable(self.kind)
        except (ValueError, KeyError, NotImplementedError):
            kind = getattr(getattr(self, "kind", None), "name", f"number {tensor.ggml_type}")
            raise ModelLoadError(
                f"GGUF file {path}: {tensor.name} has the type {kind}, which can't be decoded; "
                "use F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or a K-quant"
            ) from None
        if 0 in (tensor.shape or (0,)) or tensor.shape[-1] % block:
            raise ModelLoadError(
                f"GGUF file {path}: {tensor.name} {list(tensor.shape)} doesn't divide into {self.kind.name} blocks"
            )
        size = math.prod(tensor.shape) // block * block_bytes
        end = tensor.offset + size
        if end > len(data):
            raise ModelLoadError(f"GGUF file {path}: truncated; {tensor.name} ends at byte {end} of {len(data)}")
        self.bytes = data[tensor.offset : end]
        self.source, self.offset = source, tensor.offset
        self.shape, self.dtype = tensor.shape, dtype

    def whole(self, name: str, interleaved_heads: int | None = None) -> CheckpointTensor:
        load = partial(_decode, self.bytes, self.kind, self.shape, self.dtype, interleaved_heads)
        return CheckpointTensor(name, self.shape, self.dtype, load, self._span(self.offset, len(self.bytes)))

    def expert(self, index: int, name: str) -> CheckpointTensor:
        size = len(self.bytes) // self.shape[0]
        part = self.bytes[index * size : (index + 1) * size]
        shape = self.shape[1:]
        load = partial(_decode, part, self.kind, shape, self.dtype, None)
        return CheckpointTensor(name, shape, self.dtype, load, self._span(self.offset + index * size, size))

    def _span(self, offset: int, size: int) -> FileSpan:
        return FileSpan(self.source, offset, size, plain=False)


def _decode(
    raw: np.ndarray, kind: Any, shape: tuple[int, ...], dtype: torch.dtype, interleaved_heads: int | None
) -> torch.Tensor:
    """uint8 [n] -> `dtype` `shape`, on the CPU, through small float32 pieces."""
    values = torch.empty(math.prod(shape), dtype=dtype)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(kind.name)
    if plain is not None:
        values.copy_(torch.from_numpy(raw.view(f"i{plain.itemsize}")).view(plain))
    else:
        import gguf

        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        step = max(_CHUNK_BYTES // block_bytes, 1)
        num_blocks = len(raw) // block_bytes
        for start in range(0, num_blocks, step):
            end = min(start + step, num_blocks)
            # As a single row: the package works on 16 rows at a time, which is slow when rows are short.
            piece = gguf.dequantize(raw[None, start * block_bytes : end * block_bytes], kind)
            values[start * block : end * block].copy_(torch.from_numpy(piece.reshape(-1)))
    values = values.view(shape)
    if interleaved_heads is not None:
        # llama.cpp stores the two rotary halves of a head interleaved row by row; Hugging Face one after the other.
        rows, rest = shape[0], shape[1:]
        halves = values.view(interleaved_heads, rows // interleaved_heads // 2, 2, *rest)
        values = halves.transpose(1, 2).reshape(rows, *rest)
    return values


def _interleaved_heads(file: GGUFFile, part: str) -> int | None:
    """How many heads to un-interleave in this projection; None where the file keeps the usual order."""
    if file.architecture != "llama" or part not in ("attn_q", "attn_k"):
        return None
    heads = file.get("attention.head_count")
    return heads if part == "attn_q" else file.get("attention.head_count_kv", heads)


@cache
def _check_decodable(kind: Any) -> None:
    """Raises NotImplementedError where the `gguf` package has no decoder."""
    if kind.name in ("F32", "F16", "BF16", "F64"):
        return
    import gguf

    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
