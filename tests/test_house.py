"""The plan of the house: who may import whom, and that what a model family is stands in one place."""

import ast
import importlib
from pathlib import Path

import pytest

from models.family import FAMILIES

ROOT = Path(__file__).parent.parent
# from the top down: a file may import what stands below its own line, and, inside a folder, its neighbours
ORDER = (
    ("benchmarks",),
    ("train",),
    ("sample", "evaluate"),
    ("student", "scores"),
    ("models",),
    ("data", "layers", "hgs_lora"),
    ("run", "kernels", "hessian"),
    ("quant",),
    ("backends", "qra", "tdpt"),
)
ALONE = ("qra", "tdpt", "run.common", "backends.cpu", "backends.gpu", "backends.gptq_gpu", "data.scenes")  # import nothing of ours
MOST_FLOORS = 9


def modules() -> dict[str, Path]:
    """Name -> file of every module outside of tests."""
    files = [
        *ROOT.glob("*.py"),
        *(file for folder in ("benchmarks", "models", "data", "run", "backends") for file in (ROOT / folder).glob("*.py")),
    ]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.name != "__init__.py"}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Our modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file, known) for name, file in known.items()}


def test_arrows_run_downwards_only(arrows):
    """Catches a component that reaches for what is built on it, and a circle that an import inside a function hides."""
    height = {unit: -i for i, line in enumerate(ORDER) for unit in line}
    for name, targets in arrows.items():
        unit = name.split(".")[0]
        for target in targets:
            below = target.split(".")[0]
            assert below == unit != name or height[below] < height[unit], f"{name} imports {target}"
    for name in ALONE:
        assert not arrows.get(name), f"{name} imports {arrows[name]}"


def test_what_a_module_takes_from_another_by_its_name_is_there():
    """Catches a benchmark that nothing else runs, and that asks for a function which was renamed."""
    known = modules()
    for name, file in known.items():
        tree, ours = ast.parse(file.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                    if full in known and (isinstance(node, ast.ImportFrom) or "." not in full or alias.asname):
                        ours[alias.asname or alias.name] = full
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ours.keys() - stored - arguments
            ):
                module = importlib.import_module(ours[node.value.id])
                assert hasattr(module, node.attr), f"{name}:{node.lineno}: {ours[node.value.id]} has no {node.attr}"


def test_there_is_no_circle_and_no_more_floors_than_planned(arrows):
    """Catches neighbours in a folder that import each other, and a tower of modules."""
    floors = {}

    def floor(name: str, above: tuple = ()) -> int:
        assert name not in above, " -> ".join((*above, name))
        if name not in floors:
            floors[name] = 1 + max((floor(target, (*above, name)) for target in arrows[name]), default=0)
        return floors[name]

    assert max(map(floor, arrows)) <= MOST_FLOORS, sorted(floors.items(), key=lambda item: -item[1])[:9]


def test_only_the_records_ask_which_family_a_model_is_of():
    """Catches name == "flux", isinstance(net, UNet2DConditionModel) and hasattr(pipe, "unet") outside of models/family.py."""
    classes = {family.network.__name__ for family in FAMILIES.values()}
    words = FAMILIES.keys() | {family.part for family in FAMILIES.values()} - {""}
    for name, file in modules().items():
        if name in ("models.family", "models.tiny") or name.startswith("benchmarks."):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            assert not (isinstance(node, ast.Name | ast.alias) and getattr(node, "id", getattr(node, "name", "")) in classes), where
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            asked = node.args[1:2] if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("hasattr", "getattr") else []
            for value in (*compared, *asked):
                assert not (isinstance(value, ast.Constant) and value.value in words), where
