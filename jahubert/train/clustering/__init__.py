"""K-means clustering: input features, streaming feature extraction, and fitting of centroids."""
