"""Where other projects' files keep a trunk: a search for the names of a ResNet under any prefix."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_DEEPEST = 6
_SHOWN = 6
PREFERRED = (
    ("encoder_q", "encoder_k"),
    ("base_encoder", "momentum_encoder"),
    ("backbone", "momentum_backbone"),
    ("backbone", "backbone_momentum"),
    ("teacher", "student"),
    ("teacher_backbone", "student_backbone"),
    ("teacher_model", "student_model"),
    ("backbone", "anchor_backbone"),
    ("backbone", "target_backbone"),
    ("online_backbone", "target_backbone"),
    ("encoder", "momentum_encoder"),
    ("encoder", "target_encoder"),
    ("encoder", "encoder_k"),
    ("encoder", "encoder_m"),
    ("model", "momentum_model"),
    ("model", "model_m"),
    ("online_network", "target_network"),
    ("online_encoder", "target_encoder"),
    ("online", "target"),
    ("trunk", "target_trunk"),
    ("trunk", "key_trunk"),
)
"""Of networks trained side by side, the one that its project evaluates, and the one that is left."""


class SeveralNetworksError(ValueError):
    """A file holds several networks, and none was chosen."""

    def __init__(self, found: str, prefixes: list[str]) -> None:
        super().__init__(f"{found}; choose one with --prefix")
        self.found, self.prefixes = found, prefixes


@dataclass(frozen=True)
class Names:
    """A way of naming the layers of a ResNet."""

    name: str
    first: tuple[str, str]
    """Two entries that every ResNet has: of the first convolution and of the first block."""
    rename: Callable[[str], str | None]
    """An entry's name after the prefix to torchvision's; None: no part of the trunk."""


def _torchvision(name: str) -> str | None:
    return name if re.match(r"(conv1|bn1|layer[1-4])\.", name) else None


_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def _sequential(name: str) -> str | None:
    first, _, rest = name.partition(".")
    return f"{_CHILDREN[first]}.{rest}" if first in _CHILDREN else None


def _detectron2(name: str) -> str | None:
    found = re.match(r"(?:stem|res([2-5]))\.(.*)", name)
    if found is None:
        return None
    rest = re.sub(r"conv([123])\.norm\.", r"bn\1.", found[2])
    rest = rest.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return f"layer{int(found[1]) - 1}.{rest}" if found[1] else rest


def _transformers(name: str) -> str | None:
    parts = {"convolution": ("conv", "downsample.0"), "normalization": ("bn", "downsample.1")}
    stem = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(.*)", name)
    if stem is not None:
        return f"{parts[stem[1]][0]}1.{stem[2]}"
    block = re.fullmatch(
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.(layer\.(\d)|shortcut)\.(convolution|normalization)\.(.*)", name
    )
    if block is None:
        return None
    stage, number, _, layer, kind, rest = block.groups()
    own = parts[kind][1] if layer is None else f"{parts[kind][0]}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{number}.{own}.{rest}"


NAMES = (
    Names("torchvision names", ("conv1.weight", "layer1.0.conv1.weight"), _torchvision),
    Names("numbered children", ("0.weight", "4.0.conv1.weight"), _sequential),
    Names("detectron2 names", ("stem.conv1.weight", "res2.0.conv1.weight"), _detectron2),
    Names(
        "transformers names",
        ("embedder.embedder.convolution.weight", "encoder.stages.0.layers.0.layer.0.convolution.weight"),
        _transformers,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A trunk in a file."""

    prefix: str
    """Of its entries: keys of the nested dictionaries and the beginning of the names, joined by dots."""
    names: str
    """How its layers are named."""
    state: dict[str, Tensor]
    """torchvision's names."""
    head: dict[str, Tensor]
    """What follows it as ``fc``, without that prefix: a projection head or a classifier."""

    def __str__(self) -> str:
        return f"{self.prefix}*, {self.names}" if self.prefix else self.names


def find_trunk(where: str, content: Any, prefix: str | None = None) -> Found:
    """The trunk in a file's content.

    Args:
        where: the file, for messages.
        content: nested dictionaries with tensors.
        prefix: which, where there are several: the beginning of its prefix, or all of it; None: the only one, or the
            one of a pair that its project evaluates (:data:`PREFERRED`).

    Raises:
        ValueError: there is none, or several and none is chosen (SeveralNetworksError).
    """
    found = list(_search(content, ""))
    if not found:
        raise ValueError(
            f"{where} holds no ResNet: no prefix has {' and '.join(NAMES[0].first)} behind it; the first entries are "
            f"{_first_entries(content)}: save its state dict with torchvision's names; `sslfast export FILE OUT "
            "--model timm/NAME` takes another network out of it"
        )
    return _choose(found, where, "ResNets", prefix)


