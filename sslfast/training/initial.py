"""The method of a run, its trunk initialised from a seed or from the weights that ``init`` names."""

import hashlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sslfast.config import save_json, to_dict
from sslfast.methods import BatchSplit, Method, MethodContext
from sslfast.models import LibraryTrunkConfig, TrunkConfig, build_trunk, initial_weights, trunk_name
from sslfast.runs import (
    INDEX,
    CheckpointStore,
    RunDirectory,
    TensorTable,
    is_sharded,
    list_checkpoints,
    load_checkpoint,
)
from sslfast.training.limits import check_trunk
from sslfast.weights import SeveralNetworksError, Weights, read_cached, read_weights

if TYPE_CHECKING:
    from sslfast.training.config import TrainConfig

_SHOWN = 4
_TOLERANCE = 1e-3  # of a normalisation: rounded in some configurations


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a new run started from; ``init.json`` of the run."""

    init: str
    """As given."""
    file: str
    sha256: str
    """Of the file; of the index of a sharded checkpoint."""
    step: int | None
    """Training steps of the weights, where known."""
    loaded: list[str]
    """Entries of the method's state that were loaded."""
    not_loaded: list[str]
    """Entries of the method's state that are initialised anew."""
    left_out: list[str]
    """Entries of the method in the file that were not used."""

    def record(self, run: RunDirectory) -> dict[str, Callable[[], None]]:
        """What writes it, for an outbox."""
        return {"init.json": lambda: save_json(run.path / "init.json", to_dict(self))}

    def lines(self) -> list[str]:
        """What was loaded and what was not, for the screen."""
        step = "" if self.step is None else f" after step {self.step}"
        first = f"initial weights: {len(self.loaded)} tensors of {_modules(self.loaded)} from {self.file}{step}"
        lines = [f"{first}, SHA-256 {self.sha256[:12]}"]
        if self.not_loaded:
            lines.append(f"not loaded: {len(self.not_loaded)} tensors of {_modules(self.not_loaded)} start anew")
        others = [name for name in self.left_out if name not in self.not_loaded]
        if others:
            lines.append(f"left out of the file: {len(others)} tensors of {_modules(others)}")
        return lines


