"""The feature pass that some methods need before an epoch: forward only, at fixed weights."""

from collections.abc import Callable, Iterator
from signal import Signals

import torch

from sslfast.loaders import Loader
from sslfast.methods import Method
from sslfast.views import Batch, ViewStage


class FeaturePass:
    """Gives a method the samples of an epoch before it begins, if :meth:`Method.needs_feature_pass` says so.

    The trunk is in evaluation mode, so features depend on no other sample; the method is in training mode afterwards.
    A pass depends on the weights and the epoch only: after an interruption it is repeated in full.

    Args:
        method: :meth:`Method.store_features` gets every batch.
        loader: of the configuration's ``feature_views()``, with the seed and batch size of the run: the samples of
            an epoch are those that it trains on.
        stage: renders these views.
        device: of the batches.
        dtype: bf16: under autocast.
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
        stop: Callable[[], Signals | None] = lambda: None,
    ) -> Signals | None:
        """Run the pass before ``epoch``, if there is one; returns the signal that stopped it, or None.

        Args:
            epoch: the epoch that is about to begin.
            watch: wraps the iterator of batches.
            stop: called after every batch; must return the same on every rank.
        """
        if not self.method.needs_feature_pass(epoch):
            return None
        found = None
        self.method.eval()
        for batch in watch(self.loader.epoch(epoch)):
            views = self.stage(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                self.method.store_features(views, batch.sample_ids)
            found = stop()
            if found is not None:
                break
        self.method.train()
        return found
