"""The configuration of a pretraining run."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from sslfast.config import check_numbers, resumable
from sslfast.loaders import LoaderConfig
from sslfast.methods import PIRL, MethodConfig
from sslfast.models import ResNetConfig, TrunkConfig
from sslfast.optim import OptimConfig
from sslfast.training.limits import LIMITS


@dataclass(kw_only=True)
class TrainConfig:
    """Everything that defines a pretraining run, except the data folder and the run directory."""

    recipe: str = resumable("custom")
    """Recipe that the values are based on; kept for the record."""
    method: MethodConfig = field(default_factory=PIRL.Config)
    """The pretraining method."""
    model: TrunkConfig = field(default_factory=ResNetConfig)
    """The trunk."""
    init: str | None = None
    """Weights that a new run starts from, in place of random ones: a run directory, any file that sslfast.load reads,
    or timm/NAME for timm's weights where they are on this machine. The schedule starts anew."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How samples are read."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    epochs: int = 800
    """Passes over the data; the cosine ends with the last one."""
    batch_size: int = 1024
    """Samples per step, over all processes and micro-batches."""
    accumulate_steps: int = 1
    """Micro-batches that each batch is split into, processed one after the other, to fit a device's memory. Samples,
    crops, learning rate and schedule are those of the whole batch; BatchNorm and losses that contrast the samples of a
    batch see one micro-batch at a time."""
    sync_batchnorm: bool = False
    """BatchNorm over the samples of all processes, as in SimCLR. In the PIRL paper each device normalises its own."""
    seed: int = 0
    """Every random draw is a function of the seed, the step or epoch, and the sample id."""
    device: str = resumable("auto")
    """auto (the first CUDA device if there is one, else the CPU), cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast; parameters and bank stay fp32. auto: bf16 on devices with native bf16 arithmetic (CUDA from
    compute capability 8.0, CPUs with AVX512-BF16 or AMX), else fp32."""
    channels_last: bool | None = None
    """Keep images and convolution weights in the NHWC memory format. None: on CUDA devices, and in fp32 on CPUs: with
    AVX2 up to 1.4 times as fast for narrow ResNets and as fast for wide ones."""
    compile: Literal["off", "default", "reduce-overhead"] = resumable("off")
    """Compile the method's forward and backward with torch.compile, in its mode default or reduce-overhead (CUDA
    graphs). The first step takes minutes; losses round differently."""
    on_nonfinite: Literal["error", "skip"] = resumable("error")
    """What to do when a loss is NaN or infinite. error: stop the run, naming the step and its samples. skip: roll back
    the step on the device, also for a gradient, at the cost of a second copy of parameters, bank and momentum."""
    nonfinite_limit: int = resumable(10)
    """Maximum number of steps in a row that on_nonfinite=skip rolls back; with more the run stops."""
    on_collapse: Literal["report", "error"] = resumable("report")
    """What to do when the features of all images have become the same (feature_std or embedding_std below 0.01 in a log
    record). report: one line on the screen. error: stop the run."""
    log_every_steps: int = resumable(10)
    """Steps between log records; loss and metrics are averaged over them, and read from the device only then."""
    knn_every_epochs: int = resumable(0)
    """Epochs between measurements of knn_top1 (0: none): leave-one-out accuracy of 20 nearest neighbours among the
    vectors of the memory bank, or features kept for clustering, with folders as classes. No image is read for it."""
    probe_data: str | None = resumable(None)
    """Labelled images, train/<class>/ and val/<class>/, for measurements during training."""
    probe_every_epochs: int = resumable(0)
    """Epochs between measurements of val_knn_top1 and val_linear_top1 on probe_data (0: none): accuracies of 20 nearest
    neighbours and of a linear layer on the trunk's features. Every image is read each time."""
    checkpoint_every_steps: int = resumable(1000)
    """Steps between checkpoints; another one is written at the end and on SIGTERM or SIGINT."""
    keep_checkpoints: int = resumable(2)
    """Number of newest checkpoints to keep."""
    keep_every_steps: int = resumable(0)
    """Never delete checkpoints whose step is a multiple of this; 0: none."""
    checkpoint_store: Literal["auto", "file", "sharded"] = resumable("auto")
    """file: rank 0 gathers what is split over processes and writes one file. sharded: every process writes a file of
    its own, in the background, and reads its part of all at a resume, in a folder that all share. auto: sharded for
    several processes and checkpoints above 4.3 GB. Either resumes from the other's, with any number of processes."""
    tensorboard: bool = resumable(True)
    """Also write TensorBoard event files (needs the package tensorboard)."""
    loggers: tuple[str, ...] = resumable(())
    """Further logs besides log.jsonl: csv (log.csv), wandb and mlflow (both on this machine alone, unless WANDB_MODE or
    MLFLOW_TRACKING_URI says otherwise), or module:factory of your own."""
    pictures_every_epochs: int = resumable(0)
    """Epochs between pictures in pictures/ and in the logs (0: none): what the network sees of the first images, and
    nearest neighbours by the vectors of the memory bank or features kept for clustering; for other methods by the
    trunk's features of at most 512 images."""
    rank_timeout: float = resumable(1800.0)
    """Seconds that a process waits for the others, and never less than twice loader.timeout: then a dead machine or a
    stalled link ends the run with exit code 4. The first process's listing of new data is waited for, too."""
    progress: Literal["auto", "bar", "plain", "off"] = resumable("auto")
    """Progress display. auto: a bar on a terminal, else one line per log record."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "accumulate_steps",
            "nonfinite_limit",
            "log_every_steps",
            "checkpoint_every_steps",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.compile == "reduce-overhead" and self.accumulate_steps > 1:
            raise ValueError(
                "compile=reduce-overhead reuses the memory of one forward in the next and so needs accumulate_steps=1, "
                f"got {self.accumulate_steps}; use compile=default"
            )
        for name in ("keep_every_steps", "knn_every_epochs", "probe_every_epochs", "pictures_every_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if (self.probe_data is None) != (self.probe_every_epochs == 0):
            raise ValueError(
                "probe_data and probe_every_epochs belong together, got "
                f"probe_data={self.probe_data} with probe_every_epochs={self.probe_every_epochs}; give both or neither"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        self.check_numbers()

    def is_channels_last(self, device: torch.device, dtype: torch.dtype) -> bool:
        """``channels_last`` of a run on this device with this precision."""
        if self.channels_last is not None:
            return self.channels_last
        return device.type == "cuda" or dtype == torch.float32

    def check_numbers(self) -> None:
        """Raises ValueError for a number in this configuration or a nested one that is NaN, infinite or out of range;
        called at construction, and again before a run, since fields can be set."""
        check_numbers(self, LIMITS)
