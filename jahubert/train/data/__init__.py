"""Training data: manifests, label stores, target stores, batches, sampling and masking."""
