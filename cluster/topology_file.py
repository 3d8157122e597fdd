"""A topology's YAML file -> Topology, with the place and the remedy in every complaint.

Called by the command line. Strict: an unknown or doubled key, a wrong type and a missing key are all ConfigErrors that
begin with "file:line:" (or with the --set that brought the value). Whether the cluster can run what the file asks for
is cluster/checks.py's question.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cluster.checks import roles
from protocol.errors import ConfigError
from protocol.memory_size import format_memory, parse_memory, parse_share
from protocol.topology import DecodeSection, Topology

Places = dict[str, str]
"""Where each key was written: "prefill.groups" -> "configs/x.yaml:7"; the empty key is the file itself."""

_MAX_BYTES = 1 << 20
_MAX_NODES = 10_000
"""Of a topology with its aliases written out. Some dozens are usual; a few lines of aliases can stand for billions."""

_TOO_DEEP = "brackets nest too deep; a topology needs three levels"
_COMPLAINT = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<key>[^`]*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?P<problem>contains unknown|missing required) field `(?P<name>[^`]*)`")


def load_topology(path: Path, overrides: Sequence[str] = ()) -> tuple[Topology, Places]:
    """Read the topology at path, with overrides ("section.key=value") in place of what it says."""
    values, places = _read(path)
    for override in overrides:
        _apply(override, values, places)
    try:
        topology = msgspec.convert(values, Topology)
    except msgspec.ValidationError as error:
        raise _explain(str(error), values, places) from None
    _check_roles(topology, places)
    _check_memory(topology, places)
    return topology, places


def _read(path: Path) -> tuple[dict[str, Any], Places]:
    try:
        root, values = _parse(_read_text(path), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_complaint(path, error)) from None
    except RecursionError:
        raise ConfigError(f"{path}: {_TOO_DEEP}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a topology is a mapping of sections: {', '.join(section_keys(''))}")
    return values, {"": f"{path}:1", **dict(_walk(root, f"{path}", "", depth=3))}


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: more than {format_memory(_MAX_BYTES)}; a topology has some dozens of lines")
    return data.decode("utf-8")


def _parse(text: str, place: str) -> tuple[yaml.Node | None, Any]:
    """Return a document's nodes and its values. Raise ConfigError when its aliases stand for too much."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and _num_nodes(root, {}) > _MAX_NODES:
        raise ConfigError(f"{place}: with its aliases written out it has more than {_MAX_NODES:,} entries")
    return root, yaml.safe_load(text)


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes this one is with all aliases written out; one that contains itself counts once."""
    if id(node) not in known:
        known[id(node)] = 1
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if not isinstance(node, yaml.ScalarNode):
            known[id(node)] += sum(_num_nodes(child, known) for child in children)
    return known[id(node)]


def _yaml_complaint(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{path}:{mark.line + 1}: {problem}" if mark else f"{path}: {problem}"


def _walk(node: yaml.Node | None, file: str, prefix: str, depth: int) -> Iterable[tuple[str, str]]:
    """Yield every key with its place, and refuse a key that stands twice in one mapping (YAML would keep the last)."""
    if not isinstance(node, yaml.MappingNode) or depth == 0:
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        key = prefix + name
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{file}:{line}: {key}: keys are names, and this one is not")
        if name in seen:
            raise ConfigError(f"{file}:{line}: {key} is given twice, first on line {seen[name]}; keep one")
        seen[name] = line
        yield key, f"{file}:{line}"
        yield from _walk(value_node, file, key + ".", depth - 1)


def _apply(override: str, values: dict[str, Any], places: Places) -> None:
    """Put one --set into values; its keys are checked with everything else."""
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{place}: write it as section.key=value, for example router.port=8001")
    try:
        _, value = _parse(text, place)
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError(f"{place}: {_TOO_DEEP}") from None
    for depth, name in enumerate(names[:-1], 1):
        places.setdefault(".".join(names[:depth]), place)
        values = _section(values, name, place)
    values[names[-1]] = value
    places[".".join(names)] = place


def _section(values: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    section = values.get(name)
    if section is None:
        section = values[name] = {}
    if not isinstance(section, dict):
        raise ConfigError(f"{place}: {name} is {section!r}, which has no keys")
    return section


def _explain(complaint: str, values: dict[str, Any], places: Places) -> ConfigError:
    """Turn one complaint of msgspec into one sentence with a place."""
    match = _COMPLAINT.fullmatch(complaint)
    what, key = (match["what"], match["key"] or "") if match else (complaint, "")
    field = _FIELD.fullmatch(what)
    if field and field["problem"] == "missing required":
        return ConfigError(f"{place_of(key, places)}: {_join(key, field['name'])} is missing")
    if field:
        wrong = _join(key, field["name"])
        return ConfigError(
            f"{place_of(wrong, places)}: unknown key {wrong}{_nearest(field['name'], section_keys(key))}"
        )
    return ConfigError(f"{place_of(key, places)}: {key or 'topology'}: {_value_complaint(what, key, values)}")


def _value_complaint(what: str, key: str, values: dict[str, Any]) -> str:
    written: Any = values
    for name in key.split(".") if key else ():
        written = written.get(name) if isinstance(written, dict) else None
    choices = _choices(key)
    if choices:
        return f"{written!r} is not one of {', '.join(choices)}{_nearest(str(written), choices)}"
    return f"{what[:1].lower()}{what[1:].replace('`', '')}; it says {written!r}"


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def place_of(key: str, places: Places) -> str:
    """Return the place of key, or of the innermost section that it belongs to, or the file's."""
    while key not in places:
        key = key.rpartition(".")[0]
    return places[key]


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(valid)}"


