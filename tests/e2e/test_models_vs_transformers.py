"""Logits against transformers in float32: whole prompts, chunks over the paged cache, single tokens."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, make_checkpoint, make_model

from atom.config import config_from_kwargs
from atom.forward_context import ForwardContext, set_forward_context
from atom.layers.attention.base import AttentionMetadata
from atom.layers.attention.layer import Attention
from atom.layers.build import BuildContext
from atom.model_engine.kv_cache import allocate
from atom.model_loader.loader import load_model

NUM_TOKENS = 70
CUTS = {"whole": [70], "chunked": [33, 1, 16, 20], "token by token": [1] * 70, "prompt and decode": [61] + [1] * 9}


@dataclass
class Case:
    expected: torch.Tensor
    tokens: torch.Tensor
    path: str


@pytest.fixture(scope="module", params=sorted({**FAMILIES, **VARIANTS}))
def case(request, tmp_path_factory):
    path = make_checkpoint(request.param, tmp_path_factory.mktemp("model"))
    model = make_model(request.param)
    tokens = torch.randint(0, model.config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return Case(model(tokens.unsqueeze(0)).logits[0], tokens, str(path))


def run(case: Case, backend: str, block_size: int, cuts: list[int], wanted: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all positions, or of those of the last piece that are wanted; pieces have the sizes `cuts`."""
    config = config_from_kwargs(case.path, torch_dtype="float32", device="cpu", max_model_len=128)
    context = BuildContext(
        dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        block_size=block_size,
        max_model_len=128,
        attention_backend=backend,
    )
    model = load_model(config, torch.device("cpu"), context)
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    num_blocks = -(-NUM_TOKENS // block_size)
    allocate(layers, num_blocks, torch.device("cpu"))
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    out, done = [], 0
    with torch.inference_mode():
        for count in cuts:
            positions = torch.arange(done, done + count)
            slots = table[positions // block_size].long() * block_size + positions % block_size
            metadata = AttentionMetadata(
                query_start_loc=torch.tensor([0, count], dtype=torch.int32),
                seq_lens=torch.tensor([done + count], dtype=torch.int32),
                block_table=table.unsqueeze(0),
                slot_mapping=slots,
                num_decodes=int(count == 1),
                max_query_len=count,
                max_seq_len=done + count,
            )
            names = {layer.layer_name: layer for layer in layers}
            rows = wanted if done + count == NUM_TOKENS else None
            with set_forward_context(ForwardContext(metadata, names, wanted_rows=rows)):
                hidden = model(case.tokens[done : done + count], positions)
            out.append(model.compute_logits(hidden))
            done += count
    return torch.cat(out) if wanted is None else out[-1]


@pytest.mark.parametrize("cuts", CUTS, ids=lambda c: c.replace(" ", "-"))
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_logits(case, backend, cuts):
    logits = run(case, backend, 16 if cuts != "chunked" else 1, CUTS[cuts])
    error = (logits - case.expected).abs().max() / case.expected.abs().max()
    assert error < 1e-4, f"max relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_rows_that_nobody_wants_are_left_out(case, backend):
    wanted = torch.tensor([0, 5, 19])
    logits = run(case, backend, 16, CUTS["chunked"], wanted)
    assert len(logits) == 3
    torch.testing.assert_close(logits, run(case, backend, 16, CUTS["chunked"])[50 + wanted], rtol=1e-5, atol=1e-5)


def test_an_unknown_architecture_names_the_nearest():
    from atom.models.registry import get_model_class
    from atom.utils.errors import ModelLoadError

    with pytest.raises(ModelLoadError, match=r"LamaForCausalLM.*nearest: LlamaForCausalLM"):
        get_model_class(SimpleNamespace(architectures=["LamaForCausalLM"]))
