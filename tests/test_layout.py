"""The rules that keep the project findable: an op is one row of files, imports point one way, files stay readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sslfast"
SCHEMA = (ROOT / "csrc" / "library.cpp").read_text()
OPS = re.findall(r'"(\w+)\(Tensor', SCHEMA)

# From the bottom up. A module may import from lower layers and from its own.
LAYERS: list[list[str]] = [
    ["sslfast._C", "sslfast.__version__"],
    ["sslfast.ops"],
    ["sslfast.config", "sslfast.files", "sslfast.images", "sslfast.interrupt", "sslfast.jpeg_scan",
     "sslfast.shards", "sslfast.listing"],
    ["sslfast.models", "sslfast.bank", "sslfast.bank_shards", "sslfast.optim", "sslfast.distributed", "sslfast.meeting",
     "sslfast.checkpoint", "sslfast.manifest",
     "sslfast.metrics", "sslfast.rundir", "sslfast.weights", "sslfast.resume", "sslfast.loaders.batch",
     "sslfast.adapters", "sslfast.permutations"],
    ["sslfast.methods", "sslfast.loaders", "sslfast.evaluation"],
    ["sslfast.train_config", "sslfast.data_pass", "sslfast.run_data", "sslfast.prefetch", "sslfast.nonfinite",
     "sslfast.online_knn", "sslfast.recorder",
     "sslfast.trainer", "sslfast.memory"],
    ["sslfast.recipes"],
    ["sslfast.summary", "sslfast.figures", "sslfast.bench", "sslfast.bench_loader", "sslfast.bench_step",
     "sslfast.export", "sslfast.report", "sslfast.info",
     "sslfast.demo", "sslfast.demo_data"],
    ["sslfast.cli", "sslfast.commands", "sslfast.__main__"],
]  # fmt: skip
TORCH_ONLY = {"sslfast", "torch"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    """The layer of the longest entry that the module lies under."""
    found = [
        (len(entry), position)
        for position, entries in enumerate(LAYERS)
        for entry in entries
        if module == entry or module.startswith(entry + ".")
    ]
    assert found, f"{module} has no layer: add it to LAYERS in tests/test_layout.py"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, except for type checking alone."""
    names: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            names.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = PACKAGE.parent / Path(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir() or alias.name == "_C"
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)

    Visitor().visit(ast.parse(path.read_text()))
    return names


def test_schema_names_ops() -> None:
    assert {"bank_nce", "negative_rows", "bank_update_", "rotate90", "jigsaw_patches"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_is_a_row(op: str) -> None:
    for path in (
        f"csrc/{op}.h",
        f"csrc/cpu/{op}.cpp",
        f"csrc/cuda/{op}.cu",
        f"sslfast/ops/{op}.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ):
        assert (ROOT / path).is_file(), f"op {op}: {path} is missing"
    face = (PACKAGE / "ops" / f"{op}.py").read_text()
    assert f"def {op}(" in face
    assert f"def {op.rstrip('_')}_reference(" in face
    assert f'register_fake("sslfast::{op}")' in face
    test = (ROOT / "tests" / "ops" / f"test_{op}.py").read_text()
    for needed in ("opcheck", "fullgraph=True", "empty", "contiguous", "pytest.raises"):
        assert needed in test, f"tests/ops/test_{op}.py never says {needed}"
    if "register_autograd" in face:
        assert "gradcheck" in test
    for device, path in (("CPU", f"csrc/cpu/{op}.cpp"), ("CUDA", f"csrc/cuda/{op}.cu")):
        assert f"STABLE_TORCH_LIBRARY_IMPL(sslfast, {device}, m)" in (ROOT / path).read_text()
    import sslfast.ops

    assert {op, f"{op.rstrip('_')}_reference"} <= set(sslfast.ops.__all__)


@pytest.mark.parametrize("op", OPS)
def test_kernel_runs_on_the_cpu(op: str) -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "ops").glob("test_cuda_*.py"))
    assert f'"{op}"' in tests, f"csrc/cuda/{op}.cu never runs in tests/ops/test_cuda_*.py"


def test_kernels_reach_cuda_through_headers() -> None:
    """What the CPU emulation stands in for is in one place: no cuda* call, no launch, no assembly elsewhere."""
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        code = re.sub(r"//.*", "", path.read_text())
        found = re.findall(r"\bcuda(?!Stream_t)[A-Z]\w*|<<<|\basm\b", code)
        assert not found, f"{path.name} uses {found}: wrap it in csrc/common/launch.cuh or ptx.cuh"


def test_no_op_without_a_schema() -> None:
    helpers = {"__init__", "_library", "philox", "pixels"}
    assert {path.stem for path in (PACKAGE / "ops").glob("*.py")} - helpers == set(OPS)
    for folder, suffix in (("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu")):
        assert {path.stem for path in (ROOT / folder).glob(suffix)} == set(OPS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    if module == "sslfast":
        top = {node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)}
        assert {getattr(node, "module", None) for node in top} == {"typing"}, "sslfast/__init__.py imports nothing"
        return
    own = layer(module)
    for name in imports(path):
        if name == "sslfast" or not name.startswith("sslfast"):
            continue
        assert layer(name) <= own, f"{module} (layer {own}) imports {name} (layer {layer(name)})"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=module_name)
def test_ops_need_torch_alone(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - TORCH_ONLY
    assert foreign == set()


def test_commands_start_without_the_compiler() -> None:
    code = (
        "import sys, sslfast.commands, sslfast.evaluation.linear, sslfast.report.build; "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_ops_loads_nothing_heavy() -> None:
    code = (
        "import sys; import torch; before = set(sys.modules); import sslfast.ops; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torchvision", "PIL", "rich", "tyro", "tensorboard", "skimage", "sklearn", "scipy", "matplotlib"}
    assert heavy & set(loaded.stdout.split()) == set()


def test_files_stay_readable() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_no_pickles_are_loaded_and_nothing_is_switched_off() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError", text), path
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__).resolve():
            assert not re.search(r"pytest\.(mark\.)?(skip|xfail)\b", path.read_text()), path


def test_large_files_stay_out() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True)
    for path in (ROOT / line for line in listed.stdout.splitlines()):
        if path.exists():
            assert path.stat().st_size <= 1 << 20, f"{path.relative_to(ROOT)} is over 1 MiB"
