"""Compilation level 3 beside level 0, with both engines in this process and their runs in turn.

`python benchmarks/levels.py [--model smollm2] [--rounds 5]`. A shared machine's speed changes within minutes, so that
only a round's ratio means something: level 0's time over level 3's, above 1 where compiling is faster. The last line
is JSON: work -> median ratio, lowest and highest, and each level's median seconds.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass

from atom import LLM, SamplingParams
from atom.config import CompilationConfig

LEVELS = (0, 3)


@dataclass(frozen=True)
class Work:
    """num_prompts random prompts of low..high tokens, output_len greedy tokens each."""

    name: str
    num_prompts: int
    low: int
    high: int
    output_len: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        source = random.Random(self.name)
        lengths = [source.randint(self.low, self.high) for _ in range(self.num_prompts)]
        return [[source.randrange(vocab_size) for _ in range(length)] for length in lengths]


WORKS = (
    Work("batch of 64", 64, 16, 128, 24),
    Work("single stream", 1, 32, 32, 64),
    Work("prompt of 512", 1, 512, 512, 1),
)


def seconds(llm: LLM, prompts: list[list[int]], output_len: int) -> float:
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def compare(engines: dict[int, LLM], work: Work, rounds: int) -> dict[str, float]:
    prompts = work.prompts(engines[0].engine.input_processor.vocab_size)
    times: dict[int, list[float]] = {level: [] for level in LEVELS}
    for i in range(rounds + 1):  # the first warms up
        for level in LEVELS if i % 2 else reversed(LEVELS):  # neither is always the first
            times[level].append(seconds(engines[level], prompts, work.output_len))
    plain, compiled = (times[level][1:] for level in LEVELS)
    ratios = [a / b for a, b in zip(plain, compiled, strict=True)]
    return {
        "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "best_ratio": min(plain) / min(compiled),
        "level_0_s": statistics.median(plain), "level_3_s": statistics.median(compiled),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[work.name for work in WORKS])
    options = parser.parse_args()
    engines = {
        level: LLM(
            model=options.model, device=options.device, dtype=options.dtype, max_model_len=1024, max_num_seqs=64,
            compilation_config=CompilationConfig(level=level),
        )
        for level in LEVELS
    }  # fmt: skip
    report = {}
    for work in WORKS:
        if options.only is None or work.name in options.only:
            found = report[work.name] = compare(engines, work, options.rounds)
            print(
                f"{work.name:14} level 3 is {found['ratio']:.3f} times as fast ({found['lowest']:.3f} to "
                f"{found['highest']:.3f}; best runs {found['best_ratio']:.3f}): "
                f"{found['level_0_s']:.3f} s, {found['level_3_s']:.3f} s",
                flush=True,
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
