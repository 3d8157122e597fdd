"""The rules of the house, held by reading the source: who may import whom, what stays out, how long things grow."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cluster.topology_file import section_keys
from protocol.topology import Topology

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "cluster": {"router", "prefill_worker", "decode_worker", "engine", "kv_transfer", "protocol", "kernels"},
    "router": {"protocol"},
    "prefill_worker": {"engine", "kernels", "kv_transfer", "protocol"},
    "decode_worker": {"engine", "kernels", "kv_transfer", "protocol"},
    "engine": {"kernels", "protocol"},
    "kv_transfer": {"kernels", "protocol"},
    "protocol": set(),
    "kernels": set(),
}
"""package -> the packages of ours that it may import, besides itself."""

WITHOUT_TORCH = ("router.process", "protocol.messages", "protocol.topology", "kv_transfer.plan", "cluster.__main__")

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system"}
FORBIDDEN_METHODS = {
    *("recv_pyobj", "send_pyobj"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),  # these pickle
    *("send_object_list", "recv_object_list"),
}
FORBIDDEN_TEXTS = ("0.0.0.0", "tcp://*")

MAX_FILE_LINES = 400
MAX_MEDIAN_FUNCTION_LINES = 10
MAX_FUNCTION_LINES = 60

PRODUCT = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", PRODUCT, ids=name_of)
each_page = pytest.mark.parametrize("path", PAGES, ids=name_of)


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


@each_module
def test_imports_go_down_the_table_only(path: Path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.partition(".")[0] for name in imports(tree_of(path))} & MAY_IMPORT.keys()
    assert ours - {package} <= MAY_IMPORT[package]


@each_module
def test_no_import_is_relative(path: Path):
    assert not [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_router_and_the_command_line_start_without_torch(module: str):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'ray', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


@each_module
def test_nothing_unpickles_evaluates_or_listens_to_everyone(path: Path):
    assert list(dangers(tree_of(path))) == []


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


@each_module
def test_every_module_says_what_it_is(path: Path):
    assert ast.get_docstring(tree_of(path))


@each_module
def test_no_file_and_no_function_grows_without_bound(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    assert [node.name for node in functions(tree_of(path)) if num_lines(node) > MAX_FUNCTION_LINES] == []


@pytest.mark.parametrize("package", sorted(MAY_IMPORT.keys() - {"kernels"}))  # a kernel is one signature and one loop
def test_the_median_function_is_short(package: str):
    modules = [path for path in PRODUCT if path.relative_to(ROOT).parts[0] == package]
    lengths = [num_lines(node) for path in modules for node in functions(tree_of(path))]
    assert not lengths or statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


@each_page
def test_what_a_page_names_exists(path: Path):
    text = path.read_text(encoding="utf-8")
    missing = [name for name in names_in(text) if not exists(name, path.parent)]
    assert missing == []


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
