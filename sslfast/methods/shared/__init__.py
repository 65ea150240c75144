"""What several methods share: k-means, Sinkhorn, pseudo-labels, patches, permutations, reconstruction.

Imports what ``methods`` may.
"""

__all__ = ["kmeans", "patches", "permutations", "pseudo_labels", "reconstruction", "sinkhorn"]
