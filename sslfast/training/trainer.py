"""The pretraining loop: views, loss, backward, optimizer step, ``after_step``; logs, checkpoints and resume."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sslfast import distributed
from sslfast.config import to_dict
from sslfast.data import refuse_in_bootstrap
from sslfast.device import resolve_device, resolve_precision
from sslfast.loaders import Loader
from sslfast.methods import BatchSplit, Method, MethodContext
from sslfast.optim import build_optimizer, load_optimizer, prepare_gradients, set_learning_rate, set_weight_decay
from sslfast.runs import (
    CheckpointStore,
    Outbox,
    RunDirectory,
    check_same_run,
    find_checkpoint,
    read_log,
    set_aside_newer,
    surviving,
)
from sslfast.training.allocator import keep_freed_memory
from sslfast.training.config import TrainConfig
from sslfast.training.data import RunData
from sslfast.training.feature_pass import FeaturePass
from sslfast.training.initial import build_method
from sslfast.training.limits import check_start
from sslfast.training.logging import Recorder, find_loggers
from sslfast.training.measurements import Measurements
from sslfast.training.nonfinite import FiniteMeans, NonFiniteGuard
from sslfast.training.pictures import Draw, Pictures
from sslfast.training.prefetch import Prefetcher
from sslfast.training.result import TrainResult
from sslfast.training.saving import Saver
from sslfast.training.signals import GracefulShutdown, stopping_at_once
from sslfast.training.stopping import Stop, agree
from sslfast.views import Batch, View, ViewConfig, ViewStage


class Trainer:
    """One pretraining run on one device; under ``torchrun``, one rank of it.

    Ranks split each batch, gradients are averaged, every rank holds the whole state of the method (but for
    what it splits, such as a sharded bank), and rank 0 alone writes logs.

    Whatever is wrong with the configuration, the data, the device or the disk raises ValueError or FileNotFoundError
    here or at the start of :meth:`fit`, before the first step. Nothing is written before ``fit``.

    Args:
        config: what to train and how.
        data: whatever ``sslfast.data.open_data`` takes (a path, URL or dataset object), or a number of synthetic
            images.
        output: run directory; created if needed, and locked while training.
        resume: ``auto`` (resume from the newest good checkpoint in ``output`` if there is one), ``never`` (refuse an
            ``output`` that holds a run), or the path of a checkpoint or of another run directory.
        report: receives single lines for the user.
        open_store: the checkpoint store in a directory; None: what ``config.checkpoint_store`` says.
        draw: draws the pictures of ``pictures_every_epochs``; None: none are drawn.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Any,
        output: Path | str,
        *,
        resume: str | Path = "auto",
        report: Callable[[str], None] = print,
        open_store: Callable[[Path], CheckpointStore] | None = None,
        draw: Draw | None = None,
    ) -> None:
        refuse_in_bootstrap()
        config.check_numbers()
        config.method.validate()
        group = distributed.process_group()
        self.is_main = group.is_main
        self.config, self.resume = config, str(resume)
        self.report = surviving(report) if self.is_main else lambda _line: None
        self.outbox = Outbox(self.report)
        self.device = resolve_device(config.device, local_rank=group.local_rank if group.world_size > 1 else None)
        distributed.init_process_group(group, self.device, timeout=max(config.rank_timeout, 2 * config.loader.timeout))
        self.dtype = resolve_precision(config.precision, self.device)
        self.channels_last = config.is_channels_last(self.device, self.dtype)
        find_loggers(config)  # a missing package is an error before the run starts
        self.run = RunDirectory(output)
        self.saver = Saver(config, self.run, open_store, report=self.report)
        views = config.method.views()
        self.data = RunData(config, data, self.run, device=self.device)
        self.manifest = self.data.manifest
        self.loader = self.data.loader(views)
        self.steps_per_epoch = self.loader.steps_per_epoch
        split = BatchSplit(
            batch_size=config.batch_size,
            ranks=group.world_size,
            accumulate_steps=config.accumulate_steps,
            sync_batchnorm=config.sync_batchnorm,
        )
        check_start(config, split, rows=self.loader.num_rows, steps_per_epoch=self.steps_per_epoch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.stage = self._stage(views)
        context = MethodContext(
            model=config.model,
            num_rows=self.loader.num_rows,
            seed=config.seed,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self.config = config = replace(config, method=config.method.resolve(context))
        method, self.initial = build_method(config, context, split, self.resume, self.store, self.report)
        if config.sync_batchnorm:
            distributed.convert_sync_batchnorm(method, self.device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.method: Method = method.to(self.device)
        if method.orders_epochs:
            self.loader.set_order(method.epoch_order)
        self.method.to(memory_format=layout)  # type: ignore[call-overload]
        self.model = distributed.replicate(self.method, self.device)
        if config.compile != "off":
            self.method.compile(mode=config.compile)
        self.feature_pass: FeaturePass | None = None
        if collected := config.method.feature_views():
            loader, stage = self.data.loader(collected), self._stage(collected)
            self.feature_pass = FeaturePass(self.method, loader, stage, device=self.device, dtype=self.dtype)
        peak, options = config.optim.peak_lr(config.batch_size), self.method.parameter_options()
        self.optimizer = build_optimizer(self.method, config.optim, lr=peak, options=options)
        self.saver.choose(self.method, self.optimizer)
        self.learning_rate = config.optim.learning_rate(
            batch_size=config.batch_size, steps_per_epoch=self.steps_per_epoch, epochs=config.epochs
        )
        self.weight_decay = config.optim.decay(self.total_steps)
        self.measurements = Measurements(
            config, self.method, self.manifest, self.run, self.steps_per_epoch, device=self.device, report=self.report
        )
        self.pictures = Pictures(config, self.method, self.manifest, draw, self.steps_per_epoch)
        self.samples = Prefetcher(self.stage, parts=config.accumulate_steps, device=self.device)
        skip = config.on_nonfinite == "skip"
        self.means = FiniteMeans(self.device, leave_out=skip)
        self.nonfinite = NonFiniteGuard(
            skip=skip, limit=config.nonfinite_limit, method=self.method, optimizer=self.optimizer, device=self.device
        )
        self.step = 0
        self.device_step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.recorder: Recorder | None = None

    @property
    def store(self) -> CheckpointStore:
        """Where checkpoints are."""
        return self.saver.store

    def _stage(self, views: Mapping[str, ViewConfig]) -> ViewStage:
        return ViewStage(views, seed=self.config.seed, dtype=self.dtype, channels_last=self.channels_last)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step. Nothing here waits for the device."""
        self.optimizer.zero_grad()
        for part in range(1, self.config.accumulate_steps + 1):
            sample_ids, views = self.samples.take(batches)
            with self._gradient_sync(part == self.config.accumulate_steps):
                values = self._forward(views, sample_ids)
                (values["loss"] / self.config.accumulate_steps).backward()
            self.means.add(values, step=self.device_step)
            self.nonfinite.observe(values["loss"], sample_ids)
            self.samples.ahead(batches)
        prepare_gradients(self.optimizer, self.config.optim, self.step)
        self.optimizer.step()
        self.method.after_step()
        self.device_step += 1
        self.step += 1

    def _forward(self, views: Mapping[str, View], sample_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            values: dict[str, torch.Tensor] = self.model(views, sample_ids, step=self.device_step)
        return values

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Ranks average their gradients only in the backward of the last micro-batch."""
        return nullcontext() if is_last else distributed.no_sync(self.model)

    def fit(self) -> TrainResult:
        """Train to the end, from the start or from a checkpoint.

        Raises:
            ValueError, FileNotFoundError: before the first step, with the remedy.
            NonFiniteLossError: names the step and the last good checkpoint.
            CollapseError: with ``on_collapse=error``.
            RunInterruptedError: after a stop signal (:class:`GracefulShutdown`), with a checkpoint saved.
            LostBatchError: a loader process died, or the storage does not answer; with a checkpoint saved.
        """
        try:
            with ExitStack() as until_end:
                with stopping_at_once():
                    distributed.together(lambda: self._open_run(until_end), only_main=True)
                    self._resume()
                    if self.is_main:
                        self._record_start()
                return self._fit()
        finally:
            self.close()

    def check(self) -> None:
        """What :meth:`fit` checks before its first step: disk space, output directory, lock, checkpoint, and that the
        loaders' processes start. Writes nothing; :meth:`close` ends those processes.

        Raises:
            ValueError, FileNotFoundError, LostBatchError: with the remedy.
        """
        distributed.together(self._check_run, only_main=True)
        self._find_checkpoint()
        for loader in self._loaders():
            distributed.together(loader.check)

    def _open_run(self, until_end: ExitStack) -> None:
        self.saver.check_space(self.total_steps)
        self.run.create()
        until_end.enter_context(self.run.locked(is_restart=distributed.is_restart()))

    def _check_run(self) -> None:
        self.saver.check_space(self.total_steps)
        self.run.check_writable()
        self.run.check_unlocked()

    def _loaders(self) -> list[Loader]:
        return [self.loader, *([] if self.feature_pass is None else [self.feature_pass.loader])]

    def close(self) -> None:
        """End loader processes and a write, and drop the DDP module, so that the process group can be destroyed.
        :meth:`fit` ends with it."""
        for loader in self._loaders():
            loader.close()
        self.saver.settle(wait=True)
        self.model = self.method

    def _record_start(self) -> None:
        facts = {"device": str(self.device), "precision": str(self.dtype), "processes": distributed.world_size()}
        save = None if self.manifest is None else self.manifest.save
        records = self.run.records(to_dict(self.config), facts, save, report=self.report)
        self.outbox.write(records | ({} if self.initial is None else self.initial.record(self.run)))

    def _fit(self) -> TrainResult:
        first_step, started = self.step, time.perf_counter()
        steps = {"first_step": first_step, "total_steps": self.total_steps}
        self.recorder = Recorder(self.config, self.run, self.outbox, **steps, is_main=self.is_main, report=self.report)
        self.method.train()
        try:
            with keep_freed_memory(self.device), GracefulShutdown() as shutdown:
                for loader in self._loaders():
                    loader.patience.is_stopped = shutdown.is_requested
                stop = self._train(self.recorder, shutdown)
                if stop is not None:
                    done = f"step {self.step}/{self.total_steps}"
                    stop.leave(lambda: self._save(must=True), done=done, is_new=self.step > first_step)
                checkpoint = self._finish(first_step)
        finally:
            self.recorder.close()
        seconds = time.perf_counter() - started
        return TrainResult(
            step=self.step,
            metrics={k: v for k, v in self.recorder.last.items() if isinstance(v, int | float)},
            checkpoint=checkpoint,
            seconds=seconds,
            samples_per_second=(self.step - first_step) * self.config.batch_size / seconds,
            loader_wait_share=self.recorder.timer.total_waited / seconds,
            bad_images=self._list_bad_images(),
        )

    def _train(self, recorder: Recorder, shutdown: GracefulShutdown) -> Stop | None:
        """Train to the end, or until all ranks stop, and why."""
        while self.step < self.total_steps:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            if done == 0 and self.method.orders_epochs:  # a function of the epoch: repeated where the run stops here
                stop = self._start_epoch(epoch, recorder, shutdown)
                if stop is not None:
                    return stop
            batches = recorder.timer.waiting(self.loader.epoch(epoch, done))
            for step in range(done, self.steps_per_epoch):
                stop = self._wait(batches, shutdown)
                # With the first batch in hand: nothing stops the run between the two.
                if stop is None and step == 0 and not self.method.orders_epochs:
                    stop = self._start_epoch(epoch, recorder, shutdown)
                if stop is not None:
                    return stop
                self._set_rates()
                self.nonfinite.snapshot()
                self.train_step(batches)
                self.nonfinite.restore()
                self._after_step()
        return None

    def _wait(self, batches: Iterator[Batch], shutdown: GracefulShutdown) -> Stop | None:
        """Wait for the next batch; not None: the run ends here on all ranks."""
        error = None
        if not shutdown.is_requested():
            try:
                self.samples.prepare(batches)
            except Exception as problem:
                error = problem
        return agree(shutdown, error)

    def _start_epoch(self, epoch: int, recorder: Recorder, shutdown: GracefulShutdown) -> Stop | None:
        if self.feature_pass is not None:
            stop = self.feature_pass.run(epoch, watch=recorder.timer.waiting, agree=partial(agree, shutdown))
            if stop is not None:
                return stop
        self.method.start_epoch(epoch)
        return None

    def _list_bad_images(self) -> int:
        found = [pair for pairs in distributed.gather_objects(self.loader.bad_images) for pair in pairs]
        counts = [len(found)]
        if self.is_main:
            self.outbox.attempt("write", {"bad_images.txt": lambda: counts.append(self.run.add_bad_images(found))})
        return counts[-1]

    def _finish(self, first_step: int) -> Path:
        if first_step < self.total_steps:
            return self._save(must=True)
        # The run was already complete: nothing to write, its last record and checkpoint are the result.
        records = read_log(self.run.log)
        assert self.recorder is not None
        self.recorder.last = records[-1] if records else {}
        return self.store.path(self.step)

    def _set_rates(self) -> None:
        self.lr = self.learning_rate(self.step)
        set_learning_rate(self.optimizer, self.lr)
        set_weight_decay(self.optimizer, self.weight_decay(self.step))

    def _after_step(self) -> None:
        config = self.config
        assert self.recorder is not None
        self.recorder.step()
        is_due = self.step % config.log_every_steps == 0 or self.step == self.total_steps
        if is_due or self.measurements.is_due(self.step):
            values = {**self._read_means(), **self.measurements.read(self.step)}
            self.means.reset()
            self.recorder.write(step=self.step, epoch=self.step / self.steps_per_epoch, lr=self.lr, values=values)
        self.pictures.after_step(self.step, self.run, self.recorder)
        self.saver.settle(wait=False)
        if self.step % config.checkpoint_every_steps == 0 and self.step < self.total_steps:
            self._save()

    def _read_means(self) -> dict[str, float]:
        """Means of the current interval; waits for the device.

        Raises:
            NonFiniteLossError: a loss of the interval was not finite, or too many steps in a row were skipped.
        """
        means, bad_step = self.means.read()
        paths = None if self.manifest is None else self.manifest.paths
        skipped = self.nonfinite.check(bad_step, step=self.step, paths=paths, last_checkpoint=self.saver.last)
        return {**means, "skipped_steps": skipped} if self.nonfinite.skip else means

    def _save(self, *, must: bool = False) -> Path:
        """Write a checkpoint and delete old ones. A failed write ends the run only if the checkpoint ``must`` exist."""
        self._read_means()  # raises where a loss was not finite, so that no checkpoint holds such a step
        self.nonfinite.check_state(self.step, self.saver.last)
        distributed.check_replicas([*self.method.parameters(), *self.method.replicated()])
        self.saver.settle(wait=True)
        self.saver.follow()
        self._list_bad_images()
        if self.recorder is not None:
            self.recorder.sync()
        state = {
            "step": self.step,
            **self.saver.state(),
            "metrics": self.means.state_dict(),
            "nonfinite": self.nonfinite.state_dict(),
            "config": to_dict(self.config),
            "precision": str(self.dtype),
            "manifest_digest": self.data.digest(),
        }
        return self.saver.save(state, self.step, must=must)

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from, checked to be of this run; None for a new run."""
        check = self.nonfinite.check_saved
        open_store = self.saver.open_store
        found = find_checkpoint(self.run, self.resume, open_store=open_store, report=self.report, check=check)
        if found is not None:
            check_same_run(*found, config=self.config, manifest_digest=self.data.digest())
        return found

    def _resume(self) -> None:
        """Restore the state of the checkpoint that ``self.resume`` and the run directory name, if there is one."""
        self.store.clean()
        found = self._find_checkpoint()
        if found is None:
            return
        path, state = found
        distributed.barrier()  # every rank has read it
        for aside in set_aside_newer(self.store, state["step"]):
            self.report(f"set aside {aside.name}, newer than {path.name}")
        method, optimizer = self.saver.restored(state)
        self.method.load_state_dict(method)
        load_optimizer(self.optimizer, optimizer)
        self.means.load_state_dict(state["metrics"])
        if "nonfinite" in state:
            self.nonfinite.load_state_dict(state["nonfinite"])
        self.step = state["step"]
        self.device_step.fill_(self.step)
        self.report(f"resumed from {path}: step {self.step}/{self.total_steps}")
        if state["precision"] != str(self.dtype):
            self.report(f"precision was {state['precision']} so far and is {self.dtype} on this device")
