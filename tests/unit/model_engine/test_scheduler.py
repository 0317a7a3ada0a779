from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduling import FakeWorker, make_request, make_scheduler, reference_output

from atom.model_engine.protocol import ModelOutput


def run(scheduler, worker, max_steps=1000, depth=1):
    """depth: how many steps are scheduled before the first one's tokens are known."""
    outputs: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    in_flight = deque()
    for _ in range(max_steps):
        while len(in_flight) < depth and (batch := scheduler.schedule()) is not None:
            in_flight.append((batch, worker.execute(batch)))
        if not in_flight:
            break
        for out in scheduler.update(*in_flight.popleft()):
            outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
            if out.finish_reason:
                reasons[out.request_id] = out.finish_reason
        scheduler.check()
    assert not scheduler.has_unfinished()
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks
    return outputs, reasons


def test_a_long_prompt_is_chunked_to_the_budget():
    scheduler = make_scheduler(budget=10)
    scheduler.add(make_request("a", list(range(25)), 2))
    worker, counts = FakeWorker(4, 64), []
    while (batch := scheduler.schedule()) is not None:
        counts.append(batch.num_scheduled_tokens["a"])
        scheduler.update(batch, worker.execute(batch))
    assert counts == [10, 10, 5, 1]


def test_decodes_go_before_a_long_prompt():
    scheduler, worker = make_scheduler(budget=8), FakeWorker(4, 64)
    scheduler.add(make_request("short", [1, 2], 20))
    batch = scheduler.schedule()
    scheduler.update(batch, worker.execute(batch))
    scheduler.add(make_request("long", list(range(40)), 1))
    for _ in range(5):
        batch = scheduler.schedule()
        assert batch.num_scheduled_tokens["short"] == 1
        assert batch.num_scheduled_tokens["long"] == 7
        scheduler.update(batch, worker.execute(batch))


def test_preemption_recomputes_and_keeps_the_tokens():
    scheduler, worker = make_scheduler(num_blocks=8, block_size=4, max_model_len=32), FakeWorker(4, 8)
    prompts = {f"r{i}": [i + 1] * 6 for i in range(4)}
    for name, prompt in prompts.items():
        scheduler.add(make_request(name, prompt, 20))
    outputs, _ = run(scheduler, worker)
    assert scheduler.num_preemptions > 0
    assert outputs == {name: reference_output(prompt, 20) for name, prompt in prompts.items()}


def test_higher_priority_is_served_first_and_preempted_last():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("late", [1, 2, 3], 2, priority=5))
    scheduler.add(make_request("urgent", [1, 2, 3], 2, priority=-1))
    assert list(scheduler.schedule().num_scheduled_tokens) == ["urgent"]


def test_stop_token_ends_after_min_tokens():
    prompt = [3, 4, 5]
    stop = reference_output(prompt, 4)[3]
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt, 50, stop_token_ids=[stop]))
    outputs, reasons = run(scheduler, FakeWorker(4, 64))
    assert outputs["a"] == reference_output(prompt, 50, stop)
    assert reasons["a"] == "stop"


def test_max_model_len_ends_a_request():
    scheduler = make_scheduler(max_model_len=10)
    scheduler.add(make_request("a", [1] * 6, 50))
    outputs, reasons = run(scheduler, FakeWorker(4, 64))
    assert len(outputs["a"]) == 4
    assert reasons["a"] == "length"


def test_prefix_hit_leaves_the_last_token_to_compute():
    scheduler, worker = make_scheduler(prefix=True), FakeWorker(4, 64)
    prompt = list(range(12))
    scheduler.add(make_request("a", prompt, 3))
    run(scheduler, worker)
    scheduler.add(make_request("b", prompt, 3))
    batch = scheduler.schedule()
    assert batch.new_requests[0].num_computed_tokens == 8
    assert batch.num_scheduled_tokens == {"b": 4}


