import copy
import json
import logging
import subprocess
import sys

import pytest
import torch

from atom.config import (
    CompilationConfig,
    CompilationLevel,
    Config,
    CUDAGraphMode,
    KVCacheConfig,
    KVCacheTensor,
    ParallelConfig,
    SpeculativeConfig,
    config_from_kwargs,
    get_generation_config,
    get_hf_config,
)
from atom.utils.errors import ConfigError, ModelLoadError

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float16",
}


def write_model(directory, generation=None, **changes):
    values = {**LLAMA, **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return str(directory)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def one_line(info):
    return "\n" not in str(info.value)


# --- importing ---


def test_importing_the_configuration_loads_nothing_heavy():
    code = (
        "import sys, atom.config, atom.model_engine.arg_utils, atom.sampling_params;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- defaults and derived values ---


def test_defaults_are_the_guides(model):
    config = Config(model)
    expected = {
        "trust_remote_code": False, "max_num_batched_tokens": 16384, "scheduler_delay_factor": 0.0,
        "max_num_seqs": 512, "gpu_memory_utilization": 0.9, "tensor_parallel_size": 1, "enforce_eager": False,
        "kv_cache_block_size": 16, "num_kvcache_blocks": -1, "kv_cache_dtype": "bf16",
        "enable_prefix_caching": False, "port": 8006, "torch_profiler_dir": None, "asyncio_mode": False,
        "load_dummy": False, "enable_expert_parallel": False, "master_addr": "127.0.0.1",
        "enable_dp_attention": False, "speculative_config": None, "per_req_cache_equiv_blocks": 0,
        "num_per_req_cache_groups": 0, "device": "auto", "cpu_memory_utilization": 0.4, "seed": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.compilation_config.level == CompilationLevel.NO_COMPILATION
    assert config.inactive_settings() == []


def test_derived_values_come_from_the_checkpoint_with_their_reasons(tmp_path):
    config = Config(write_model(tmp_path, {"eos_token_id": [2, 7]}), stop_token_ids=[9, 7])
    assert config.max_model_len == 256
    assert config.torch_dtype is torch.float16
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.stop_token_ids == [9, 7, 2]
    assert config.generation_config.eos_token_id == [2, 7]
    assert config.hf_config.model_type == "llama"
    assert not config.quant_config.is_quantized
    assert set(config.reasons) >= {
        "max_model_len", "torch_dtype", "bos_token_id", "eos_token_id", "stop_token_ids", "graph_bs", "quant_config",
    }  # fmt: skip


def test_stop_tokens_without_a_generation_config_are_the_models(tmp_path):
    assert Config(write_model(tmp_path, eos_token_id=[5, 6])).stop_token_ids == [5, 6]
    assert get_generation_config(str(tmp_path)).eos_token_id == [5, 6]


def test_given_token_ids_win(model):
    config = Config(model, bos_token_id=11, eos_token_id=12)
    assert (config.bos_token_id, config.eos_token_id) == (11, 12)
    assert config.stop_token_ids == [2]


def test_a_model_without_special_tokens(tmp_path):
    config = Config(write_model(tmp_path, bos_token_id=None, eos_token_id=None, model_type="qwen3"))
    assert (config.bos_token_id, config.eos_token_id, config.stop_token_ids) == (-1, -1, [])


@pytest.mark.parametrize(("asked", "got"), [(100, 100), (256, 256), (1000, 256)])
def test_max_model_len_is_capped_by_the_model(model, asked, got, caplog):
    with caplog.at_level(logging.WARNING, logger="atom"):
        config = Config(model, max_model_len=asked)
    assert config.max_model_len == got
    assert ("max_model_len: 1000 -> 256" in caplog.text) == (asked > 256)
    assert ("capped" in config.reasons["max_model_len"]) == (asked > 256)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float32, torch.float32), ("auto", torch.float16)],
)
def test_dtype_is_given_or_the_checkpoints(model, given, dtype):
    assert Config(model, torch_dtype=given).torch_dtype is dtype


