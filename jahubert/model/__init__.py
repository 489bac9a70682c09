"""The HuBERT model, its heads, and the assignment of frames to centroids.

`kernels` contains fast implementations of the model's parts.
"""
