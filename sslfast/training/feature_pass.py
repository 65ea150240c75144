"""The feature pass that some methods make before an epoch: forward only, at fixed weights."""

from collections.abc import Callable, Iterator

import torch

from sslfast.distributed import broadcast_statistics
from sslfast.loaders import Loader
from sslfast.methods import Method
from sslfast.training.stopping import Stop
from sslfast.views import Batch, ViewStage


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


class FeaturePass:
    """Gives a method the samples of an epoch before the epoch begins, if the method needs them.

    The trunk is in evaluation mode, so that features depend on no other sample, and all ranks have the running
    statistics of rank 0, which a resumed run has too; the method is in training mode
    afterwards. A pass depends only on the weights and the epoch: an interrupted one is repeated from its start.

    Args:
        method: :meth:`Method.needs_feature_pass` decides, :meth:`Method.collect` receives every batch.
        loader: of the configuration's ``feature_views()``, with the seed and batch size of the run: the samples of a
            pass are those that the epoch trains on.
        stage: renders these views.
        device: of the batches.
        dtype: bfloat16: run under autocast.
    """

    def __init__(
        self, method: Method, loader: Loader, stage: ViewStage, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.method, self.loader, self.stage = method, loader, stage
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def run(
        self,
        epoch: int,
        *,
        watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
        agree: Callable[[Exception | None], Stop | None] = _raise,
    ) -> Stop | None:
        """Run the pass before ``epoch``, if there is one, to its end or until all ranks stop, and why.

        Args:
            epoch: about to begin.
            watch: wraps the iterator of batches.
            agree: called with every batch in hand, or with what the loader raised; returns the same on every rank.
        """
        if not self.method.needs_feature_pass(epoch):
            return None
        stop = None
        broadcast_statistics(self.method)
        self.method.eval()
        batches = watch(self.loader.epoch(epoch))
        for _ in range(self.loader.steps_per_epoch):
            batch, error = None, None
            try:
                batch = next(batches)
            except Exception as problem:
                error = problem
            stop = agree(error)
            if stop is not None or batch is None:
                break
            views = self.stage(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                self.method.store_features(views, batch.sample_ids)
        self.method.train()
        return stop
