"""Helpers to drive the scheduler without a model."""

from atom.model_engine.block_manager import BlockManager
from atom.model_engine.protocol import EngineRequest, ModelOutput, ScheduledBatch
from atom.model_engine.scheduler import Scheduler, SchedulerLimits
from atom.sampling_params import SamplingParams


def make_request(
    request_id: str, prompt: list[int], max_tokens: int = 8, *, salt: str = "", priority: int = 0, **params
):
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, **params),
        arrival_time=0.0,
        cache_salt=salt,
        priority=priority,
    )


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    prefix: bool = False,
    max_num_seqs: int = 8,
    budget: int = 32,
    max_model_len: int | None = None,
    delay_factor: float = 0.0,
    clock=None,
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len or num_blocks * block_size,
        delay_factor=delay_factor,
    )
    blocks = BlockManager(num_blocks, block_size, prefix)
    return Scheduler(limits, blocks, **({"clock": clock} if clock else {}))


class FakeWorker:
    """Keeps a worker's view of the requests and 'computes' the next token as a function of all tokens so far.

    Writes every computed token into its cache slot and checks, whenever a token is sampled, that the slots
    hold exactly the request's tokens: a wrongly shared or lost block shows as a wrong token.
    """

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.block_size = block_size
        self.cache = [None] * (num_blocks * block_size)
        self.requests: dict[str, dict] = {}

    @staticmethod
    def next_token(tokens: list[int]) -> int:
        return (sum(tokens) * 31 + len(tokens)) % 97

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        for request_id in batch.removed_request_ids:
            del self.requests[request_id]
        for new in batch.new_requests:
            assert new.request_id not in self.requests
            self.requests[new.request_id] = {
                "tokens": list(new.token_ids),
                "blocks": list(new.block_ids),
                "computed": new.num_computed_tokens,
            }
        for request_id, block_ids in batch.new_block_ids.items():
            self.requests[request_id]["blocks"] += block_ids
        output = ModelOutput(request_ids=[], token_ids=[])
        # All writes of a step happen before any read, as in a batched kernel.
        for request_id, count in batch.num_scheduled_tokens.items():
            request = self.requests[request_id]
            for position in range(request["computed"], request["computed"] + count):
                slot = request["blocks"][position // self.block_size] * self.block_size + position % self.block_size
                self.cache[slot] = (position, request["tokens"][position])
        for request_id, count in batch.num_scheduled_tokens.items():
            request = self.requests[request_id]
            request["computed"] += count
            if request["computed"] == len(request["tokens"]):
                seen = [
                    self.cache[request["blocks"][p // self.block_size] * self.block_size + p % self.block_size]
                    for p in range(request["computed"])
                ]
                assert seen == list(enumerate(request["tokens"])), f"{request_id} reads another request's cache"
                token = self.next_token(request["tokens"])
                request["tokens"].append(token)
                output.request_ids.append(request_id)
                output.token_ids.append(token)
        return output


def reference_output(prompt: list[int], max_tokens: int, stop: int | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(FakeWorker.next_token(tokens))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]