def build_method(
    config: "TrainConfig",
    context: MethodContext,
    split: BatchSplit,
    resume: str,
    store: CheckpointStore,
    report: Callable[[str], None],
) -> tuple[Method, InitialWeights | None]:
    """The method of a run on the CPU.

    With ``config.init`` the trunk of a new run, and every copy that the method makes of it, has those weights; where
    they are those of a run of the same method, so have the other modules with parameters that fit (heads, the
    momentum encoder). Banks, queues and statistics of the data set start anew. A resumed run has its checkpoint's.

    Raises:
        ValueError, FileNotFoundError, ImportError: names what does not fit, with the remedy.
    """
    if config.init is None or resume not in ("auto", "never") or (resume == "auto" and store.list()):
        method = config.method.build(context)
        check_trunk(method.trunk, config, split)
        return method, None
    weights = _read(config.init, config.model)
    state = _fitting(weights, config)
    with initial_weights(state):
        method = config.method.build(context)
    check_trunk(method.trunk, config, split)
    before, names = method.state_dict(), _trunk_entries(method)
    own = _method_state(weights.path, config)
    loaded = [name for name in before if name in names]
    for name, module in method.named_children():
        if not any(True for _ in module.parameters()):
            continue
        found = {key.removeprefix(f"{name}."): own[key] for key in own if key.startswith(f"{name}.")}
        if _same_shapes(found, module.state_dict()):
            module.load_state_dict(found)
            loaded += [f"{name}.{key}" for key in found if f"{name}.{key}" not in loaded]
    with open(weights.path / INDEX if is_sharded(weights.path) else weights.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    initial = InitialWeights(
        init=config.init,
        file=str(weights.path),
        sha256=digest,
        step=weights.facts.get("step"),
        loaded=loaded,
        not_loaded=[name for name in before if name not in set(loaded)],
        left_out=[name for name in own if name not in set(loaded)],
    )
    for line in (*initial.lines(), *_normalisation(weights, config)):
        report(line)
    return method, initial


def _read(init: str, model: TrunkConfig) -> Weights:
    """Weights of a path, or timm's where they are on this machine."""
    path, library = Path(init), model if isinstance(model, LibraryTrunkConfig) else None
    if path.exists():
        try:
            return read_weights(path, model=None if path.is_dir() else library or model)
        except SeveralNetworksError as error:
            network = "" if library is None else f" --model {library.name}"
            raise ValueError(
                f"init={init}: {error.found}; `sslfast export {shlex.quote(init)} ONE.safetensors --prefix "
                f"{shlex.quote(error.prefixes[0])}{network}` takes one of them out of it; give that file"
            ) from None
    if init.startswith("timm/"):
        named = LibraryTrunkConfig(name=init)
        if library is not None and _architecture(library) == _architecture(named):
            named = LibraryTrunkConfig(name=init, options=library.options)
        file, state, known = read_cached(named)
        return Weights(model=named, state=state, source=init, path=file, **known)
    if init.startswith("torchvision/"):
        network = init.partition("/")[2]
        raise FileNotFoundError(
            f"init={init}: torchvision's weights are given as a file; `python -c \"import torchvision; "
            f"torchvision.models.get_model({network!r}, weights='DEFAULT')\"` downloads one and names it"
        )
    raise FileNotFoundError(
        f"init={init} does not exist; give a run directory, a file of weights that sslfast.load reads, or timm/NAME"
    )


def _architecture(config: LibraryTrunkConfig) -> str:
    return config.name.partition(".")[0]


def _fitting(weights: Weights, config: "TrainConfig") -> dict[str, Tensor]:
    """The state dict of the run's trunk with these weights. ValueError names the entries that do not fit."""
    wanted = build_trunk(config.model, seed=0).state_dict()
    state = _renamed(weights.state, wanted)
    wrong = [
        f"{name} {_shape(state.get(name))} there and {_shape(wanted.get(name))} here"
        for name in (*wanted, *(name for name in state if name not in wanted))
        if _shape(state.get(name)) != _shape(wanted.get(name))
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"init={config.init} is of another network than {trunk_name(config.model)}: "
            f"{', '.join(wrong[:_SHOWN])}{more}; start with {_options(weights.model, config.model)}"
        )
    return state


def _renamed(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the prefix of the wanted one: torchvision's and timm's ResNets have the names of sslfast's."""
    ours, theirs = (all(name.startswith("network.") for name in names) for names in (wanted, state))
    if theirs and not ours:
        return {name.removeprefix("network."): value for name, value in state.items()}
    return {f"network.{name}": value for name, value in state.items()} if ours and not theirs else dict(state)


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(list(value.shape))


def _options(model: TrunkConfig, given: TrunkConfig) -> str:
    """The options of ``sslfast pretrain`` that choose a trunk in place of the one that is given."""
    words, same = [], to_dict(given) if type(given) is type(model) else {}
    for name, value in to_dict(model).items():
        if isinstance(value, dict):
            value = " ".join(f"{key} {one}" for key, one in value.items())
        if (
            name == "zero_init_residual"
            or (name != "name" and same.get(name) == value)
            or value == ""
            or (name == "name" and value == "custom")
        ):
            continue
        words.append(f"--model.{name.replace('_', '-')} {value}")
    return " ".join(words)


def _trunk_entries(method: Method) -> set[str]:
    """Names of the trunk's entries, and of those of its copies, in the state of a method."""
    trunk = method.trunk.state_dict()
    copies = [
        name
        for name, module in method.named_children()
        if name.endswith("trunk") and _same_shapes(trunk, module.state_dict())
    ]
    return {f"{copy}.{name}" for copy in copies for name in trunk}


def _method_state(path: Path, config: "TrainConfig") -> Mapping[str, Tensor]:
    """State of the method in a checkpoint of a run of the same method; empty for everything else."""
    if path not in list_checkpoints(path.parent) and not is_sharded(path):
        return {}
    state = load_checkpoint(path)
    recorded, method = state.get("config"), state.get("method")
    if not isinstance(recorded, Mapping) or not isinstance(method, Mapping):
        return {}
    if not isinstance(recorded.get("method"), Mapping) or recorded["method"].get("name") != config.method.name:
        return {}
    if isinstance(method, TensorTable):
        return method
    return {name: value for name, value in method.items() if isinstance(value, Tensor)}


def _same_shapes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)


def _normalisation(weights: Weights, config: "TrainConfig") -> list[str]:
    """A line where the run normalises its images otherwise than these weights are used to."""
    augment = config.method.image_view.augment
    pairs = [(weights.mean, augment.mean), (weights.std, augment.std)]
    if all(abs(a - b) <= _TOLERANCE for old, new in pairs for a, b in zip(old, new, strict=True)):
        return []
    return [
        f"the initial weights are of images normalised by mean {list(weights.mean)} and std {list(weights.std)}, and "
        f"this run's by {list(augment.mean)} and {list(augment.std)} (method.image_view.augment)"
    ]


def _modules(names: list[str]) -> str:
    found = dict.fromkeys(name.partition(".")[0] for name in names)
    return ", ".join(found)
