"""A trunk as a folder of the Hugging Face hub: weights, timm's configuration, a model card; and its upload."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sslfast.config import load_json, save_json
from sslfast.files import replacing, write_file
from sslfast.models import LibraryTrunk, LibraryTrunkConfig, trunk_name
from sslfast.weights.files import import_safetensors
from sslfast.weights.load import HUB_FILE, Weights

CONFIG, CARD = "config.json", "README.md"
_OURS = {HUB_FILE, CONFIG, CARD, ".git", ".gitattributes", ".cache"}
_REMEDY = "name another folder as OUT"
_SHOWN_ROWS = 100
_CROPPED = 96  # evaluations crop nothing of smaller images


def check_folder(folder: Path) -> None:
    """ValueError unless ``folder`` is new, empty or an earlier export: nothing else is overwritten."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, and format hub writes a folder; {_REMEDY}")
    others = sorted({path.name for path in folder.iterdir()} - _OURS)
    if others:
        raise ValueError(f"{folder} holds other files ({others[0]!r}); {_REMEDY}")


def write_hub(
    weights: Weights, state: Mapping[str, Tensor], run: Path, folder: Path, *, repository: str | None = None
) -> None:
    """Write the three files of a folder of the hub.

    Args:
        weights: the trunk.
        state: its state dict with timm's names.
        run: what they were read from: its evaluations go to the card.
        folder: see :func:`check_folder`.
        repository: that the folder is uploaded to.
    """
    content = import_safetensors().save(dict(state), metadata={"format": "pt"})
    with replacing(folder / HUB_FILE, remedy=_REMEDY) as temporary:
        temporary.write_bytes(content)
    save_json(folder / CONFIG, timm_config(weights), remedy=_REMEDY)
    name = folder.resolve().name
    write_file(folder / CARD, model_card(weights, run, name, repository or f"USER/{name}"), remedy=_REMEDY)


def timm_config(weights: Weights) -> dict[str, Any]:
    """timm's ``config.json``: architecture, its arguments, and the input that the weights were trained on."""
    size = weights.size
    cfg: dict[str, Any] = {
        "tag": "sslfast",
        "custom_load": False,
        "input_size": [3, size, size],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 0.875 if size >= _CROPPED else 1.0,
        "crop_mode": "center",
        "mean": list(weights.mean),
        "std": list(weights.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    arguments: dict[str, Any] = {}
    if isinstance(weights.model, LibraryTrunkConfig):
        trunk = weights.build()
        assert isinstance(trunk, LibraryTrunk)
        arguments, known = {**trunk.arguments}, getattr(trunk.network, "pretrained_cfg", {})
        if known.get("fixed_input_size"):  # the size that positions are learned for, which need not be that of images
            arguments.setdefault("img_size", known["input_size"][-1])
        cfg |= {key: known.get(key) for key in ("first_conv", "classifier")}
        any_size = arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False
        cfg["fixed_input_size"] = bool(known.get("fixed_input_size")) and not any_size
        name, features = weights.model.network.partition(".")[0], trunk.out_features
    else:
        name, features = weights.model.name, weights.build().out_features
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": cfg,
    }


def model_card(weights: Weights, run: Path, name: str, repository: str) -> str:
    """``README.md``: how the weights came about, how they are loaded, what their evaluations found."""
    facts = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in _origin(weights))
    rows = list(_evaluations(run))
    found = "No evaluation of these weights was found beside them." if not rows else _table(rows)
    mean, std = ([round(value, 4) for value in values] for values in (weights.mean, weights.std))
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- self-supervised-learning
- sslfast
- timm
---
# {_cell(name)}

An image encoder pretrained without labels by sslfast.

| | |
|---|---|
{facts}

## Use

```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:" and this folder
features = model(images)  # [B, 3, {weights.size}, {weights.size}], (RGB in 0..1 - {mean}) / {std}
```

`sslfast.load(FOLDER)` loads the folder too.

## Evaluations

{found}
"""


def _origin(weights: Weights) -> Iterator[tuple[str, Any]]:
    yield "network", trunk_name(weights.model).partition("=")[2]
    if isinstance(weights.model, LibraryTrunkConfig) and weights.model.options:
        yield "options of the network", weights.model.options
    yield "image size", f"{weights.size} px"
    for key in ("recipe", "method", "seed", "step", "epochs", "batch_size", "started_from", "data_digest"):
        if weights.facts.get(key) is not None:
            yield key.replace("_", " "), weights.facts[key]


def _evaluations(run: Path) -> Iterator[tuple[str, str, str, str]]:
    """(protocol, encoder, scores, images) of the results in a run directory or beside a file of weights; what has
    another shape is left out."""
    folder = run / "evaluation" if run.is_dir() else run.with_name(f"{run.name}.evaluation")
    for path in sorted(folder.glob("*.json")):
        try:
            result = load_json(path)
        except (ValueError, OSError):
            continue
        rows = result.get("results")
        data = result.get("val")
        images = f"{data['images']:,}" if isinstance(data, Mapping) and isinstance(data.get("images"), int) else ""
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping):
                scores = [
                    f"{key} {100 * value:.1f} %" for key, value in row.items()
                    if type(value) is float and 0 <= value <= 1 and re.fullmatch(r"top[15]|(voc07_)?(mAP|ap)\w*", key)
                ]  # fmt: skip
                if scores:
                    what = ", ".join(str(row[key]) for key in ("encoder", "layer") if key in row)
                    yield str(row.get("protocol", result.get("protocol"))), what, ", ".join(scores), images


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| protocol | encoder | scores | validation images |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows[:_SHOWN_ROWS]]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """One line of plain text: nothing of a foreign name ends a cell of a table or starts a tag."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[\s|<>]+", " ", text).strip()[:200]


def find_hub(name: str) -> Callable[[Path], None]:
    """What uploads a folder to a repository of the Hugging Face hub, checked before work starts.

    Raises:
        ImportError: huggingface_hub is missing.
        ValueError: no name of a repository, or nobody is logged in.
    """
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        raise ValueError(f"push must be USER/NAME or ORGANISATION/NAME, got {name!r}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"push needs the package huggingface_hub ({error}): pip install huggingface_hub") from None
    api = huggingface_hub.HfApi(library_name="sslfast")
    if huggingface_hub.get_token() is None:
        raise ValueError("push needs an account of the Hugging Face hub; log in with `hf auth login` or set HF_TOKEN")

    def upload(folder: Path) -> None:
        try:
            api.create_repo(name, private=True, exist_ok=True)
            files = [HUB_FILE, CONFIG, CARD]
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message="sslfast export")
        except Exception as error:  # of the network, of permissions: its classes differ between versions
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{folder} is written and could not be uploaded to {name} ({reason}); `hf upload {name} {folder}` "
                "uploads it"
            ) from None

    return upload
