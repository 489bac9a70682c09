"""K-means targets: input features, streaming feature extraction, and k-means fitting."""
