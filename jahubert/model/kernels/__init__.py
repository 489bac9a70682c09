"""Fast implementations of the parts of HuBERT, equivalent to the plain modules in `jahubert.model.hubert`.

`usable` is the rule that chooses between the two, `disabled` the switch."""

from jahubert.model.kernels.conv_frontend import front_end_padded
from jahubert.model.kernels.dispatch import disabled, usable
from jahubert.model.kernels.encoder import encode, encoder_layer
from jahubert.model.kernels.indexing import BLOCK, index_tensors
from jahubert.model.kernels.packing import Packing

__all__ = [
    "BLOCK", "Packing", "disabled", "encode", "encoder_layer", "front_end_padded", "index_tensors", "usable",
]  # fmt: skip
