"""The architecture as a list: modules import only earlier ones, and libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clipdist"

LIGHT = [
    "config",
    "progress",
    "patience",
    "storage",
    "schema",
    "manifest",
    "ledger",
    "retry",
    "tally",
    "unit_tables",
    "lease",
    "journal",
    "scores",
    "topk",
    "metrics",
    "ranks",
    "retrieval",
    "deletes",
    "shard_writer",
    "cache",
    "shard_reader",
    "shards",
    "codes",
    "kernels",
    "scan",
    "code_store",
    "joining",
    "report",
    "upkeep",
    "spill",
    "compare",
    "update",
    "remove",
    "compact",
    "where",
    "search",
    "shares",
    "query_tables",
    "export",
    "approximate",
    "throughput",
    "plots",
    "gallery",
    "info",
]
LEARN = [
    "fetch",
    "images",
    "augment",
    "pictures",
    "loading",
    "batches",
    "tables",
    "folders",
    "sources",
    "captions",
    "duplicates",
    "planning",
    "vocab",
    "propose",
    "stages",
    "positives",
    "loss",
    "collectives",
    "anatomy",
    "image_size",
    "towers",
    "models",
    "interpolate",
    "memory",
    "recipe",
    "lanes",
    "reader",
    "loader",
    "optimizer",
    "step",
    "checkpoint",
    "outputs",
    "catalog",
    "encoding",
    "estimate",
    "validation",
    "opening",
    "loop",
    "history",
    "starter",
    "hits",
    "query",
    "query_encoder",
    "searcher",
    "terminal",
    "interactive",
]
RAY = [
    "runtime",
    "attempts",
    "units",
    "making",
    "unit_tasks",
    "prepare",
    "rescue",
    "embed",
    "workers",
    "train",
    "evaluate",
    "find",
    "search_actors",
    "search_job",
    "mine",
]
FRONT = ["demo", "cli"]
ORDER = [*LIGHT, *LEARN, *RAY, *FRONT]

LIGHT_LIBRARIES = {"numpy", "pyarrow", "pydantic", "pydantic_core", "yaml", "fsspec", "tqdm"}
INSIDE_FUNCTIONS = {
    "kernels": {"torch"},
    "export": {"faiss"},
    "plots": {"matplotlib"},
    "gallery": {"matplotlib", "jinja2", "PIL"},
}
ONLY_IN = {
    "ray": {*RAY, *FRONT},
    "open_clip": {"anatomy", "image_size", "models", "augment"},
    "torchvision": {"towers", "augment"},
    "torch.distributed": {"collectives"},
    "torch.nn.parallel": {"collectives"},
    "timm": {"anatomy", "starter"},
    "transformers": {"models", "text_encoder"},
}


def imports(source: str) -> tuple[set[str], set[str]]:
    """Dotted names imported at the top (type checking aside) and anywhere else in a module."""
    tree = ast.parse(source)
    top: set[str] = set()
    for node in tree.body:
        top |= _names(node) if isinstance(node, ast.Import | ast.ImportFrom) else set()
    everywhere = set().union(*(_names(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)), set())
    checked = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    only_types = set().union(
        *(_names(n) for part in checked for n in ast.walk(part) if isinstance(n, ast.ImportFrom)), set()
    )
    return top, everywhere - top - only_types


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        if node.module == "clipdist":
            return {f"clipdist.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
        return (
            {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            if node.module == "torch"
            else {node.module}
        )
    return set()


def faults(name: str, source: str) -> list[str]:
    """Every rule that a module breaks."""
    top, inside = imports(source)
    found = []
    for imported in top | inside:
        if imported.startswith("clipdist."):
            other = imported.split(".")[1]
            if other not in ORDER or ORDER.index(other) >= ORDER.index(name):
                found.append(f"{name} imports {other}, which does not stand before it")
        for library, places in ONLY_IN.items():
            if (imported == library or imported.startswith(library + ".")) and name not in places:
                found.append(f"{name} imports {library}")
    if name in LIGHT:
        stdlib_or_own = __import__("sys").stdlib_module_names | {"clipdist", "__future__"}
        heavy = {n.split(".")[0] for n in top} - stdlib_or_own - LIGHT_LIBRARIES
        late = {n.split(".")[0] for n in inside} - stdlib_or_own - LIGHT_LIBRARIES - INSIDE_FUNCTIONS.get(name, set())
        found += [f"{name} is light, but imports {library}" for library in sorted(heavy | late)]
    return found


def test_every_module_has_its_place() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_module_keeps_the_rules(name: str) -> None:
    assert faults(name, (PACKAGE / f"{name}.py").read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ledger", "from clipdist.search import Index"),
        ("ledger", "from clipdist import ledger"),
        ("search", "import torch"),
        ("search", "def f():\n    import torch"),
        ("loss", "import ray"),
        ("loop", "def f():\n    from ray import train"),
        ("loss", "import torch.distributed as dist"),
        ("loss", "from torch import distributed"),
        ("step", "from torch.nn.parallel import DistributedDataParallel"),
        ("batches", "import open_clip"),
        ("report", "def f():\n    import matplotlib"),
        ("plots", "import matplotlib"),
        ("config", "from clipdist import utils"),
    ],
)
def test_a_broken_rule_is_seen(name: str, source: str) -> None:
    assert faults(name, source)


@pytest.mark.parametrize(
    "module", ["unit_tasks", "units", "making", "search", "compact", "update", "search_job", "mine"]
)
def test_processes_that_do_without_torch_do_not_load_it(module: str) -> None:
    """Every worker process imports for itself: with torch and open_clip that takes seconds and half a GB."""
    code = f"import sys, clipdist.{module}; print({{'torch', 'open_clip', 'timm', 'matplotlib'}} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
