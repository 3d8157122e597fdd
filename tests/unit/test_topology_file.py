"""The topology file: what is accepted, and that every complaint names the place and the remedy."""

from pathlib import Path

import pytest

from cluster.topology_file import load_topology
from protocol.errors import ConfigError
from protocol.memory_size import format_memory, parse_memory
from protocol.topology import KVCacheSection

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))

GOOD = """\
model: {path: configs/demo_model, dtype: float32}
router: {host: 127.0.0.1, port: 8000, policy: least_loaded}
prefill: {groups: 1, tensor_parallel: 1}
decode:
  groups: 2
  tensor_parallel: 1
kv_cache: {block_size: 16, memory: 512MiB}
kv_transfer: {transport: zmq}
device: cpu
"""


@pytest.fixture
def complaint_about(tmp_path: Path):
    def complain(text: str, *overrides: str) -> str:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_topology(path, overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return complain


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_topology_is_well_formed_and_says_what_it_shows(path: Path):
    load_topology(path)
    assert path.read_text().startswith("# ")


def test_all_keys_but_the_model_and_the_roles_have_defaults(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {path: a/b}\nprefill: {}\ndecode: {}\n")
    topology, _ = load_topology(path)
    assert topology.router.port == 8000
    assert topology.prefill is not None
    assert topology.prefill.groups == 1
    assert topology.device == "cpu"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  groups: 2", "  groupz: 2", "x.yaml:5: unknown key decode.groupz; did you mean groups?"),
        ("prefill:", "prefil:", "x.yaml:3: unknown key prefil; did you mean prefill?"),
        ("device: cpu", "colour: red", "x.yaml:9: unknown key colour; did you mean"),
        ("  groups: 2", "  groups: two", "x.yaml:5: decode.groups: expected int, got str; it says 'two'"),
        ("  groups: 2", "  groups: 0", "x.yaml:5: decode.groups: expected int >= 1; it says 0"),
        ("8000", "80000", "x.yaml:2: router.port: expected int <= 65535; it says 80000"),
        (
            "zmq",
            "zmqq",
            "x.yaml:8: kv_transfer.transport: 'zmqq' is not one of auto, cuda_ipc, gloo, nccl, shm, zmq; "
            "did you mean zmq?",
        ),
        (
            "  groups: 2",
            "  kv_cache:\n    block: 32",
            "x.yaml:6: unknown key decode.kv_cache.block; did you mean block_si",
        ),
        (
            "  groups: 2",
            "  kv_cache:\n    block_size: 33",
            "x.yaml:6: decode.kv_cache.block_size: 33 is not one of 16, 32",
        ),
        (
            "  groups: 2",
            "  kv_cache: {memory: 5}",
            "x.yaml:5: decode.kv_cache.memory: expected str | null, got int; it says 5",
        ),
        ("  groups: 2", "  kv_cache: {memory: 5x}", 'x.yaml:5: decode.kv_cache.memory: "5x" is not a memory size'),
        ("  groups: 2", "  kv_cache: {memory: 1B, memory: 2B}", "x.yaml:5: decode.kv_cache.memory is given twice"),
        ("block_size: 16", "block_size: 17", "x.yaml:7: kv_cache.block_size: 17 is not one of 16, 32, 64, 128"),
        ("path: configs/demo_model, ", "", "x.yaml:1: model.path is missing"),
        ("model: {path: configs/demo_model, dtype: float32}\n", "", "x.yaml:1: model is missing"),
        ("8000", "8000, grace_s: .inf", "x.yaml:2: router.grace_s: expected float <= 1000000"),
        ("8000", "8000, timeout_s: 1.0e+300", "x.yaml:2: router.timeout_s: expected float <= 1000000"),
        ("512MiB", "9999999999GiB", 'x.yaml:7: kv_cache.memory: "9999999999GiB" is more memory'),
        pytest.param("device: cpu", "device: " + "[" * 3000, "x.yaml: brackets nest too deep", id="deep"),
        ("512MiB", "512MB", 'x.yaml:7: kv_cache.memory: "512MB" is not a memory size; write it as 512MiB or 20GiB'),
        ("device: cpu", "device: cpu\ndevice: cuda", "x.yaml:10: device is given twice, first on line 9"),
        ("  groups: 2", "  groups: 2\n  groups: 3", "x.yaml:6: decode.groups is given twice, first on line 5"),
        ("  groups: 2", "  parked_memory: 2GB", 'x.yaml:5: decode.parked_memory: "2GB" is not a memory size'),
        ("  groups: 2", "  growth_tokens: 0", "x.yaml:5: decode.growth_tokens: expected int >= 1; it says 0"),
        ("  groups: 2", "  outbox_share: 0.5", "x.yaml:5: unknown key decode.outbox_share"),
        ("prefill: {groups: 1,", "prefill: {outbox_share: 1.5,", "x.yaml:3: prefill.outbox_share: expected float <= 1"),
        ("device: cpu", "colocated: {}", "x.yaml:9: a topology has either prefill and decode, or colocated alone"),
        ("prefill: {groups: 1, tensor_parallel: 1}\n", "", "this one has decode"),
        ("device: cpu", "device: [", "x.yaml:10: expected the node content"),
        ("device: cpu", "device: !!python/object/apply:os.getcwd []", "x.yaml:9: could not determine a constructor"),
        ("device: cpu", "7: cpu", "x.yaml:9: 7: keys are names"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_remedy(complaint_about, old: str, new: str, complaint: str):
    assert old in GOOD
    assert complaint in complaint_about(GOOD.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "- prefill\n", "hello\n"])
def test_a_file_that_is_no_mapping_is_told_the_sections(complaint_about, text: str):
    assert "x.yaml:1: a topology is a mapping of sections: model, router, prefill" in complaint_about(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere.yaml: No such file"):
        load_topology(tmp_path / "nowhere.yaml")


def test_a_key_that_refers_to_itself_is_refused(complaint_about):
    assert "unknown key model.again" in complaint_about("model: &a {path: x, again: *a}\n" + GOOD.split("\n", 1)[1])


BOMB = "\n".join(
    ["a: &a0 {x: 1}", *(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}, *a{i}, *a{i}, *a{i}, *a{i}]}}" for i in range(30))]
)


def test_a_few_lines_that_stand_for_billions_are_refused_at_once(complaint_about):
    assert "x.yaml: with its aliases written out it has more than 10,000 entries" in complaint_about(BOMB)
    assert "x.yaml: more than 1024KiB" in complaint_about("# " + "x" * (1 << 20))


def test_aliases_that_stand_for_little_are_fine(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(
        GOOD.replace("prefill: {", "prefill: &same {").replace(
            "decode:\n  groups: 2\n  tensor_parallel: 1\n", "decode: *same\n"
        )
    )
    topology, _ = load_topology(path)
    assert topology.decode is not None
    assert topology.decode.groups == 1


def test_overrides_take_the_place_of_what_the_file_says(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    topology, _ = load_topology(
        path, ["router.port=0", "device=cuda", "kv_cache.prefix_caching=false", "router.grace_s=2"]
    )
    assert topology.router.port == 0
    assert topology.router.grace_s == 2.0
    assert topology.device == "cuda"
    assert not topology.kv_cache.prefix_caching


def test_a_role_says_of_its_cache_what_is_different_and_takes_over_the_rest(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD.replace("groups: 2", "kv_cache: {block_size: 32, prefix_caching: false}"))
    topology, _ = load_topology(path, ["prefill.kv_cache.memory=1GiB"])
    assert topology.prefill is not None
    assert topology.decode is not None
    assert topology.cache_of(topology.prefill) == KVCacheSection(block_size=16, memory="1GiB")
    assert topology.cache_of(topology.decode) == KVCacheSection(block_size=32, memory="512MiB", prefix_caching=False)


def test_an_override_can_exchange_the_roles(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    topology, _ = load_topology(path, ["prefill=null", "decode=null", "colocated.groups=2"])
    assert topology.colocated is not None
    assert topology.colocated.groups == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("router.prot=3", "--set router.prot=3: unknown key router.prot; did you mean port?"),
        ("router.port=x", "--set router.port=x: router.port: expected int, got str; it says 'x'"),
        ("router", "--set router: write it as section.key=value"),
        ("a.b.c=1", "--set a.b.c=1: unknown key a; valid are model, router"),
        ("router.port.x=1", "--set router.port.x=1: port is 8000, which has no keys"),
        (
            "prefill.kv_cache.block=1",
            "--set prefill.kv_cache.block=1: unknown key prefill.kv_cache.block; did you mean",
        ),
        ("prefill.kv_cache.memory=x", '--set prefill.kv_cache.memory=x: prefill.kv_cache.memory: "x" is not a memory'),
        ("device.x=1", "--set device.x=1: device is 'cpu', which has no keys"),
        pytest.param("device=" + "[" * 3000, "[: brackets nest too deep", id="deep"),
        ("router.port=[", "--set router.port=[: expected the node content"),
        ("kv_cache.memory=lots", '--set kv_cache.memory=lots: kv_cache.memory: "lots" is not a memory size'),
        (
            "kv_cache.memory=0%",
            '--set kv_cache.memory=0%: kv_cache.memory: "0%" is not a share of memory; write it as 90%',
        ),
        ("kv_cache.memory=101%", '"101%" is not a share of memory'),
        ("colocated.groups=1", "--set colocated.groups=1: a topology has either prefill and decode, or colocated"),
    ],
)
def test_a_bad_override_is_named_as_it_was_written(complaint_about, override: str, complaint: str):
    assert complaint in complaint_about(GOOD, override)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512MiB", 512 << 20), ("20GiB", 20 << 30), ("1.5KiB", 1536), ("7 B", 7), ("1TiB", 1 << 40)]
)
def test_memory_sizes_are_binary(text: str, num_bytes: int):
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1, 10239, 10240, 5 << 20, (3 << 30) + 1, 99 << 30])
def test_a_formatted_size_reads_back_as_at_least_as_much(num_bytes: int):
    assert num_bytes <= parse_memory(format_memory(num_bytes)) <= num_bytes * 1.11


def test_a_topology_has_few_enough_keys_to_know_them_all():
    from protocol import topology

    sections = (
        topology.ModelSection,
        topology.RouterSection,
        topology.PrefillSection,
        topology.RoleCacheSection,
        topology.KVCacheSection,
        topology.KVTransferSection,
        topology.Topology,
    )
    assert sum(len(section.__struct_fields__) for section in sections) <= 40
