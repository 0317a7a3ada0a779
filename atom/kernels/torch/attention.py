"""Attention over the paged cache, the reference."""

import torch


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Causal attention of each request's last query_len tokens over its cached tokens.

    query, output: [T, Hq, D]; caches [num_blocks, block_size, Hk, D] that already hold the new
    tokens; query_start_loc int32 [R + 1]; seq_lens int32 [R]; block_table int32 [R, max_blocks].
    Query token i of request r has position p = seq_lens[r] - query_len[r] + i and sees keys in
    (p - sliding_window, p], or [0, p] without a window. The first num_decodes requests have one
    query token. Rows of padding requests (seq_len 0) are written with zeros.
    """
    if num_decodes:
        one = (query[:num_decodes].unsqueeze(1), seq_lens[:num_decodes], block_table[:num_decodes])
        output[:num_decodes] = _attend(*one, k_cache, v_cache, scale, sliding_window, k_scale, v_scale).squeeze(1)
    starts = query_start_loc.tolist()
    for r in range(num_decodes, len(starts) - 1):
        rows = slice(starts[r], starts[r + 1])
        if rows.start == rows.stop:
            continue
        one = (query[rows].unsqueeze(0), seq_lens[r : r + 1], block_table[r : r + 1])
        output[rows] = _attend(*one, k_cache, v_cache, scale, sliding_window, k_scale, v_scale).squeeze(0)


def _attend(
    query: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    sliding_window: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    """[B, Q, Hq, D] queries of equal length against their padded, gathered caches, in float32."""
    batch, num_query, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    longest = int(seq_lens.max())
    if longest == 0:
        return torch.zeros_like(query)
    blocks = block_table[:, : -(-longest // block_size)].long()

    def gather(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        rows = cache[blocks].flatten(1, 2).float()  # [B, blocks * block_size, Hk, D]
        if scales is not None:
            rows = rows * scales[blocks].flatten(1, 2).unsqueeze(-1)
        return rows[:, :longest]

    keys, values = gather(k_cache, k_scale), gather(v_cache, v_scale)
    key_position = torch.arange(longest, device=query.device)
    position = seq_lens.long().unsqueeze(1) - num_query + torch.arange(num_query, device=query.device)
    seen = key_position <= position.unsqueeze(-1)  # [B, Q, K]
    if sliding_window:
        seen &= key_position > position.unsqueeze(-1) - sliding_window
    # Slots past a request's end may hold NaN from an earlier owner; 0 * NaN would leak through.
    values = values.masked_fill((key_position >= seq_lens.unsqueeze(1))[..., None, None], 0.0)
    grouped = query.float().view(batch, num_query, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, keys) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    probabilities = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    out = torch.einsum("bhgqk,bkhd->bqhgd", probabilities, values)
    return out.reshape(query.shape).to(query.dtype)
