"""The HuBERT model and its heads; `kernels` contains fast implementations of the parts of the model."""