def test_dtype_falls_back_to_bfloat16_and_reads_the_older_key(tmp_path):
    assert Config(write_model(tmp_path, dtype=None)).torch_dtype is torch.bfloat16
    assert Config(write_model(tmp_path, dtype=None, torch_dtype="float32")).torch_dtype is torch.float32


def test_profiler_directory_is_created_and_defaults_to_the_environment(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOM_TORCH_PROFILER_DIR", str(tmp_path / "a" / "b"))
    assert Config(model).torch_profiler_dir == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert Config(model, torch_profiler_dir=tmp_path / "c").torch_profiler_dir == str(tmp_path / "c")
    assert (tmp_path / "c").is_dir()


def test_profiler_directory_that_cannot_be_is_an_error(model):
    with pytest.raises(ConfigError, match="torch_profiler_dir"):
        Config(model, torch_profiler_dir=f"{model}/config.json/x")


# --- validation ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_batched_tokens", 0), ("max_num_batched_tokens", 1.5), ("max_num_batched_tokens", True),
        ("scheduler_delay_factor", -1), ("scheduler_delay_factor", float("nan")), ("max_num_seqs", 0),
        ("max_model_len", 0), ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", "0.5"), ("cpu_memory_utilization", -0.1), ("tensor_parallel_size", 0),
        ("tensor_parallel_size", 9), ("enforce_eager", 1), ("enforce_eager", "yes"), ("kv_cache_block_size", 0),
        ("kv_cache_block_size", 8), ("kv_cache_block_size", 17), ("num_kvcache_blocks", 0),
        ("num_kvcache_blocks", -2), ("kv_cache_dtype", "fp16"), ("port", 0), ("port", 70000), ("master_addr", ""),
        ("stop_token_ids", 3), ("stop_token_ids", [-1]), ("eos_token_id", -2), ("device", "tpu"),
        ("torch_dtype", "int8"), ("torch_dtype", torch.int8), ("torch_dtype", 3), ("seed", -1), ("num_threads", 0),
        ("log_level", "loud"), ("graph_bs", [0]), ("graph_bs", 4), ("compilation_config", 3),
        ("parallel_config", {"data_parallel_rank": 4}), ("quant_config", 3), ("tokenizer", ""),
        ("attention_backend", None),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_in_one_line(model, name, value):
    with pytest.raises(ConfigError, match=name if name != "parallel_config" else "data_parallel_rank") as info:
        Config(model, **{name: value})
    assert one_line(info)


@pytest.mark.parametrize("size", [1, 16, 32, 64, 256])
def test_block_sizes(model, size):
    assert Config(model, kv_cache_block_size=size).kv_cache_block_size == size


def test_a_mistyped_field_is_answered_with_the_nearest(model):
    with pytest.raises(ConfigError, match=r"unknown field 'max_num_seq' \(did you mean 'max_num_seqs'\?\)"):
        Config(model, max_num_seq=3)
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        config_from_kwargs(model, blok_size=3)
    with pytest.raises(ConfigError, match=r"unknown field 'qqq'$"):
        config_from_kwargs(model, qqq=3)
    with pytest.raises(ConfigError, match="'hf_config' is derived"):
        Config(model, hf_config=None)
    with pytest.raises(ConfigError, match="by name"):
        Config(model, True)


# --- checkpoints that can't be read ---


def test_unreadable_checkpoints(tmp_path):
    with pytest.raises(ModelLoadError, match="no such file") as info:
        Config(str(tmp_path / "missing"))
    assert one_line(info)
    with pytest.raises(ModelLoadError, match=r"neither a config\.json"):
        Config(str(tmp_path))
    config = tmp_path / "config.json"
    for text, problem in [
        ("{'a'", "not valid JSON"), ("", "not valid JSON"), ("[1]", "JSON object"), ("{}", "model_type"),
        ('{"model_type": "nosuch"}', "'nosuch' is not known"),
        ('{"model_type": "nosuch", "auto_map": {"AutoConfig": "x.Y"}}', "--trust-remote-code"),
        ('{"model_type": "llama", "hidden_size": "many"}', "config.json is not valid"),
    ]:  # fmt: skip
        config.write_text(text)
        with pytest.raises(ModelLoadError, match=problem) as info:
            Config(str(tmp_path))
        assert one_line(info)
    config.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        Config(str(tmp_path))


def test_broken_generation_config(tmp_path):
    model = write_model(tmp_path, {})
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json is not valid JSON"):
        Config(model)


def test_code_of_the_checkpoint_is_never_run_unasked(tmp_path):
    model = write_model(tmp_path, model_type="nosuch", auto_map={"AutoConfig": "configuration_x.X"})
    (tmp_path / "configuration_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelLoadError, match="trust-remote-code"):
        Config(model)
    with pytest.raises(ConfigError, match="not supported yet"):
        Config(model, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_multimodal_configs_give_their_language_part(tmp_path):
    text = {**LLAMA, "model_type": "qwen3_5_text", "dtype": "float32", "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    config = Config(str(tmp_path))
    assert (config.max_model_len, config.torch_dtype) == (64, torch.float32)


# --- what has not landed ---


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"data_parallel_size": 2}, "data_parallel_size=2"),
        ({"method": "mtp"}, "mtp"),
    ],
)
def test_what_would_be_wrong_if_ignored_is_refused(model, settings, named):
    with pytest.raises(ConfigError, match=f"{named}.*not supported yet"):
        config_from_kwargs(model, **settings)


