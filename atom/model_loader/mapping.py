"""From a checkpoint's tensor names to a model's parameters: renames, fused projections, stacked experts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_EXPERT = re.compile(r"(?P<prefix>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>[^.]+)(?P<suffix>\..+)?")
_STACKED = re.compile(r"(?P<prefix>.*\bexperts)\.(?P<part>[^.\d]+)")
# Buffers that old checkpoints store and models compute.
_ALWAYS_IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.attn\.(bias|masked_bias)$")


@dataclass(frozen=True, slots=True)
class Shard:
    """One load: which tensor of the model, which part of it, and which slice of the checkpoint's tensor.

    select: None for the whole tensor, else (expert, half): `expert` indexes dimension 0 of a stacked expert
    tensor and `half` (None, 0 or 1) its gate or up half.
    """

    target: str
    shard_id: int | None = None
    expert_id: int | None = None
    select: tuple[int, int | None] | None = None


class WeightMapper:
    """Resolves names for one model. `resolve` returns the loads a checkpoint tensor needs, [] to skip it, None if
    the model has no place for it."""

    def __init__(self, model: nn.Module, tie_word_embeddings: bool) -> None:
        self.targets = loadable_tensors(model)
        self.packed: dict[str, tuple[str, ...]] = getattr(model, "packed_modules_mapping", {})
        self.experts: dict[str, tuple[str, int]] = getattr(model, "expert_mapping", {})
        self.rename = getattr(model, "map_weight_name", None)
        ignored = (*_ALWAYS_IGNORED, *getattr(model, "ignored_weight_patterns", ()))
        self.ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignored))
        self.tied = tie_word_embeddings
        self._parts: dict[str, list[tuple[str, int]]] = {}
        for fused, parts in self.packed.items():
            for index, part in enumerate(parts):
                self._parts.setdefault(part, []).append((fused, index))
        self._expert_parts: dict[str, list[str]] = {}  # parameter -> its parts in the order of their shard ids
        for part, (parameter, _) in sorted(self.experts.items(), key=lambda item: item[1][1]):
            self._expert_parts.setdefault(parameter, []).append(part)

    def resolve(self, name: str, shape: tuple[int, ...]) -> list[Shard] | None:
        if self.rename is not None:
            name = self.rename(name)
            if name is None:
                return []
        if name.endswith(".weight_scale_inv"):  # DeepSeek's name of the same
            name = name.removesuffix("_inv")
        if self.ignored.search(name):
            return []
        if self.tied and name == "lm_head.weight":
            return []
        if name in self.targets and not self._has_parts(name):
            return [Shard(name)]
        if match := _EXPERT.fullmatch(name):
            return self._expert(match)
        if (match := _STACKED.fullmatch(name)) and len(shape) == 3:
            return self._stacked_experts(match, shape[0])
        return self._packed_part(name)

    def part_names(self, target: str, loaded: Iterable[tuple[int | None, int | None]], count: int) -> str:
        """Which parts of a target are still to be loaded, in the checkpoint's words."""
        loaded = set(loaded)
        leaf = target.rsplit(".", 1)[-1]
        if leaf in self._expert_parts:
            parts = self._expert_parts[leaf]
            absent = [
                f"{expert}.{part}"
                for expert in range(count // len(parts))
                for index, part in enumerate(parts)
                if (index, expert) not in loaded
            ]
        else:
            fused = next((piece for piece in target.split(".") if piece in self.packed), None)
            parts = list(self.packed[fused]) if fused else [f"part {index}" for index in range(count)]
            absent = [part for index, part in enumerate(parts) if (index, None) not in loaded]
        shown = ", ".join(absent[:4])
        return shown + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")

    def _has_parts(self, name: str) -> bool:
        """A stacked parameter may carry the very name that checkpoints use for the whole stack."""
        return name.rsplit(".", 1)[-1] in self._expert_parts

    def _packed_part(self, name: str) -> list[Shard] | None:
        pieces = name.split(".")
        for position, piece in enumerate(pieces):
            for fused, index in self._parts.get(piece, ()):
                target = ".".join([*pieces[:position], fused, *pieces[position + 1 :]])
                if target in self.targets:
                    return [Shard(target, shard_id=index)]
        return None

    def _expert(self, match: re.Match[str]) -> list[Shard] | None:
        found = self.experts.get(match["part"])
        suffix = match["suffix"] or ".weight"
        if found is None:
            return self._packed_part(match.string)
        parameter, shard_id = found
        # "w13_weight" holds the .weight of its parts; other suffixes (.weight_scale) live in "w13_weight_scale".
        stem = parameter.removesuffix("_weight")
        target = f"{match['prefix']}.{stem}_{suffix[1:]}"
        if target not in self.targets:
            return None
        return [Shard(target, shard_id=shard_id, expert_id=int(match["expert"]))]

    def _stacked_experts(self, match: re.Match[str], num_experts: int) -> list[Shard] | None:
        """transformers 5 stacks all experts: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]."""
        width = {"gate_up_proj": 2, "down_proj": 1}.get(match["part"])
        parameter = next((name for name, parts in self._expert_parts.items() if len(parts) == width), None)
        if width is None or parameter is None or f"{match['prefix']}.{parameter}" not in self.targets:
            return None
        target = f"{match['prefix']}.{parameter}"
        return [
            Shard(target, shard_id=half, expert_id=expert, select=(expert, half if width == 2 else None))
            for expert in range(num_experts)
            for half in range(width)
        ]


def loadable_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; a shared (tied) one appears under each of its names."""
    persistent = model.state_dict(keep_vars=True)
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named.update((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in persistent)
    return named
