"""The HuBERT model and its heads; `kernels` holds the fast implementations of its parts."""
