"""Configurations without modelling code, and activations all the same for who asks. Each in a fresh interpreter."""

import subprocess
import sys

import pytest

LIGHT = """
import sys
from atom.utils.light_transformers import import_validators
import_validators()
from transformers import AutoConfig
AutoConfig.for_model("llama")
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["torch._dynamo", "transformers.activations", "torch.distributed.tensor"])
def test_configuration_imports_no_modelling_code(module):
    run(f"{LIGHT}\nassert {module!r} not in sys.modules")


def test_activations_are_the_real_ones_afterwards():
    run(f"""{LIGHT}
import transformers.utils.type_validators as validators
assert "silu" in validators.ACT2FN and "no_such" not in validators.ACT2FN
from transformers.activations import ACT2FN
assert list(validators.ACT2FN) == list(ACT2FN) and len(validators.ACT2FN) == len(ACT2FN)
assert type(validators.ACT2FN["silu"]) is type(ACT2FN["silu"])
import transformers
assert transformers.activations.ACT2FN is ACT2FN
""")


def test_models_of_transformers_work_afterwards():
    run(f"""{LIGHT}
import torch
from transformers import AutoModelForCausalLM
config = AutoConfig.for_model("llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2]]))
""")


def test_nothing_changes_where_activations_were_there_before():
    run("""
import transformers.activations as before
from atom.utils.light_transformers import import_validators
import_validators()
import transformers.utils.type_validators as validators
assert validators.ACT2FN is before.ACT2FN
""")