def find_network(where: str, content: Any, name: str, wanted: Mapping[str, Tensor], prefix: str | None = None) -> Found:
    """A network with known names of entries in a file's content, behind any prefix.

    Args:
        where: the file, for messages.
        content: nested dictionaries with tensors.
        name: of the network, for messages.
        wanted: its state dict; entries of that shape are taken.
        prefix: as of :func:`find_trunk`.

    Raises:
        ValueError: there is none, several and none is chosen, or entries are missing or have other shapes.
    """
    found = [one for one in _search_names(content, "", list(wanted)) if _share(one, wanted) > _LEAST_SHARE]
    if not found:
        raise ValueError(
            f"{where} holds no {name}: no prefix has {next(iter(wanted))} and most of its other entries behind it; the "
            f"first entries are {_first_entries(content)}: give the network that these weights are of"
        )
    chosen = _choose(found, where, f"networks like {name}", prefix)
    wrong = [entry for entry in wanted if entry not in chosen.state and not entry.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(
            f"{where} ({chosen}) lacks {_some(wrong)} of {name}: give the network that these weights are of"
        )
    odd = [
        f"{entry} {list(chosen.state[entry].shape)} in place of {list(value.shape)}"
        for entry, value in wanted.items()
        if entry in chosen.state and chosen.state[entry].shape != value.shape
    ]
    if odd:
        raise ValueError(
            f"{where} ({chosen}) has {_some(odd)} of {name}: give the network and the options that these weights are of"
        )
    return chosen


_LEAST_SHARE = 0.5  # of the names of a network, behind a prefix that is meant to hold it


def _share(found: Found, wanted: Mapping[str, Tensor]) -> float:
    return len(found.state.keys() & wanted.keys()) / len(wanted)


def _some(words: list[str]) -> str:
    rest = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _first_entries(content: Any) -> str:
    shown = [f"{name} {list(value.shape)}" for name, value in _entries(content, "")][:_SHOWN]
    return ", ".join(shown) or "no tensors"


def _search_names(content: Any, path: str, wanted: list[str], depth: int = 0) -> Iterator[Found]:
    """Networks with the first of ``wanted`` behind some prefix: the entries that it has of them."""
    content = _with_keys(content)
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name in tensors:
        prefix = name.removesuffix(wanted[0])
        if name == prefix or (prefix and not prefix.endswith(".")):
            continue
        state = {key: tensors[prefix + key] for key in wanted if prefix + key in tensors}
        yield Found(prefix=f"{path}{prefix}", names="its library's names", state=state, head={})
    for key, value in content.items():
        yield from _search_names(value, f"{path}{key}.", wanted, depth + 1)


def _choose(found: list[Found], where: str, kind: str, prefix: str | None) -> Found:
    """The one that ``prefix`` names, the only one, or the one of a pair that its project evaluates."""
    if prefix is not None:
        chosen = [one for one in found if one.prefix == prefix or one.prefix == f"{prefix}."]
        chosen = chosen or [one for one in found if one.prefix.startswith(prefix)]
    else:
        known = {_plain(one.prefix) for one in found}
        chosen = [one for one in found if not any(_twin(one.prefix, *pair) in known for pair in PREFERRED)]
    if len(chosen) == 1:
        return chosen[0]
    prefixes = ", ".join(repr(one.prefix) for one in found)
    if prefix is not None:
        raise ValueError(
            f"{where} holds {len(chosen) or 'no'} {kind} whose prefix begins with {prefix!r}; --prefix must name one "
            f"of {prefixes}"
        )
    raise SeveralNetworksError(
        f"{where} holds {len(found)} {kind}, with the prefixes {prefixes}", [one.prefix for one in found]
    )


def _twin(prefix: str, kept: str, dropped: str) -> tuple[str, ...] | None:
    """The prefix of the network that is preferred to this one, if it is the ``dropped`` one of a pair."""
    words = _plain(prefix)
    return tuple(kept if word == dropped else word for word in words) if dropped in words else None


def _plain(prefix: str) -> tuple[str, ...]:
    """The words of a prefix without those of wrappers: DINO's student is wrapped, its teacher is not."""
    return tuple(word for word in prefix.split(".") if word not in ("module", "_orig_mod"))


def _search(content: Any, path: str, depth: int = 0) -> Iterator[Found]:
    content = _with_keys(content)
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for names in NAMES:
        for name in tensors:
            prefix = name.removesuffix(names.first[0])
            if name == prefix or (prefix and not prefix.endswith(".")) or tensors[name].ndim != 4:
                continue
            if f"{prefix}{names.first[1]}" not in tensors:
                continue
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            state = {new: value for key, value in own.items() if (new := names.rename(key)) is not None}
            head = {key.removeprefix("fc."): value for key, value in own.items() if key.startswith("fc.")}
            yield Found(prefix=f"{path}{prefix}", names=names.name, state=state, head=head)
    for key, value in content.items():
        yield from _search(value, f"{path}{key}.", depth + 1)


_MOST_ITEMS = 16  # of a list that may hold networks: optimizers have thousands of numbers


def _with_keys(content: Any) -> Any:
    """Lists with the numbers of their items as keys."""
    is_list = isinstance(content, list | tuple) and len(content) <= _MOST_ITEMS
    return {str(number): value for number, value in enumerate(content)} if is_list else content


def _entries(content: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    content = _with_keys(content)
    if isinstance(content, Mapping) and depth <= _DEEPEST:
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield f"{path}{key}", value
            else:
                yield from _entries(value, f"{path}{key}.", depth + 1)
