"""The base of ATOM's layers and models: nn.Module without its price per call."""

from typing import Any

from torch import nn


class Layer(nn.Module):
    """An nn.Module that is cheap to call: a decode step of a small model makes hundreds of calls and look-ups.

    A call goes straight to `forward`, so hooks don't run. Once loaded, parameters and submodules are also plain
    attributes, which Python finds without nn.Module.__getattr__. Assigning one still works, since nn.Module drops
    the plain attribute then; it doesn't for buffers, so those are left out.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.__call__ = cls.forward  # type: ignore[method-assign]

    def process_weights_after_loading(self) -> None:
        """Called once on every layer when its weights are in; overriders end with this one."""
        self.__dict__.update(self._parameters)
        self.__dict__.update(self._modules)