def test_prefix_cache_is_separated_by_salt():
    scheduler, worker = make_scheduler(prefix=True), FakeWorker(4, 64)
    scheduler.add(make_request("a", list(range(12)), 3, salt="tenant-1"))
    run(scheduler, worker)
    scheduler.add(make_request("b", list(range(12)), 3, salt="tenant-2"))
    assert scheduler.schedule().new_requests[0].num_computed_tokens == 0


def test_prompt_logprobs_compute_the_whole_prompt():
    scheduler, worker = make_scheduler(prefix=True), FakeWorker(4, 64)
    scheduler.add(make_request("a", list(range(12)), 3))
    run(scheduler, worker)
    scheduler.add(make_request("b", list(range(12)), 3, prompt_logprobs=1))
    assert scheduler.schedule().num_scheduled_tokens == {"b": 12}


def test_least_recently_used_prefix_is_evicted_first():
    scheduler, worker = make_scheduler(num_blocks=6, block_size=4, prefix=True, max_model_len=24), FakeWorker(4, 6)
    for name, token in (("old", 1), ("new", 2)):
        scheduler.add(make_request(name, [token] * 9, 1))
        run(scheduler, worker)
    # Four blocks are cached and two are free; a third prompt of three blocks must push out one of "old".
    scheduler.add(make_request("third", [3] * 9, 1))
    run(scheduler, worker)
    scheduler.add(make_request("new-again", [2] * 9, 1))
    assert scheduler.schedule().new_requests[0].num_computed_tokens == 8


def test_delay_factor_holds_new_prompts_back_while_others_run():
    now = [0.0]
    scheduler = make_scheduler(delay_factor=2.0, clock=lambda: now[0])
    worker = FakeWorker(4, 64)
    scheduler.add(make_request("a", [1, 2, 3], 20))
    batch = scheduler.schedule()
    now[0] += 1.0  # the prefill takes a second
    scheduler.update(batch, worker.execute(batch))
    scheduler.add(make_request("b", [1, 2, 3], 2))
    now[0] += 1.5
    batch = scheduler.schedule()
    assert list(batch.num_scheduled_tokens) == ["a"]
    scheduler.update(batch, worker.execute(batch))
    now[0] += 0.6  # 2.1 s > 2 x 1 s
    assert "b" in scheduler.schedule().num_scheduled_tokens


def test_an_error_of_one_request_ends_only_that_one():
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(make_request(name, [1, 2], 1))
    batch = scheduler.schedule()
    results = scheduler.update(batch, ModelOutput(request_ids=["b"], token_ids=[5], errors={"a": "broken"}))
    assert {r.request_id: r.finish_reason for r in results} == {"a": "error", "b": "length"}
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks


def test_an_error_of_a_decode_ends_only_that_one():
    scheduler, worker = make_scheduler(), FakeWorker(4, 64)
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, [1, 2], 5))
    for _ in range(2):
        batch = scheduler.schedule()
        scheduler.update(batch, worker.execute(batch))
    batch = scheduler.schedule()
    results = scheduler.update(batch, ModelOutput(request_ids=["a", "c"], token_ids=[5, 6], errors={"b": "broken"}))
    assert {r.request_id: (r.new_token_ids, r.finish_reason) for r in results} == {
        "a": ([5], None), "b": ([], "error"), "c": ([6], None),
    }  # fmt: skip
    assert scheduler.num_running == 2


def test_tokens_that_begin_or_end_nothing_take_no_object():
    scheduler, worker = make_scheduler(), FakeWorker(4, 64)
    for name, max_tokens in (("a", 3), ("b", 4)):
        scheduler.add(make_request(name, [1, 2], max_tokens))
    shapes = []
    while (batch := scheduler.schedule()) is not None:
        outputs = scheduler.update(batch, worker.execute(batch))
        shapes.append((outputs.request_ids, [(o.request_id, o.finish_reason) for o in outputs.others]))
    assert shapes == [
        ([], [("a", None), ("b", None)]),
        (["a", "b"], []),
        (["b"], [("a", "length")]),
        ([], [("b", "length")]),
    ]


