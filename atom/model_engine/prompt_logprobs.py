"""Log probabilities of the prompt's own tokens, gathered over the chunks of its prefill."""

from collections.abc import Callable

import torch

from atom.model_engine.protocol import TokenLogprobs

_ROWS_AT_ONCE = 128  # bounds the float32 logits held at a time: rows x vocabulary


class PromptLogprobs:
    """Entry i of a finished list is for prompt position i + 1 (nothing precedes position 0)."""

    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._compute_logits = compute_logits
        self._partial: dict[str, list[TokenLogprobs]] = {}

    def add_chunk(self, request_id: str, hidden: torch.Tensor, first: int, next_tokens: list[int], num: int) -> None:
        """hidden [n, H] at positions first..first+n-1; next_tokens: the prompt tokens that follow each."""
        entries = self._partial.setdefault(request_id, [])
        del entries[first:]  # a preempted prompt starts over
        for start in range(0, len(next_tokens), _ROWS_AT_ONCE):
            chosen = torch.tensor(next_tokens[start : start + _ROWS_AT_ONCE], device=hidden.device).unsqueeze(1)
            logits = self._compute_logits(hidden[start : start + len(chosen)])
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            own = logprobs.gather(1, chosen)
            ranks = (logprobs > own).sum(-1) + 1
            top = logprobs.topk(max(num, 1), dim=-1)
            ids = torch.cat([chosen, top.indices[:, :num]], dim=1).tolist()
            values = torch.cat([own, top.values[:, :num]], dim=1).tolist()
            entries += [
                TokenLogprobs(token_ids=i, logprobs=v, rank=r)
                for i, v, r in zip(ids, values, ranks.tolist(), strict=True)
            ]

    def take(self, request_id: str) -> list[TokenLogprobs]:
        return self._partial.pop(request_id, [])

    def forget(self, request_id: str) -> None:
        self._partial.pop(request_id, None)
