import torch
from torch import nn

from atom.layers.module import Layer


class Scale(Layer):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("offset", torch.zeros(2), persistent=False)

    def forward(self, x):
        return x * self.weight + self.offset


class Twice(Scale):
    def forward(self, x):
        return 2 * super().forward(x)


class Outer(Layer):
    def __init__(self):
        super().__init__()
        self.inner = Twice()

    def forward(self, x):
        return self.inner(x)


def test_a_call_is_forward_also_of_subclasses():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(Scale()(x), x)
    assert torch.equal(Outer()(x), 2 * x)


def test_loaded_layers_are_found_without_getattr_and_stay_modules(monkeypatch):
    outer = Outer()
    for module in outer.modules():
        module.process_weights_after_loading()
    assert [name for name, _ in outer.named_parameters()] == ["inner.weight"]
    assert list(outer.state_dict()) == ["inner.weight"]

    slow, slow_names = nn.Module.__getattr__, []

    def record(self, name):
        slow_names.append(name)
        return slow(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", record)
    assert torch.equal(outer(torch.ones(2)), torch.full((2,), 2.0))
    assert slow_names == ["offset"]  # a buffer: a copy of it would go stale when it is assigned


def test_what_is_assigned_after_loading_counts():
    scale = Scale()
    scale.process_weights_after_loading()
    scale.weight = nn.Parameter(torch.full((2,), 5.0))
    scale.offset = torch.ones(2)
    assert torch.equal(scale(torch.ones(2)), torch.full((2,), 6.0))
