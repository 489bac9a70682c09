"""Training data: manifests, label and target stores, batches, sampling and masking."""
