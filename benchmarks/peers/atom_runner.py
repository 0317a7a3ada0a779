"""ATOM through its offline API."""

from common import Job, run


class Engine:
    def __init__(self, job: Job) -> None:
        import atom

        self.version = f"atom {atom.__version__}"
        self.llm = atom.LLM(model=job.model, dtype="bfloat16", max_model_len=2048, **job.options)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        from atom import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    run(Engine)
