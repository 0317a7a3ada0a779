"""The threads behind the CPU kernels: the same bits however many there are, whoever calls, and after a fork."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from atom.kernels.cpu.ops import fast

pytestmark = pytest.mark.usefixtures("threads_restored")


def compute(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(37, 320, generator=generator)
    weight = fast.pack_weight(torch.randn(1000, 320, generator=generator), False)
    return fast.linear(fast.rms_norm(x, torch.ones(320), 1e-5), weight, None, 1000, False)


def test_any_number_of_threads_gives_the_same_bits():
    torch.set_num_threads(1)
    expected = compute(0)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for _ in range(50):
            assert torch.equal(compute(0), expected)


def test_callers_from_several_threads_do_not_mix_their_work():
    torch.set_num_threads(3)
    expected = [compute(seed) for seed in range(4)]

    def check(seed: int) -> bool:
        torch.set_num_threads(3)
        return all(torch.equal(compute(seed), expected[seed]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(4)))


def _child(queue, x, weight, expected) -> None:
    # NumPy compares: torch's own operators would wait for threads that a fork leaves behind.
    queue.put((fast.linear(x, weight, None, 1000, False).numpy() == expected.numpy()).all())


def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    x = torch.randn(37, 320)
    weight = fast.pack_weight(torch.randn(1000, 320), False)
    expected = fast.linear(x, weight, None, 1000, False)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(queue, x, weight, expected), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get()
