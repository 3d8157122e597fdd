"""The rules of the house, held by reading the source: who may import whom, what stays out, how long things grow."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cluster.topology_file import section_keys
from protocol.topology import Topology

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "cluster": {"worker", "router.launch", "router.front.chat_template", "models", "protocol"},
    "router": {"router.launch", "router.front", "router.control", "models", "protocol"},
    "router.front": {"router.control", "router.front.chat_template", "protocol"},
    "router.front.chat_template": {"protocol"},
    "router.control": {"router.launch", "protocol"},
    "router.launch": {"protocol"},
    "worker": {"prefill_worker", "decode_worker", "engine", "models", "kv_transfer", "kernels", "protocol"},
    "prefill_worker": {"engine", "kernels", "kv_transfer", "protocol"},
    "decode_worker": {"engine", "kernels", "kv_transfer", "protocol"},
    "engine": {"models", "kernels", "protocol"},
    "models": {"kernels", "protocol"},
    "kv_transfer": {"kernels", "protocol"},
    "protocol": set(),
    "kernels": set(),
}
"""room -> the rooms of ours that it may import, besides itself."""

WITHOUT_TORCH = (
    *("router.process", "protocol.messages", "protocol.topology", "kv_transfer.plan", "cluster.__main__"),
    *("models.loading", "models.files"),
)

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system"}
FORBIDDEN_METHODS = {
    *("recv_pyobj", "send_pyobj"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),  # these pickle
    *("send_object_list", "recv_object_list"),
}
FORBIDDEN_TEXTS = ("0.0.0.0", "tcp://*")

MAX_FILE_LINES = 300
MAX_MEDIAN_FUNCTION_LINES = 10
MAX_FUNCTION_LINES = 60

MEANS_TWO_THINGS = {
    # engine/tensor_parallel.py's cuts tensors; protocol/layout.py's travels in frames, so it is a bare tuple; kernels,
    # which import nothing, say once more that it is one
    "Range",
}
"""Names of types that may be defined more than once, and why."""

FOLDERS = sorted({room.partition(".")[0] for room in MAY_IMPORT})
PRODUCT = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def broken(rule: Callable[[Path], object], paths: Iterable[Path] = PRODUCT) -> dict[str, object]:
    """Return what a rule finds wrong, by file."""
    return {name_of(path): found for path in paths if (found := rule(path))}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_imports_go_down_the_table_only():
    assert broken(forbidden_imports) == {}


def forbidden_imports(path: Path) -> set[str]:
    own = room_of(module_name(path))
    return {name for name in imports(tree_of(path)) if room_of(name) not in (None, own, *MAY_IMPORT[own])}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str | None:
    """Return the innermost room that a module is in; None when it is not ours."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in MAY_IMPORT), None)


def test_the_search_for_forbidden_imports_finds_them(tmp_path: Path):
    assert room_of("router.front.app") == "router.front"
    assert room_of("router.launch") == "router.launch"
    assert room_of("router.process") == "router"
    assert room_of("msgspec") is None


def test_no_import_is_relative():
    assert broken(relative_imports) == {}


def relative_imports(path: Path) -> list[int]:
    return [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_router_and_the_command_line_start_without_torch(module: str):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'ray', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_nothing_unpickles_evaluates_or_listens_to_everyone():
    assert broken(lambda path: list(dangers(tree_of(path)))) == {}


def dangers(tree: ast.AST) -> Iterator[str]:
    yield from sorted(FORBIDDEN_MODULES & {name.partition(".")[0] for name in imports(tree)})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
                yield f"line {node.lineno}: {name}"
            if any(word.arg == "shell" and not is_false(word.value) for word in node.keywords):
                yield f"line {node.lineno}: shell"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (f"line {node.lineno}: {text}" for text in FORBIDDEN_TEXTS if text in node.value)


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(x)",
        "torch.load(path)",
        "yaml.load(text, Loader)",
        "socket.recv_pyobj()",
        "dist.broadcast_object_list(x)",
        "run('ls', shell=True)",
        "bind('tcp://*:1')",
        "host = '0.0.0.0'",
    ],
)
def test_the_search_for_dangers_finds_them(code: str):
    assert len(list(dangers(ast.parse(code)))) == 1


