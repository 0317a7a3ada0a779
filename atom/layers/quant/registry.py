"""Which method serves which storage format."""

from collections.abc import Callable

from atom.layers.build import BuildContext
from atom.layers.quant.base import LinearMethod
from atom.layers.quant.scaled import ScaledLinearMethod
from atom.layers.quant.unquantized import UnquantizedLinearMethod
from atom.quant_spec import LayerQuantConfig, QuantType, dtype_key
from atom.utils.errors import ModelLoadError

# (type, our key of the weight's dtype) -> a method; `atom.quant_spec.SERVED` lists the same.
METHODS: dict[tuple[QuantType, str], Callable[[BuildContext], LinearMethod]] = {
    (QuantType.per_Tensor, "fp8"): lambda context: ScaledLinearMethod(None, context),
    (QuantType.per_Token, "fp8"): lambda context: ScaledLinearMethod(None, context),
    (QuantType.per_1x128, "fp8"): lambda context: ScaledLinearMethod(128, context),
}


def get_linear_method(spec: LayerQuantConfig | None, context: BuildContext) -> LinearMethod:
    """The method for a layer's quantization; None = not quantized. ModelLoadError where there is none."""
    if spec is None or spec.quant_type is QuantType.No:
        return UnquantizedLinearMethod()
    make = METHODS.get((spec.quant_type, dtype_key(spec.quant_dtype)))
    if make is None:
        raise ModelLoadError(
            f"linear layers of {spec.quant_dtype} weights {spec.quant_type.name} are not supported yet"
        )
    return make(context)
