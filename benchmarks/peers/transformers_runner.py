"""transformers' generate() on static, left-padded batches.

Options: batch_size, sort (requests by length, so that less is padded).
"""

from common import Job, run


class Engine:
    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        torch.set_num_threads(job.num_threads)
        self.batch_size = int(job.options.get("batch_size", 1))
        self.sort = bool(job.options.get("sort", False))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        import torch

        order = list(range(len(prompts)))
        if self.sort:
            order.sort(key=lambda i: len(prompts[i]))
        outputs: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with torch.inference_mode():
                result = self.model.generate(
                    ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
                )
            for row, i in enumerate(chosen):
                outputs[i] = result[row, width:].tolist()
        return outputs


if __name__ == "__main__":
    run(Engine)
