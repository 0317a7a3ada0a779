"""From the packed projection to attention's query and the cache, by the C++ kernels: they alone know the cache."""

from atom.kernels.cpu.kv_cache import store_kv
from atom.kernels.cpu.norm import rms_norm
from atom.kernels.cpu.rotary import rotary_embedding_
from atom.kernels.torch.qkv import qk_norm_rope_cache_of

qk_norm_rope_cache = qk_norm_rope_cache_of(rms_norm, rotary_embedding_, store_kv)
