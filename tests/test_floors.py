"""The floors of the design: a module imports only from smaller notebook numbers, and nothing is circular."""
from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9][0-9][0-9]_*.ipynb"))


def number_of(module: str, numbers: dict[str, int]) -> int | None:
    "The notebook number of a dotted name, or of the module that holds it."
    while module:
        if module in numbers: return numbers[module]
        module = module.rpartition(".")[0]
    return None


def exported(path: Path) -> str | None:
    cells = json.loads(path.read_text())["cells"]
    return next((f"recsys.{m[1]}" for c in cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(c["source"]), re.M))), None)


def imports(path: Path) -> list[str]:
    "Every recsys module named by an import, wherever in the file it stands."
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):  # nbdev writes `from recsys.schema` as `from .schema`
            here = path.relative_to(ROOT).with_suffix("").parts
            above = ".".join(here[: -node.level]) + "." if node.level else ""
            names += [f"{above}{node.module or ''}.{a.name}".replace("..", ".") for a in node.names]
    return [n for n in names if n.split(".")[0] == "recsys" and n != "recsys.__version__"]


NUMBERS = {m: int(p.name[:3]) for p in NOTEBOOKS if (m := exported(p))}


def test_every_notebook_has_a_number_of_its_own():
    assert len({p.name[:3] for p in NOTEBOOKS}) == len(NOTEBOOKS)
    assert all(int(p.parent.name[:3]) == int(p.name[0]) * 100 for p in NOTEBOOKS), "a notebook lies in the folder of its hundreds"


@pytest.mark.parametrize("module", sorted(NUMBERS))
def test_imports_only_from_lower_floors(module: str):
    path = ROOT / (module.replace(".", "/") + ".py")
    for name in imports(path):
        number = number_of(name, NUMBERS)
        assert number is not None, f"{module} imports {name}, which no notebook exports"
        assert number < NUMBERS[module], f"{module} ({NUMBERS[module]}) imports {name} ({number}): only smaller numbers are allowed"


FORBIDDEN = {"serving": {"torch", "mlflow", "deltalake", "recsys.training", "recsys.lake.tables"}}


def test_serving_imports_no_torch_mlflow_or_delta_at_run_time():
    import subprocess
    import sys
    names = [m for m in NUMBERS if m.startswith("recsys.serving.")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {names}]; print(sorted(set(sys.modules) & {FORBIDDEN['serving']}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_only_the_lake_opens_delta_tables_and_only_features_knows_feast():
    for path in (ROOT / "recsys").rglob("*.py"):
        text = path.read_text()
        if path.parts[-2:] != ("lake", "tables.py"): assert not re.search(r"^\s*(import|from) deltalake|scan_delta|read_delta", text, re.M), path
        if "features" not in path.parts and path.name != "feature_stores.py":  # a benchmark whose peer is Feast itself
            assert not re.search(r"^\s*(import|from) feast", text, re.M), path