_GROUP = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
}


def _compressed(**more):
    return {"quant_method": "compressed-tensors", "config_groups": {"g": _GROUP}, **more}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        _compressed(),
        {"quant_method": "quark", "global_quant_config": {"weight": {"qscheme": "per_channel", "dtype": "fp8_e4m3"}}},
    ],
)
def test_float8_checkpoints_are_served(tmp_path, quantization):
    assert Config(write_model(tmp_path, quantization_config=quantization)).quant_config.unserved_reason() == ""


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "a method other than"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "static scales of activations"),
        (_compressed(kv_cache_scheme={"num_bits": 8}), "a calibrated KV cache"),
        (
            _compressed(config_groups={"g": {**_GROUP, "input_activations": None}}),
            "activations that are not quantized",
        ),
        (
            _compressed(config_groups={"g": {**_GROUP, "weights": {"num_bits": 8, "type": "int"}}}),
            "int8 weights, per_Token",
        ),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"qscheme": "per_group", "dtype": "fp4"}}},
            "float4_e2m1fn_x2 weights, per_1x32",
        ),
    ],
)
def test_other_quantized_checkpoints_are_refused(tmp_path, quantization, reason):
    model = write_model(tmp_path, quantization_config=quantization)
    expected = rf"a quantized checkpoint with {reason}.*\(quant_method='{quantization['quant_method']}'\) is not supp"
    with pytest.raises(ConfigError, match=expected):
        Config(model)


def test_inactive_settings_are_those_the_user_set_to_something_else(model):
    config = config_from_kwargs(
        model,
        enable_expert_parallel=False,
        enable_dp_attention=True,
        level=2,
        master_addr="127.0.0.2",
        max_num_seqs=4,
    )
    assert config.inactive_settings() == ["enable_dp_attention=True", "master_addr=127.0.0.2"]


def test_inactive_settings_ignore_what_was_derived(model):
    assert Config(model, parallel_config=ParallelConfig()).inactive_settings() == []
    given = ParallelConfig(data_parallel_master_port=29600)
    assert Config(model, parallel_config=given).inactive_settings() == ["data_parallel_master_port=29600"]


def test_is_user_set_outlives_derivation_and_copies(model):
    config = Config(model, max_num_seqs=512)
    assert config.is_user_set("max_num_seqs")
    assert config.is_user_set("model")
    assert not config.is_user_set("max_model_len")
    config.max_model_len = 17
    assert not copy.deepcopy(config).is_user_set("max_model_len")


# --- compilation ---


