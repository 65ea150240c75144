"""kNN accuracy during training, from the embeddings that the method keeps: no image is read for it."""

import torch

from sslfast.data import Manifest
from sslfast.distributed import rank
from sslfast.evaluation import bank_knn
from sslfast.methods import Method

K = 20
QUERIES = 10_000
"""Maximum number of query images; neighbours are searched among all images."""


class OnlineKnn:
    """``knn_top1`` at the end of every ``every_epochs``-th epoch: leave-one-out accuracy of ``method.embeddings()``.

    Labels are the folders of the manifest. See :func:`sslfast.evaluation.knn.bank_knn` for what the accuracy measures.

    Args:
        method: keeps embeddings of all images.
        manifest: of the run; None for synthetic images.
        every_epochs: 0: never, and the other arguments are not checked.
        steps_per_epoch: of the run.

    Raises:
        ValueError: the method keeps no embeddings, or the images have no labels, too few or all the same.
    """

    def __init__(self, method: Method, manifest: Manifest | None, *, every_epochs: int, steps_per_epoch: int) -> None:
        self._method, self._every_steps = method, every_epochs * steps_per_epoch
        if not every_epochs:
            return
        remedy = "set knn_every_epochs to 0"
        if type(method).embeddings is Method.embeddings:
            raise ValueError(
                f"knn_every_epochs={every_epochs} needs a method with a bank or buffer of embeddings, "
                f"and {type(method).__name__} has none; {remedy}"
            )
        labels = (
            torch.empty(0, dtype=torch.int64) if manifest is None else torch.from_numpy(manifest.with_labels().labels)
        )
        labelled = labels[labels >= 0]
        classes = len(labelled.unique())
        if len(labelled) <= K or classes < 2:
            raise ValueError(
                f"knn_every_epochs={every_epochs} needs more than {K} labelled images of 2 classes or more, there are "
                f"{len(labelled)} of {classes}; put each image into the folder of its class, or {remedy}"
            )
        self._labels = labels

    def is_due(self, step: int) -> bool:
        """Whether the record of ``step`` (steps done) includes the accuracy."""
        return self._every_steps > 0 and step % self._every_steps == 0

    def read(self, step: int) -> dict[str, float]:
        """``{"knn_top1": accuracy}`` on rank 0 where it is due, else an empty dict; every rank calls it.

        Waits for the device.
        """
        if not self.is_due(step):
            return {}
        embeddings, is_split = self._method.embeddings(), self._method.embeddings_are_split
        if embeddings is None or (rank() and not is_split):
            return {}
        found = bank_knn(embeddings, self._labels, (K,), queries=QUERIES, is_split=is_split)
        return {} if rank() else {"knn_top1": found[K].top1}
