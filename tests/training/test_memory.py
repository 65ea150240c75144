"""The memory of a step is known before it, for every recipe, and close to what a step takes."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslfast.loaders.registry import LoaderConfig
from sslfast.models import ResNetConfig
from sslfast.recipes import RECIPES
from sslfast.training.dry_run import check_memory, estimate_memory
from sslfast.training.trainer import Trainer
from tests.methods.harness import ROWS, tiny, tiny_trunks
from tests.training.test_limits import BUILT_IN, SIZES, of_method


class Peak(TorchDispatchMode):
    """Largest number of bytes of tensors made inside that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("recipe", RECIPES)
def test_activations_are_known_for_every_recipe(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]()
    assert isinstance(config.model, ResNetConfig)
    config = replace(
        config,
        model=ResNetConfig(name="resnet18", stem="small", norm=config.model.norm),
        loader=LoaderConfig(name="synthetic", workers=0),
        batch_size=32,
        device="cpu",
        precision="fp32",
        tensorboard=False,
    )
    with tiny_trunks():  # in place of a trunk of seconds
        trainer = Trainer(config, 20_000, tmp_path / "run", report=lambda _line: None)
    needs = estimate_memory(trainer)
    trainer.close()
    assert needs["activations"] > needs["views"]


@pytest.mark.parametrize("method", BUILT_IN)
def test_the_estimate_is_near_the_peak_of_a_step(method: str, tmp_path: Path) -> None:
    config = tiny(of_method(method), **SIZES.get(method, {}))
    with tiny_trunks():
        trainer = Trainer(config, ROWS, tmp_path / "run", report=lambda _line: None)
    needs = estimate_memory(trainer)
    with tiny_trunks():
        trainer = Trainer(config, ROWS, tmp_path / "run", report=lambda _line: None)
    trainer.method.train()
    batches = trainer.loader.epoch(0)
    with Peak() as peak:
        trainer.train_step(batches)
    made = needs["gradients"] + needs["views"] + needs["activations"]
    assert made / 3 < peak.peak < 3 * made
    trainer.close()


def test_the_line_says_when_a_method_cannot_be_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_trunks():
        trainer = Trainer(tiny(of_method("rotation")), ROWS, tmp_path / "run", report=lambda _line: None)
    monkeypatch.setattr(trainer.method, "forward", lambda views, rows, step: {"loss": float(rows.sum())})
    assert "activations unknown" in check_memory(trainer)
    trainer.close()
