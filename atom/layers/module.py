"""The base of ATOM's layers and models: nn.Module without its price per call."""

from typing import Any

from torch import nn


class Layer(nn.Module):
    """An nn.Module that is cheap to call: a decode step of a small model makes hundreds of calls and look-ups.

    A call goes straight to `forward`, so hooks don't run. Once loaded, parameters, buffers and submodules are
    also plain attributes, which Python finds without nn.Module.__getattr__; from then on they may be assigned,
    but the model may not be moved to another device.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.__call__ = cls.forward  # type: ignore[method-assign]

    def process_weights_after_loading(self) -> None:
        """Called once on every layer when its weights are in; overriders end with this one."""
        self.__dict__.update(self._parameters)
        self.__dict__.update(self._buffers)
        self.__dict__.update(self._modules)
