"""The compiled module and torch's view of it, bound once: `fast.X` for eager calls, `ops.X` under torch.compile."""

import torch
from torch.library import register_fake

from atom.kernels.cpu import extension

fast = extension()
ops = torch.ops.atom_cpu


@register_fake("atom_cpu::linear")
def _linear(x, packed, bias, out_features, out_float32):
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32 if out_float32 else x.dtype)


@register_fake("atom_cpu::linear_silu_and_mul")
def _linear_silu_and_mul(x, packed, intermediate_size):
    return x.new_empty((*x.shape[:-1], intermediate_size))


@register_fake("atom_cpu::embedding")
def _embedding(input_ids, weight):
    return weight.new_empty((input_ids.shape[0], weight.shape[1]))


@register_fake("atom_cpu::rms_norm")
def _rms_norm(x, weight, eps):
    return x.new_empty(x.shape)


@register_fake("atom_cpu::add_rms_norm")
def _add_rms_norm(x, residual, weight, eps):
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


@register_fake("atom_cpu::silu_and_mul")
def _silu_and_mul(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@register_fake("atom_cpu::rotary")
def _rotary(positions, query, key, cos_sin, interleaved):
    return None


@register_fake("atom_cpu::store_kv")
def _store_kv(key, value, k_cache, v_cache, slots, k_scale, v_scale):
    return None


@register_fake("atom_cpu::paged_attention")
def _paged_attention(
    query, k_cache, v_cache, query_start, seq_lens, block_table, output, scale, window, k_scale, v_scale
):
    return None
