"""What a request asks of the sampler, and when it ends."""

from dataclasses import dataclass, field


@dataclass(kw_only=False)
class SamplingParams:
    """Per-request generation parameters (guide, section 6, and what vLLM users expect)."""

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop_strings: list[str] | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = field(default_factory=list)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logit_bias: dict[int, float] | None = None