def test_cudagraph_modes():
    modes = CUDAGraphMode
    assert [m.value for m in modes] == [0, 1, 2, (2, 0), (2, 1)]
    table = {  # decode, mixed, piecewise compilation, full graphs, separate
        modes.NONE: (modes.NONE, modes.NONE, False, False, False),
        modes.PIECEWISE: (modes.PIECEWISE, modes.PIECEWISE, True, False, False),
        modes.FULL: (modes.FULL, modes.FULL, False, True, False),
        modes.FULL_DECODE_ONLY: (modes.FULL, modes.NONE, False, True, True),
        modes.FULL_AND_PIECEWISE: (modes.FULL, modes.PIECEWISE, True, True, True),
    }
    for mode, expected in table.items():
        assert (
            mode.decode_mode(), mode.mixed_mode(), mode.requires_piecewise_compilation(),
            mode.has_full_cudagraphs(), mode.separate_routine(),
        ) == expected  # fmt: skip


def test_compilation_defaults_and_level_three():
    config = CompilationConfig()
    assert (config.level, config.use_cudagraph, config.cudagraph_mode, config.splitting_ops) == (0, True, None, None)
    assert config.cuda_graph_sizes == [512]
    assert (config.use_inductor, config.cudagraph_copy_inputs, config.compile_sizes) == (True, False, None)
    config = CompilationConfig(level=3)
    assert config.cudagraph_mode is CUDAGraphMode.PIECEWISE
    assert config.splitting_ops == ["aiter.unified_attention_with_output", "aiter.mla_attention"]
    config = CompilationConfig(level=3, cudagraph_mode="full_and_piecewise", splitting_ops=["a.b"])
    assert (config.cudagraph_mode, config.splitting_ops) == (CUDAGraphMode.FULL_AND_PIECEWISE, ["a.b"])
    assert CompilationConfig(level=3, use_cudagraph=False).cudagraph_mode is CUDAGraphMode.NONE


def test_capture_sizes():
    assert CompilationConfig(cuda_graph_sizes=[48]).capture_sizes() == [1, 2, 4, 8, 16, 32, 48]
    assert CompilationConfig(cuda_graph_sizes=[50]).capture_sizes() == [1, 2, 4, 8, 16, 32, 48]
    assert CompilationConfig().capture_sizes() == [1, 2, 4, 8, *range(16, 513, 16)]
    assert CompilationConfig(cuda_graph_sizes=[3, 1, 7]).capture_sizes() == [1, 3, 7]
    assert CompilationConfig(cuda_graph_sizes=[48], cudagraph_capture_sizes=[4, 2]).capture_sizes() == [2, 4]
    assert CompilationConfig(cudagraph_capture_sizes="[1, 2]").capture_sizes() == [1, 2]
    config = CompilationConfig(compile_sizes=[5, "cudagraph_capture_sizes", 2])
    assert config.sizes_to_compile([1, 2]) == [1, 2, 5]


@pytest.mark.parametrize(
    "settings",
    [
        {"level": 4}, {"level": -1}, {"level": "3"}, {"level": True}, {"cudagraph_capture_sizes": [0]},
        {"cudagraph_capture_sizes": "[1,"}, {"cudagraph_capture_sizes": "os.remove('x')"},
        {"cudagraph_capture_sizes": "3"}, {"cuda_graph_sizes": 3}, {"compile_sizes": ["x"]}, {"compile_sizes": [0]},
        {"cudagraph_mode": "HALF"}, {"cudagraph_mode": 1}, {"use_cudagraph": 1}, {"splitting_ops": "a"},
        {"inductor_compile_config": []}, {"levle": 1}, {"level": 0, "cudagraph_mode": "PIECEWISE"},
        {"use_cudagraph": False, "cudagraph_mode": "FULL"},
    ],
)  # fmt: skip
def test_bad_compilation_settings(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))) as info:
        CompilationConfig(**settings)
    assert one_line(info)


