from types import SimpleNamespace

import pytest

from atom.models.registry import MODELS, get_model_class
from atom.utils.errors import ModelLoadError


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_every_architecture_has_a_model_with_the_whole_contract(architecture):
    model = get_model_class(SimpleNamespace(architectures=[architecture]))
    assert model.packed_modules_mapping["qkv_proj"] == ("q_proj", "k_proj", "v_proj")
    assert callable(model.forward)
    assert callable(model.compute_logits)


def test_the_first_known_architecture_counts():
    config = SimpleNamespace(architectures=["SomethingNewForCausalLM", "Qwen3ForCausalLM"])
    assert get_model_class(config).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize("architectures", [None, []])
def test_no_architecture(architectures):
    with pytest.raises(ModelLoadError, match="no architectures; supported: LlamaForCausalLM"):
        get_model_class(SimpleNamespace(architectures=architectures))


def test_unknown_architecture_lists_what_is_supported_and_the_nearest():
    with pytest.raises(ModelLoadError, match=r"Qwen3MoEForCausalLM.*nearest: Qwen3MoeForCausalLM.*MixtralForCausalLM"):
        get_model_class(SimpleNamespace(architectures=["Qwen3MoEForCausalLM"]))
