"""The rules that keep the project findable: an op is one row of files, imports point one way, files stay readable."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sslfast"
SCHEMA = (ROOT / "csrc" / "library.cpp").read_text()
OPS = re.findall(r'"(\w+)\(Tensor', SCHEMA)

# From the bottom up. A package imports from lower floors and from itself, never from its own floor.
FLOORS: list[set[str]] = [
    {"ops"},
    {"files", "device", "optim", "text", "plugins"},
    {"config", "distributed", "data", "views"},
    {"loaders", "models", "runs"},
    {"methods", "weights", "adapters"},
    {"evaluation"},
    {"training", "report"},
    {"recipes"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
FLAT = {"__init__", "__main__", "config", "files", "device", "text", "plugins"}
ROOMS = 30
TORCH_ONLY = {"sslfast", "torch"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The package, or the flat module, that a module of sslfast lies in."""
    return module.split(".")[1]


def floor(module: str) -> int:
    found = [position for position, names in enumerate(FLOORS) if room(module) in names]
    assert found, f"{module} has no floor: add {room(module)} to FLOORS in tests/test_layout.py"
    return found[0]


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
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
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
    helpers = {"__init__", "_core", "_fallback", "_library", "permutations", "philox", "pixels", "view_parameters"}
    helpers |= {"crops"}  # host functions of the core, as permutations
    assert {path.stem for path in (PACKAGE / "ops").glob("*.py")} - helpers == set(OPS)
    for folder, suffix in (("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu")):
        assert {path.stem for path in (ROOT / folder).glob(suffix)} == set(OPS)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py" and name != "sslfast"]


def test_rooms() -> None:
    """What a newcomer sees at the top is short, and every flat module is one of the few that are meant to be."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == FLAT
    rooms = set(PACKAGES) | {f"sslfast.{name}" for name in FLAT}
    assert len(rooms) <= ROOMS, sorted(rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    path = MODULES[module]
    if module == "sslfast":
        top = {node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)}
        names = {getattr(node, "module", None) for node in top}
        assert names <= {"typing", "collections.abc"}, "sslfast/__init__.py imports nothing heavy"
        return
    for name in imports(path):
        if name == "sslfast" or not name.startswith("sslfast.") or room(name) == room(module):
            continue
        assert floor(name) < floor(module), f"{module} imports {name}, which is not on a lower floor"


def test_imports_form_no_circle() -> None:
    """File by file, imports inside functions included."""
    waiting = {
        module: {name for name in imports(path) if name in MODULES and name != "sslfast" and name != module}
        for module, path in MODULES.items()
        if module != "sslfast"
    }
    for name in PACKAGES:  # a package is what its modules are: who imports it waits for all that it exports
        assert name in waiting
    while waiting:
        done = [module for module, needed in waiting.items() if not needed & waiting.keys()]
        assert done, f"imports form a circle among {sorted(waiting)}"
        for module in done:
            del waiting[module]


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_entered_by_their_door(module: str) -> None:
    """What another package uses is in the ``__all__`` of the package that has it, as a name or as a whole module."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if module == "sslfast" or not isinstance(node, ast.ImportFrom) or not f"{node.module}".startswith("sslfast."):
            continue
        assert node.module is not None
        names = {alias.name for alias in node.names}
        package = next((name for name in reversed(PACKAGES) if f"{node.module}.".startswith(f"{name}.")), None)
        if package is None or f"{module}.".startswith(f"{package}.") or room(module) == room(node.module):
            continue
        exported = set(importlib.import_module(package).__all__)
        inner = node.module.removeprefix(package).lstrip(".").split(".")[0]
        modules = {name for name in names if f"{node.module}.{name}" in MODULES}
        assert inner in exported or names - modules <= exported, (
            f"{module} imports {sorted(names - exported)} of {node.module}: export them in {package}/__init__.py"
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for(package: str) -> None:
    module = importlib.import_module(package)
    words = (module.__doc__ or "").strip()
    assert re.match(r"[A-Z].*\.", words, re.S), f"{package}/__init__.py has no sentence on what it is for"
    assert "mport" in words, f"{package}/__init__.py does not say what it may import"
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name) or f"{package}.{name}" in MODULES, f"{package}.__all__ names {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_shadows_a_dependency(module: str) -> None:
    """``sslfast/loaders/torch.py`` would make ``import torch`` in its folder a riddle. ``adapters`` are named after
    what they stand in for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    taken = {re.split(r"[<>=~;\[ ]", name)[0].lower().replace("-", "_") for name in needed}
    taken = (taken - {"pillow"}) | {"pil", "sklearn", "cv2"}  # its package is called PIL
    own = {"sslfast.loaders.ffcv"}  # the loader of that library, found by its name
    assert module.split(".")[-1] not in taken or module in own


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=module_name)
def test_ops_need_torch_alone(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - TORCH_ONLY
    assert foreign == set()


def test_commands_start_without_the_compiler() -> None:
    code = (
        "import sys, sslfast.cli.pretrain, sslfast.evaluation.linear_probe, sslfast.report.build; "
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
