"""Reading ahead and staging: the same weights, the same errors, and never more in memory than allowed."""

import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from atom.model_loader.checkpoint import CheckpointFile, CheckpointTensor, FileSpan
from atom.model_loader.loader import load_weights
from atom.model_loader.read_ahead import ReadAhead
from atom.model_loader.safetensors import read_safetensors
from atom.model_loader.staging import Budget, Staging
from atom.utils.errors import ModelLoadError

CPU = torch.device("cpu")
SHAPES = {"a": (7, 5), "b": (64,), "c": (3, 4, 2), "scalar": (), "empty": (0, 4)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool]


class Flat(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, torch.zeros(tensor.shape, dtype=tensor.dtype))


def make_tensors(dtype):
    generator = torch.Generator().manual_seed(3)
    return {name: (torch.randn(shape, generator=generator) * 3).to(dtype) for name, shape in SHAPES.items()}


def equal(model, tensors):
    return all(
        torch.equal(getattr(model, n).flatten().view(torch.uint8), t.flatten().view(torch.uint8))
        for n, t in tensors.items()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 24, 1 << 20], ids=lambda n: f"chunk{n}")
def test_staged_weights_equal_mapped_ones(dtype, chunk, tmp_path):
    tensors = make_tensors(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for staging in (None, Staging(CPU, chunk)):
        model = Flat(tensors)
        load_weights(model, read_safetensors(tmp_path), staging=staging)
        assert equal(model, tensors)


def test_staged_weights_are_converted_to_the_parameters_dtype(tmp_path):
    tensors = make_tensors(torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    model = Flat(narrow)
    load_weights(model, read_safetensors(tmp_path), staging=Staging(CPU, 16))
    assert equal(model, narrow)


def test_tensors_are_filled_in_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("atom.model_loader.loader._num_threads", lambda: 1)
    # Files hold wide dtypes first, so the order of the names isn't that of the bytes.
    first = {"z": torch.ones(4), "a": torch.ones(4, dtype=torch.bfloat16)}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file({"m": torch.ones(4)}, tmp_path / "model-2.safetensors")
    order = []

    def watched(tensor):
        return CheckpointTensor(
            tensor.name, tensor.shape, tensor.dtype, lambda: (order.append(tensor.name), tensor.load())[1], tensor.span
        )

    load_weights(Flat({**first, "m": torch.ones(4)}), map(watched, read_safetensors(tmp_path)))
    assert order == ["z", "a", "m"]


@pytest.mark.parametrize("cut", [1, 100])
def test_file_that_shrinks_while_it_is_read_is_named(cut, tmp_path):
    tensors = {"a": torch.randn(100), "b": torch.randn(100)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = list(read_safetensors(tmp_path))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: truncated") as caught:
        load_weights(Flat(tensors), checkpoint, staging=Staging(CPU, 64))
    assert "\n" not in str(caught.value)
    assert not [t for t in threading.enumerate() if t.name == "read-ahead"]


def test_error_of_the_system_names_the_file(tmp_path):
    with pytest.raises(ModelLoadError, match=r"gone\.safetensors: No such file"):
        CheckpointFile(tmp_path / "gone.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ModelLoadError, match=r"folder\.safetensors: Is a directory at byte 5"):
        CheckpointFile(tmp_path / "folder.safetensors").read_into(memoryview(bytearray(4)), 5)


class Recorder:
    """Stands where a file is asked for its next bytes."""

    def __init__(self, fail_at=None):
        self.asked, self.fail_at, self.changed = [], fail_at, threading.Condition()

    def will_need(self, offset, size):
        with self.changed:
            if offset == self.fail_at:
                raise OSError("no hints here")
            self.asked.append((offset, size))
            self.changed.notify()

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, timeout=10), self.asked


def test_reading_ahead_keeps_its_distance_and_order():
    file = Recorder()
    spans = [FileSpan(file, offset, 10, plain=True) for offset in (0, 10, 40, 50)]
    with ReadAhead(spans, window=20) as ahead:
        file.wait_for(2)
        assert file.asked == [(0, 10), (10, 10)]
        ahead.advance(9)
        ahead.advance(1)
        file.wait_for(3)
        assert file.asked == [(0, 10), (10, 10), (40, 10)]
    assert len(file.asked) == 3  # the end of the block ends it, however far it came
    assert not ahead._thread.is_alive()


def test_large_tensors_are_asked_for_in_pieces():
    file, size = Recorder(), 20 << 20
    with ReadAhead([FileSpan(file, 5, size, plain=True)]):
        file.wait_for(3)
    assert sum(n for _, n in file.asked) == size
    assert [offset for offset, _ in file.asked] == [5, 5 + (8 << 20), 5 + (16 << 20)]


def test_file_system_without_hints_is_read_all_the_same():
    file = Recorder(fail_at=10)
    with ReadAhead([FileSpan(file, offset, 10, plain=True) for offset in (0, 10, 20)]) as ahead:
        ahead._thread.join(timeout=10)
        assert not ahead._thread.is_alive()
    assert file.asked == [(0, 10)]


def test_budget_holds_back_but_lets_one_large_pass():
    budget, got = Budget(100), threading.Event()

    def second():
        with budget.take(60):
            got.set()

    with budget.take(500):  # alone it may
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(0.05)
    assert got.wait(10)
    thread.join()
    with budget.take(40), budget.take(60):
        assert budget._used == 100
    assert budget._used == 0