def test_every_module_says_what_it_is():
    assert broken(lambda path: not ast.get_docstring(tree_of(path))) == {}


def test_no_file_and_no_function_grows_without_bound():
    assert broken(lambda path: len(path.read_text().splitlines()) > MAX_FILE_LINES) == {}
    assert broken(long_functions) == {}


def long_functions(path: Path) -> list[str]:
    return [node.name for node in functions(tree_of(path)) if num_lines(node) > MAX_FUNCTION_LINES]


def test_no_name_of_a_type_means_two_things():
    found: dict[str, list[str]] = {}
    for path in PRODUCT:
        for name in types_defined_in(tree_of(path)):
            found.setdefault(name, []).append(name_of(path))
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert {name: places for name, places in twice.items() if name not in MEANS_TWO_THINGS} == {}


def types_defined_in(tree: ast.Module) -> Iterator[str]:
    """Yield the public classes and type aliases of a module; a type variable is its module's own business."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign) and not ast.unparse(node.value).startswith("TypeVar("):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name))


def test_the_search_for_types_finds_them():
    code = "class A: ...\nclass _B: ...\nCost = float\nLIMIT = 3\nItemT = TypeVar('ItemT')\nvalue = A()"
    assert list(types_defined_in(ast.parse(code))) == ["A", "Cost"]


def test_the_median_function_is_short():
    for folder in FOLDERS:
        modules = [path for path in PRODUCT if path.relative_to(ROOT).parts[0] == folder]
        lengths = [num_lines(node) for path in modules for node in functions(tree_of(path))]
        is_long = bool(lengths) and statistics.median(lengths) > MAX_MEDIAN_FUNCTION_LINES
        assert not is_long or folder == "kernels", folder  # a kernel is one signature and one loop


def test_what_a_page_names_exists():
    assert broken(missing_names, PAGES) == {}


def missing_names(path: Path) -> list[str]:
    return [name for name in names_in(path.read_text(encoding="utf-8")) if not exists(name, path.parent)]


def names_in(text: str) -> Iterator[str]:
    """What a page puts in backticks, the words of its fenced commands that are paths, and every `make target`."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", prose)
    yield from (word for word in fenced.split() if word.startswith("configs/"))
    yield from re.findall(r"^\s*(make [a-z]+)", fenced, re.MULTILINE)
    yield from re.findall(r"^\s*(?:tandem|python -m cluster) ([a-z]+)", fenced, re.MULTILINE)
    yield from (target for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose) if target)


def exists(name: str, folder: Path) -> bool:
    """Whether the name is there, or is none of the kinds that can be looked up."""
    if match := re.match(r"make ([a-z]+)", name):
        return bool(re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if match := re.match(r"(?:tandem|python -m cluster) ([a-z]+)", name):
        return (ROOT / "cluster/commands" / f"{match[1]}.py").exists()
    if (match := re.fullmatch(r"([a-z_]+)\.([a-z_]+)", name)) and match[1] in Topology.__struct_fields__:
        return match[2] in section_keys(match[1])
    if re.fullmatch(r"[\w.-]+\.(py|md|yaml|toml|lock)", name):
        return any(not set(found.parts) & {".venv", ".git"} for found in ROOT.rglob(name))
    if re.fullmatch(r"[\w.-]+/[\w./-]*", name) and (ROOT / name.partition("/")[0]).exists():
        return (ROOT / name).exists() or (folder / name).exists()
    return True


@pytest.mark.parametrize(
    "name",
    ["make nothing", "tandem nothing", "router.prot", "nowhere.py", "cluster/nowhere.py", "configs/nowhere.yaml"],
)
def test_the_search_for_stale_names_finds_them(name: str):
    assert not exists(name, ROOT)


@pytest.mark.parametrize("name", ["make test", "tandem up", "router.port", "Makefile", "v1/completions", "cluster/"])
def test_the_search_for_stale_names_lets_good_ones_pass(name: str):
    assert exists(name, ROOT)
