"""Token embedding and output head, split over the vocabulary."""

import torch
from torch import nn

from atom.distributed.communication import all_gather_last, all_reduce
from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.linear import check_shape, set_loader
from atom.layers.module import Layer


class VocabParallelEmbedding(Layer):
    """Each rank holds an equal range of the vocabulary; the last ranges are padded with zero rows."""

    def __init__(self, vocab_size: int, hidden_size: int, *, context: BuildContext) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tp = context.tp
        self.rows = -(-vocab_size // self.tp.size)
        self.first = self.tp.rank * self.rows
        self._look_up = get_op("embedding")
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size, dtype=context.dtype), requires_grad=False)
        set_loader(self.weight, self._load)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]"""
        if self.tp.size == 1:
            return self._look_up(input_ids, self.weight)
        local = input_ids - self.first
        mine = (local >= 0) & (local < self.rows)
        out = self._look_up(local.clamp(0, self.rows - 1), self.weight)
        return all_reduce(out * mine.unsqueeze(-1), self.tp)

    def _load(self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None) -> None:
        check_shape(loaded, (self.vocab_size, param.shape[1]))
        mine = loaded[self.first : self.first + self.rows]
        param.data[: len(mine)].copy_(mine)
        param.data[len(mine) :].zero_()


class ParallelLMHead(VocabParallelEmbedding):
    """Hidden states to logits; its weight may be the embedding's own (`tie`)."""

    def __init__(self, vocab_size: int, hidden_size: int, *, context: BuildContext) -> None:
        super().__init__(vocab_size, hidden_size, context=context)
        self._prepare = get_op("prepare_linear_weight")
        self._linear = get_op("linear")
        self._linear_argmax, self._greedy = get_op("linear_argmax"), get_op("greedy")

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        self.weight = embedding.weight

    def process_weights_after_loading(self) -> None:
        # A tied weight stays as it is for look-ups; the head reads its own layout.
        self.weight = nn.Parameter(self._prepare(self.weight.data), requires_grad=False)
        super().process_weights_after_loading()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size]"""
        logits = self._linear(hidden, self.weight, None, self.rows, out_float32=True)
        if self.tp.size > 1:
            logits = all_gather_last(logits, self.tp)
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> int64 [R]: what `greedy` chooses from the logits."""
        if self.tp.size > 1:
            return self._greedy(self(hidden))
        return self._linear_argmax(hidden, self.weight, self.vocab_size)
