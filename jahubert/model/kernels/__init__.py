"""Fast implementations of the parts of HuBERT, equivalent to the plain modules in `jahubert.model.hubert`.

`usable` decides whether they are used; `disabled` switches them off."""

from jahubert.model.kernels.attention import scaled_dot_product_attention
from jahubert.model.kernels.conv_frontend import front_end_padded
from jahubert.model.kernels.dispatch import disabled, is_tracing, usable
from jahubert.model.kernels.encoder import encode, encoder_layer
from jahubert.model.kernels.indexing import BLOCK, index_tensors, length_list
from jahubert.model.kernels.packing import PackedShape, Packing
from jahubert.model.kernels.weights import discard_weight_copies, shared_weight_copies

__all__ = [
    "BLOCK", "PackedShape", "Packing", "disabled", "discard_weight_copies", "encode", "encoder_layer",
    "front_end_padded", "index_tensors", "is_tracing", "length_list",
    "scaled_dot_product_attention", "shared_weight_copies", "usable",
]  # fmt: skip
