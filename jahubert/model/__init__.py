"""The HuBERT model and its heads. `kernels` contains fast implementations of the model's parts."""
