"""Many prompts at once: each with its own parameters, results in order."""

from atom import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]

if __name__ == "__main__":
    with LLM(model="smollm2", max_model_len=1024) as llm:
        params = [SamplingParams(temperature=t, max_tokens=32, seed=1) for t in (0.0, 0.8, 0.0)]
        for output in llm.generate(PROMPTS, params):
            answer = output.outputs[0]
            print(f"{output.prompt!r} -> {answer.text!r} ({answer.finish_reason})")
