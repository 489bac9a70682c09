"""K-means targets: input features, k-means fitting and streaming feature extraction."""