def test_graph_batch_sizes_are_limited_by_max_num_seqs(model):
    assert Config(model, max_num_seqs=20).graph_bs == [1, 2, 4, 8, 16]
    assert Config(model, graph_bs=[8, 2, 100], max_num_seqs=20).graph_bs == [2, 8]
    config = config_from_kwargs(model, cudagraph_capture_sizes=[1, 4, 600])
    assert config.graph_bs == [1, 4]
    assert "max_num_seqs" in config.reasons["graph_bs"]
    assert Config(model, compilation_config={"use_cudagraph": False}).graph_bs == []


def test_steps_with_prompts_have_larger_graphs_where_they_have_any(model):
    config = config_from_kwargs(model, max_num_seqs=20, level=3)
    assert config.prompt_graph_sizes == list(range(128, 1025, 128))
    few = config_from_kwargs(model, max_num_seqs=20, level=3, max_num_batched_tokens=300)
    assert few.prompt_graph_sizes == [128, 256]
    given = config_from_kwargs(model, level=3, cudagraph_mode="FULL", cudagraph_capture_sizes=[1, 4, 600])
    assert (given.graph_bs, given.prompt_graph_sizes) == ([1, 4], [600])
    decodes = config_from_kwargs(model, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 4, 600])
    assert decodes.prompt_graph_sizes == []


def test_enforce_eager_turns_off_compilation_and_graphs_here_only(model):
    shared = CompilationConfig(level=3)
    config = Config(model, enforce_eager=True, compilation_config=shared)
    assert (config.compilation_config.level, config.compilation_config.use_cudagraph, config.graph_bs) == (0, False, [])
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.NONE
    assert (shared.level, shared.cudagraph_mode) == (3, CUDAGraphMode.PIECEWISE)


# --- parallelism ---


def test_parallel_defaults_and_world_sizes(model):
    config = ParallelConfig()
    assert (config.data_parallel_size, config.data_parallel_size_local, config.data_parallel_rank) == (1, 1, 0)
    assert (config.data_parallel_rank_local, config.data_parallel_master_port) == (None, 29500)
    assert config.data_parallel_master_ip == "127.0.0.1"
    assert 1024 <= config.data_parallel_base_port <= 65535
    assert Config(model).parallel_config.world_size == 1
    config = ParallelConfig(data_parallel_size=3)
    config.world_size = 4
    assert config.world_size_across_dp == 12


