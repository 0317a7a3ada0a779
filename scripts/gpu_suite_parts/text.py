"""Real weights: what a model writes on this machine equals what ATOM on a CPU wrote in float32.

`python scripts/gpu_suite_parts/text.py MODEL...` writes the expectations (tests/golden/gpu_text.json) on the CPU, one
entry for each number of layers: the whole embedded model and the cut one (scripts/split_model.py) that fits one
transfer. tests/e2e/test_smollm2.py compares the CPU's tokens with transformers'.
"""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from gpu_suite_parts.report import ROOT, Report, Settings

GOLDEN = ROOT / "tests" / "golden" / "gpu_text.json"
NUM_OUTPUT = 24
PROMPTS = [
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The 3 laws of thermodynamics, stated in 1 line each:\n1.",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at",
    "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down what he saw: ",
]


def find_model(given: str | None) -> str | None:
    """A GGUF file, a folder with one or with its parts; else the embedded model or one that was carried along."""
    from split_model import join

    from atom.utils.errors import ModelLoadError
    from atom.utils.model_path import resolve_model

    try:
        return resolve_model(given or "smollm2").gguf_file
    except ModelLoadError:
        folder = Path(given) if given else ROOT / ".carry"
    for sums in sorted(folder.glob("*.gguf.sha256")):
        return str(join(sums.with_suffix("")))
    return next((str(file) for file in sorted(folder.glob("*.gguf"))), None)


def write(model: str, device: str, dtype: str, graphs: bool) -> tuple[int, dict[str, Any]]:
    """(the model's layers, {"tokens": of each prompt, "logprobs": of each prompt's own tokens}).

    The penalty keeps a cut model from saying one word for ever.
    """
    from atom import LLM, SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, repetition_penalty=1.5, prompt_logprobs=0
    )
    settings = {"cudagraph_mode": "FULL_DECODE_ONLY"} if graphs else {}
    with LLM(
        model=model, dtype=dtype, device=device, max_model_len=512, max_num_seqs=8, num_kvcache_blocks=512,
        compilation_config={"level": 0, **settings},
    ) as llm:  # fmt: skip
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        layers = llm.engine.config.hf_config.num_hidden_layers
    logprobs = [
        [round(next(iter(entry.values())).logprob, 4) for entry in output.prompt_logprobs[1:]] for output in outputs
    ]
    return layers, {"tokens": [output.outputs[0].token_ids for output in outputs], "logprobs": logprobs}


def compare(found: dict[str, Any], golden: dict[str, Any], dtype: str) -> tuple[bool, str]:
    """float32: all tokens. bfloat16: the first 8 of most prompts, as rounding parts ways later."""
    same = [
        next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), NUM_OUTPUT)
        for got, want in zip(found["tokens"], golden["tokens"], strict=True)
    ]
    pairs = zip(chain(*found["logprobs"]), chain(*golden["logprobs"]), strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    mean, worst = sum(gaps) / len(gaps), max(gaps)
    if dtype == "float32":
        good = min(same) == NUM_OUTPUT and worst < 0.01
    else:
        good = sum(n >= 8 for n in same) > len(same) / 2 and mean < 0.1
    return good, f"equal tokens {same} of {NUM_OUTPUT}; prompt log probabilities off by {mean:.4f}, at most {worst:.4f}"


def run(settings: Settings, report: Report) -> None:
    dtypes = ("float32",) if settings.tiny else ("float32", "bfloat16")
    report.plan([f"text in {dtype}" for dtype in dtypes])
    model = find_model(settings.model)
    golden = json.loads(GOLDEN.read_text())
    for dtype in dtypes:
        if model is None:
            reason = f"no model in {settings.model or '.carry'}: scripts/split_model.py makes one that is easy to carry"
            report.case(f"text in {dtype}", "failed" if settings.model else "not run", reason)
            continue
        layers, found = write(model, "cpu" if settings.tiny else "cuda", dtype, graphs=not settings.tiny)
        if str(layers) not in golden:
            report.case(f"text in {dtype}", "not run", f"nothing is known of {layers} layers; make {GOLDEN.name} anew")
            continue
        good, detail = compare(found, golden[str(layers)], dtype)
        report.case(f"text in {dtype}", "ok" if good else "failed", f"{layers} layers: {detail}")


def main() -> None:
    golden = {}
    for model in sys.argv[1:]:
        layers, golden[str(layers)] = write(model, "cpu", "float32", graphs=False)
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
