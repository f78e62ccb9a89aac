"""What the option `quantization` comes to, together with what the checkpoint says."""

from halimede.engine.quant.online import online_scheme
from halimede.engine.quant.online_names import ONLINE_METHODS
from halimede.engine.quant.registry import METHODS, method_name
from halimede.engine.quant.scheme import QuantScheme
from halimede.errors import ConfigError, UnsupportedQuantizationError


def choose_scheme(option: str | None, checkpoint: QuantScheme | None, source: str) -> QuantScheme | None:
    """How weights are quantized: as the checkpoint says; a plain one as the option says, while it is loaded.

    source: where the checkpoint's configuration is, for errors. Raises UnsupportedQuantizationError for a
    method that is not known, ConfigError for one that the checkpoint contradicts.
    """
    if option is None:
        return checkpoint
    method = method_name(option)
    if method is None and option not in ONLINE_METHODS:
        raise UnsupportedQuantizationError(
            f"quantization={option!r} is not supported; a plain checkpoint can be quantized to: "
            f"{', '.join(ONLINE_METHODS)}; checkpoints can be of: {', '.join(METHODS)}"
        )
    if checkpoint is None:
        if option in ONLINE_METHODS:
            return online_scheme(option)
        raise ConfigError(
            f"quantization={option!r}, but {source} is of a checkpoint that is not quantized; leave it out, "
            f"or quantize the weights while they are loaded: {', '.join(ONLINE_METHODS)}"
        )
    if method != checkpoint.method:
        raise ConfigError(
            f"quantization={option!r}, but {source} says that the checkpoint is quantized with "
            f"{checkpoint.method!r}; leave it out, or give a checkpoint that is not quantized"
        )
    return checkpoint
