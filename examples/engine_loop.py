"""The engine step by step: requests join while others run, and one is aborted."""

from atom import LLMEngine, SamplingParams
from atom.config import config_from_kwargs

if __name__ == "__main__":
    with LLMEngine(config_from_kwargs("smollm2", max_model_len=1024)) as engine:
        params = SamplingParams(temperature=0, max_tokens=24)
        engine.add_request("first", "The sun is", params)
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    print(f"{output.request_id}: {output.outputs[0].text!r}, {output.outputs[0].finish_reason}")
            steps += 1
            if steps == 5:
                engine.add_request("second", "The moon is", params)
                engine.add_request("third", "The sea is", params)
            if steps == 10 and (partial := engine.abort_request("third")) is not None:
                print(f"third, aborted: {partial.outputs[0].text!r}")