def test_reset_prefix_cache_only_when_idle():
    scheduler, worker = make_scheduler(prefix=True), FakeWorker(4, 64)
    scheduler.add(make_request("a", list(range(12)), 3))
    scheduler.schedule()
    assert not scheduler.blocks.reset_prefix_cache()
    scheduler.abort("a")
    assert scheduler.blocks.reset_prefix_cache()
    assert worker.requests == {}


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_many_requests_give_the_tokens_each_gives_alone(block_size, prefix, depth):
    num_blocks = 80 // block_size
    scheduler = make_scheduler(num_blocks, block_size, prefix=prefix, budget=13, max_model_len=num_blocks * block_size)
    prompts = {f"r{i}": [7] * (i % 9) + [i] * (1 + i % 11) for i in range(30)}
    for name, prompt in prompts.items():
        scheduler.add(make_request(name, prompt, 12))
    outputs, _ = run(scheduler, FakeWorker(block_size, num_blocks), depth=depth)
    assert outputs == {name: reference_output(prompt, 12) for name, prompt in prompts.items()}


class SchedulerMachine(RuleBasedStateMachine):
    """Random add, abort and (through a tiny cache) preempt sequences, with up to DEPTH steps under way."""

    BLOCKS, SIZE, DEPTH = 9, 3, 2

    def __init__(self):
        super().__init__()
        self.scheduler = make_scheduler(
            self.BLOCKS, self.SIZE, prefix=True, max_num_seqs=4, budget=7, max_model_len=self.BLOCKS * self.SIZE
        )
        self.worker = FakeWorker(self.SIZE, self.BLOCKS)
        self.live: dict[str, tuple[list[int], int, int | None]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.count = 0
        self.in_flight = deque()

    @rule(
        length=st.integers(1, 20),
        token=st.integers(0, 2),
        tail=st.integers(0, 2),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from(["", "x"]),
        priority=st.integers(-1, 1),
        stop=st.none() | st.integers(0, 96),
        logprobs=st.booleans(),
    )
    def add(self, length, token, tail, max_tokens, salt, priority, stop, logprobs):
        name = f"r{self.count}"
        self.count += 1
        prompt = [token] * length + [tail]
        self.live[name] = (prompt, min(max_tokens, self.BLOCKS * self.SIZE - len(prompt)), stop)
        self.outputs[name] = []
        params = {"stop_token_ids": [] if stop is None else [stop], "logprobs": 0 if logprobs else None}
        self.scheduler.add(make_request(name, prompt, max_tokens, salt=salt, priority=priority, **params))

    @rule()
    def schedule(self):
        if len(self.in_flight) == self.DEPTH:
            return
        batch = self.scheduler.schedule()
        if batch is None:
            assert self.in_flight or not self.live, "nothing is scheduled though requests wait"
            return
        assert 0 < batch.total_tokens <= 7
        assert sum(batch.num_scheduled_tokens.values()) == batch.total_tokens
        self.in_flight.append((batch, self.worker.execute(batch)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def update(self):
        self._take(self.scheduler.update(*self.in_flight.popleft()))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(name)
        del self.live[name]

    def _take(self, results):
        for out in results:
            assert out.request_id in self.live
            self.outputs[out.request_id] += out.new_token_ids
            if out.finish_reason:
                expected = reference_output(*self.live.pop(out.request_id))
                assert self.outputs[out.request_id] == expected

    @invariant()
    def blocks_are_neither_lost_nor_wrongly_shared(self):
        self.scheduler.check()

    def teardown(self):
        for _ in range(2000):
            if not self.live:
                break
            self.schedule()
            if self.in_flight:
                self.update()
        assert not self.live, "a request never ends"
        assert self.scheduler.blocks.num_free_blocks == self.BLOCKS


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
