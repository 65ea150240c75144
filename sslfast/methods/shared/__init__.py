"""Parts that several methods use: k-means, Sinkhorn, pseudo-labels, patches, permutations, reconstruction.

Imports what ``methods`` imports.
"""

__all__ = ["kmeans", "patches", "permutations", "pseudo_labels", "reconstruction", "sinkhorn"]