def section_keys(section: str) -> list[str]:
    """Return the keys that a section may have, "" being the topology itself."""
    struct = _struct(section)
    return list(struct.__struct_fields__) if struct else []


def _struct(section: str) -> type[msgspec.Struct] | None:
    """The class of a section, "" being the topology itself."""
    if not section:
        return Topology
    outer, _, name = section.rpartition(".")
    struct = _struct(outer)
    kinds = _kinds(struct, name) if struct else []
    return next((kind.cls for kind in kinds if isinstance(kind, msgspec.inspect.StructType)), None)


def _choices(key: str) -> list[str]:
    section, _, name = key.rpartition(".")
    struct = _struct(section)
    kinds = _kinds(struct, name) if struct else []
    return [str(value) for kind in kinds if isinstance(kind, msgspec.inspect.LiteralType) for value in kind.values]


def _kinds(struct: type[msgspec.Struct], name: str) -> list[msgspec.inspect.Type]:
    """What the field may hold, each member of a union by itself."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    kinds = [field.type for field in info.fields if field.name == name]
    return [kind for outer in kinds for kind in getattr(outer, "types", [outer])]


def _check_roles(topology: Topology, places: Places) -> None:
    given = [name for name in ("prefill", "decode", "colocated") if getattr(topology, name) is not None]
    if given not in (["prefill", "decode"], ["colocated"]):
        place = places[given[-1]] if given else places[""]
        raise ConfigError(
            f"{place}: a topology has either prefill and decode, or colocated alone; this one has "
            f"{' and '.join(given) or 'none of them'}"
        )


def _check_memory(topology: Topology, places: Places) -> None:
    limits = topology.router.limits
    sizes = {
        "kv_cache.memory": topology.kv_cache.memory,
        "router.limits.body_memory": limits.body_memory,
        "router.limits.body_memory_per_address": limits.body_memory_per_address,
    }
    for role, section in roles(topology):
        if section.kv_cache.memory:
            sizes[f"{role}.kv_cache.memory"] = section.kv_cache.memory
        if isinstance(section, DecodeSection):
            sizes[f"{role}.parked_memory"] = section.parked_memory
    for key, size in sizes.items():
        try:
            if not key.endswith("kv_cache.memory") or parse_share(size) is None:
                parse_memory(size)
        except ConfigError as error:
            raise ConfigError(f"{place_of(key, places)}: {key}: {error}") from None