def test_environment_overrides_parallel_settings(monkeypatch):
    for name, value in {
        "SIZE": "4", "RANK": "3", "RANK_LOCAL": "1", "MASTER_IP": "10.0.0.1", "MASTER_PORT": "1234",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ATOM_DP_{name}", value)
    config = ParallelConfig(data_parallel_size=2, data_parallel_rank=0)
    assert (config.data_parallel_size, config.data_parallel_rank, config.data_parallel_rank_local) == (4, 3, 1)
    assert (config.data_parallel_master_ip, config.data_parallel_master_port) == ("10.0.0.1", 1234)


def test_bad_parallel_settings(monkeypatch):
    for settings in (
        {"data_parallel_size": 0}, {"data_parallel_rank": 1}, {"data_parallel_size_local": 2},
        {"data_parallel_master_port": 0}, {"data_parallel_master_ip": ""}, {"data_parallel_sise": 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(settings))):
            ParallelConfig(**settings)
    monkeypatch.setenv("ATOM_DP_SIZE", "two")
    with pytest.raises(ConfigError, match="ATOM_DP_SIZE='two'"):
        ParallelConfig()


# --- speculative decoding ---


def draft_config(model_type, **values):
    from transformers import PretrainedConfig

    config = PretrainedConfig(**values)
    config.model_type = model_type
    return config


@pytest.mark.parametrize(
    ("base", "attribute", "mtp", "architecture"),
    [
        ("deepseek_v3", "num_nextn_predict_layers", "deepseek_mtp", "DeepSeekMTPModel"),
        ("glm_moe_dsa", "num_nextn_predict_layers", "deepseek_mtp", "DeepSeekMTPModel"),
        ("qwen3_next", "num_nextn_predict_layers", "qwen3_next_mtp", "Qwen3NextMTPModel"),
        ("qwen3_5", "mtp_num_hidden_layers", "qwen3_5_mtp", "Qwen3_5MTPModel"),
        ("qwen3_5_moe", "mtp_num_hidden_layers", "qwen3_5_mtp", "Qwen3_5MTPModel"),
        ("qwen3_5_text", "mtp_num_hidden_layers", "qwen3_5_mtp", "Qwen3_5MTPModel"),
        ("qwen3_5_moe_text", "mtp_num_hidden_layers", "qwen3_5_mtp", "Qwen3_5MTPModel"),
    ],
)
def test_mtp_override(base, attribute, mtp, architecture, caplog):
    given = draft_config(base, **{attribute: 3})
    with caplog.at_level(logging.WARNING, logger="atom"):
        config = SpeculativeConfig(method="mtp", num_speculative_tokens=1, draft_model_hf_config=given)
    draft = config.draft_model_hf_config
    assert (draft.model_type, draft.architectures) == (mtp, [architecture])
    assert (draft.n_predict, draft.num_nextn_predict_layers) == (1, 1)
    assert hasattr(draft, "n_routed_experts") == (mtp == "qwen3_5_mtp")
    assert given.model_type == base
    assert getattr(given, attribute) == 3


def test_mtp_override_counts_experts_of_qwen3_5_and_leaves_others_alone():
    draft = SpeculativeConfig.hf_config_override(draft_config("qwen3_5_moe_text", num_experts=8))
    assert (draft.n_shared_experts, draft.n_routed_experts) == (1, 8)
    assert SpeculativeConfig.hf_config_override(draft_config("llama")).to_dict() == draft_config("llama").to_dict()


def test_mtp_warns_when_more_layers_are_dropped(caplog):
    with caplog.at_level(logging.WARNING, logger="atom"):
        SpeculativeConfig.hf_config_override(draft_config("deepseek_v3", num_nextn_predict_layers=5))
    assert "num_nextn_predict_layers=5" in caplog.text


def test_draft_config_is_read_from_its_model(model):
    assert SpeculativeConfig(model=model).draft_model_hf_config.hidden_size == 64
    assert SpeculativeConfig().draft_model_hf_config is None


def test_bad_speculative_settings(model):
    with pytest.raises(ConfigError, match="'mtp'"):
        SpeculativeConfig(method="eagle")
    with pytest.raises(ValueError, match="num_speculative_tokens=2 must be 1"):
        Config(model, speculative_config=SpeculativeConfig(method="mtp", num_speculative_tokens=2))
    with pytest.raises(ConfigError, match="needs method"):
        config_from_kwargs(model, num_speculative_tokens=2)


# --- flat names ---


def test_config_from_kwargs_takes_fields_and_flag_names(model):
    config = config_from_kwargs(
        model, block_size=32, dtype="float32", level=3, cudagraph_capture_sizes="[1,2]", data_parallel_size=1,
        max_num_seqs=7, method=None, num_speculative_tokens=1,
    )  # fmt: skip
    assert (config.kv_cache_block_size, config.torch_dtype, config.max_num_seqs) == (32, torch.float32, 7)
    assert (config.compilation_config.level, config.graph_bs) == (3, [1, 2])
    assert config.speculative_config is None
    assert config.is_user_set("kv_cache_block_size")


def test_colliding_names_are_refused(model):
    with pytest.raises(ConfigError, match="same setting"):
        config_from_kwargs(model, dtype="float32", torch_dtype="float32")
    with pytest.raises(ConfigError, match="level and compilation_config"):
        config_from_kwargs(model, level=3, compilation_config=CompilationConfig())


def test_hf_config_and_cache_descriptors(model):
    assert get_hf_config(model).num_hidden_layers == 2
    k, v = torch.zeros(2), torch.ones(2)
    cache = KVCacheConfig(num_blocks=3, kv_cache_tensors=[KVCacheTensor(layer_num=0, k_cache=k, v_cache=v)])
    assert cache.kv_cache_tensors[0].k_scale is None
    assert KVCacheConfig().kv_cache_tensors == []
