"""The feature pass that some methods make before an epoch: forward only, at fixed weights."""

from collections.abc import Callable, Iterator
from signal import Signals

import torch

from sslfast.loaders import Loader
from sslfast.methods import Method
from sslfast.views import Batch, ViewStage


class FeaturePass:
    """Gives a method the samples of an epoch before the epoch begins, if the method needs them.

    The trunk is in evaluation mode, so that features depend on no other sample; the method is in training mode
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
        stop: Callable[[], Signals | None] = lambda: None,
    ) -> Signals | None:
        """Run the pass before ``epoch``, if there is one, to its end or until a signal, which is returned.

        Args:
            epoch: about to begin.
            watch: wraps the iterator of batches.
            stop: called after every batch; returns the same on every rank.
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
