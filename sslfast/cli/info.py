"""``sslfast info``: versions, the compiled core, devices, loaders and packages; what is missing, with the remedy."""

import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import dataclass
from typing import Any

import torch

from sslfast import __version__
from sslfast.loaders import DISTRIBUTIONS, loader_status
from sslfast.ops import build_info
from sslfast.plugins import load_plugins

OPTIONAL = {
    "torchvision": "trunks for `sslfast pretrain`",
    "PIL": "decoding images",
    "tyro": "options of `sslfast pretrain`",
    "rich": "progress bars and tables",
    "tensorboard": "TensorBoard logs",
    "yaml": "configurations in YAML",
    "wandb": "--log wandb",
    "mlflow": "--log mlflow",
    "shtab": "`sslfast completion`",
    "pyarrow": "tables of images (.parquet, .arrow), --output FILE.parquet",
    "fsspec": "DATA that is a URL",
    "aiohttp": "https:// as DATA",
    "huggingface_hub": "hf:// as DATA, --push",
    "s3fs": "s3:// as DATA",
    "gcsfs": "gs:// as DATA",
    "pillow_heif": "HEIC images",
    "timm": "networks of timm, --format hub",
    "safetensors": ".safetensors files",
    "onnx": ".onnx files",
    "onnxscript": ".onnx files",
    "sklearn": "lowshot, embedding maps, photographs of `sslfast demo`",
    "pycocotools": "`sslfast evaluate detect`",
    "faiss": "DeepCluster",
    "submitit": "`sslfast launch slurm`",
    "skimage": "photographs of `sslfast demo`",
    "matplotlib": "charts of `sslfast bench`",
}
# A torchvision release belongs to one torch release: asked for alone, pip would replace the installed torch.
NAMES = {
    "yaml": "pyyaml",
    "mlflow": "mlflow-skinny",
    "pillow_heif": "pillow-heif",
    "faiss": "faiss-cpu",
    **DISTRIBUTIONS,
}
INSTALL = {"torchvision": "torch==2.11.0 torchvision==0.26.0", **NAMES}


@dataclass(kw_only=True)
class Info:
    """Versions, the compiled core, devices, loaders and packages; what is missing, with the remedy."""

    json: bool = False
    """Print JSON."""


def gather() -> dict[str, Any]:
    """All facts as plain data: ``versions``, ``core``, ``devices``, ``packages``, ``loaders``, ``plugins``."""
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            devices.append(f"cuda:{i} ({facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory >> 30} GiB)")
    return {
        "versions": {
            "sslfast": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "core": build_info(),
        "devices": devices,
        "packages": {name: _package(name) for name in OPTIONAL},
        "loaders": {
            name: {"usable": usable, "reason": reason, "remedy": remedy}
            for name, (usable, reason, remedy) in loader_status().items()
        },
        "plugins": dict(load_plugins()),
    }


def _package(name: str) -> str | None:
    """Installed version, or None; nothing is imported."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(NAMES.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def render(facts: dict[str, Any]) -> str:
    """The facts as lines for a terminal."""
    versions, core = facts["versions"], facts["core"]
    kernels = core["cuda_architectures"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"core      {core['note']}; {core['compiler']}",
        "kernels   CPU" + (f" and CUDA for {kernels}" if kernels else ""),
        *(f"{'devices' if i == 0 else '':9} {device}" for i, device in enumerate(facts["devices"])),
    ]
    if not kernels and torch.cuda.is_available():
        lines.append("          this build has no CUDA kernels: reinstall with SSLFAST_CUDA=1 and nvcc on PATH")
    for i, (name, status) in enumerate(facts["loaders"].items()):
        reason = status["reason"]
        text = f"usable: {reason}" if status["usable"] else f"not usable: {reason}; {status['remedy']}"
        lines.append(f"{'loaders' if i == 0 else '':9} {name:11} {text}")
    for i, (name, version) in enumerate(facts["packages"].items()):
        text = version or f"missing ({OPTIONAL[name]}): pip install {INSTALL.get(name, name)}"
        lines.append(f"{'packages' if i == 0 else '':9} {name:15} {text}")
    for i, (name, package) in enumerate(facts["plugins"].items()):
        lines.append(f"{'plugins' if i == 0 else '':9} {name:11} {package}")
    return "\n".join(lines)


def info(arguments: list[str]) -> int:
    """Run ``sslfast info``; returns the exit code."""
    chosen: Info | int = Info()
    if arguments:  # without options there is nothing to parse: then it also runs where only torch is installed
        import tyro

        from sslfast.cli.usage import parse

        chosen = parse(Info, arguments, prog="sslfast info", config=(tyro.conf.FlagCreatePairsOff,))
    if isinstance(chosen, int):
        return chosen
    facts = gather()
    print(json.dumps(facts, indent=2) if chosen.json else render(facts))
    return 0
