"""What cannot work is refused before anything starts, quickly, and without torch or Ray."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import zmq

from cluster import checks
from cluster.topology_file import load_topology
from protocol.errors import ConfigError
from protocol.topology import Topology, Transport

ROOT = Path(__file__).parents[2]
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def topology(model: Path):
    def load(*overrides: str) -> Topology:
        return load_topology(ROOT / "configs/cpu_1p1d.yaml", [f"model.path={model}", "router.port=0", *overrides])[0]

    return load


def complaint_about(topology: Topology) -> str:
    with pytest.raises(ConfigError) as caught:
        checks.check_topology(topology)
    return str(caught.value)


def test_a_topology_that_fits_passes(topology):
    assert checks.check_topology(topology()).num_kv_heads == 2
    checks.check_this_machine(topology(), has_cluster=False)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("decode.tensor_parallel=3", "decode.tensor_parallel: 4 attention heads cannot be split over 3 ranks"),
        ("model.max_context=513", "model.max_context is 513, but the model was made for at most 512"),
        ("kv_cache.memory=1KiB", "kv_cache.memory 1KiB holds 0 tokens on each prefill rank.*raise it to 256KiB"),
        (
            "kv_transfer.min_fetch_tokens=64 kv_cache.prefix_caching=false",
            "min_fetch_tokens is 64, but decode keeps no pre",
        ),
        ("decode.kv_cache.memory=1KiB", "decode.kv_cache.memory 1KiB holds 0 tokens on each decode rank"),
        (
            "kv_transfer.transport=nccl",
            "kv_transfer.transport nccl moves KV between GPUs, but device is cpu",
        ),
        (
            "kv_transfer.transport=cuda_ipc",
            "transport cuda_ipc moves KV.*a transport that needs none .auto",
        ),
        ("kv_cache.memory=255KiB", "holds 496 tokens .* fewer than one context of 512.*or model.max_context to 496"),
        ("kv_cache.memory=90%", "90% needs device cuda; on a CPU give bytes, as 512MiB"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_key(topology, override: str, complaint: str):
    import re

    assert re.search(complaint, complaint_about(topology(*override.split())))


@pytest.mark.parametrize("transport", get_args(Transport))
def test_every_transport_fits_a_gpu(topology, transport: str):
    checks.check_topology(topology("device=cuda", f"kv_transfer.transport={transport}"))


def test_a_model_in_a_type_that_kv_cannot_have_needs_another_said(topology, model):
    (model / "config.json").write_text(json.dumps(MODEL | {"torch_dtype": "float64"}))
    with pytest.raises(
        checks.MisfitError, match="dtype float64 is not served; set model.dtype to one of float32, bfl"
    ) as caught:
        checks.check_topology(topology("model.dtype=auto"))
    assert caught.value.key == "model.dtype"
    checks.check_topology(topology("model.dtype=bfloat16"))


def test_the_memory_that_the_complaint_asks_for_is_enough(topology):
    checks.check_topology(topology("kv_cache.memory=256KiB"))


def test_a_role_may_have_blocks_and_memory_of_its_own(topology):
    checks.check_topology(
        topology("kv_cache.memory=1KiB", *(f"{r}.kv_cache.memory=256KiB" for r in ("prefill", "decode")))
    )
    checks.check_topology(topology("decode.kv_cache.block_size=128", "decode.kv_cache.memory=256KiB"))
    complaint = complaint_about(topology("decode.kv_cache.block_size=128", "decode.kv_cache.memory=255KiB"))
    assert "decode.kv_cache.memory 255KiB holds 384 tokens on each decode rank" in complaint


def test_the_context_that_the_complaint_allows_is_served(topology):
    checks.check_topology(topology("kv_cache.memory=255KiB", "model.max_context=496"))


def test_a_host_that_can_park_no_request_of_full_length_is_refused_when_anything_may_be_parked(topology):
    little = topology("decode.parked_memory=255KiB", "decode.growth_tokens=64")
    assert "holds less than one context of 512" in complaint_about(little)
    checks.check_topology(topology("decode.parked_memory=256KiB", "decode.growth_tokens=64"))
    checks.check_topology(topology("decode.parked_memory=0KiB"))


def test_a_share_of_what_is_free_is_for_whole_graphics_cards(topology):
    checks.check_topology(topology("device=cuda", "kv_cache.memory=90%"))
    shared = topology("device=cuda", "kv_cache.memory=90%", "decode.gpus=0.5")
    assert "90% of a GPU that a decode rank shares with others (decode.gpus is 0.5)" in complaint_about(shared)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_of_the_model_is_named(topology, model: Path, name: str):
    (model / name).unlink()
    assert name.replace("model.", "*.") in complaint_about(topology())


def test_two_sets_of_weights_are_refused_before_anything_starts(topology, model: Path):
    (model / "old.safetensors").touch()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "old.safetensors"}}')
    assert "model.safetensors and other weights that" in complaint_about(topology())


def test_a_missing_model_folder_is_named(topology):
    assert "./nowhere: no such folder" in complaint_about(topology("model.path=./nowhere"))


def test_a_graphics_card_that_is_not_there_is_refused(topology):
    with pytest.raises(ConfigError, match="device is cuda, but this machine has no GPU; set device: cpu"):
        checks.check_resources(topology("device=cuda"), num_cpus=8, num_gpus=0, where="this machine")


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_share_of_a_graphics_card_that_cannot_be_had_is_refused(topology, share: str):
    assert "decode.gpus is" in complaint_about(topology("device=cuda", f"decode.gpus={share}"))


def test_more_ranks_than_the_machine_carries_are_refused(topology):
    with pytest.raises(ConfigError, match="the ranks want 2.25 CPUs, this machine has 2"):
        checks.check_resources(topology("decode.groups=8"), num_cpus=2, num_gpus=0, where="this machine")


def test_every_cpu_topology_fits_on_two_cores():
    for path in sorted((ROOT / "configs").glob("cpu_*.yaml")):
        checks.check_resources(load_topology(path)[0], num_cpus=2, num_gpus=0, where="this machine")


def test_hugging_face_kernels_beside_ours_is_refused(topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metadata = tmp_path / "site" / "kernels-0.18.5.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    monkeypatch.syspath_prepend(metadata.parent)
    assert "pip uninstall kernels" in complaint_about(topology())


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_whose_path_is_too_long_for_rays_sockets_is_refused(
    topology, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, "/tmp/" + "x" * 34)
    checks.check_this_machine(topology("router.port=0"), has_cluster=False)
    monkeypatch.setenv(name, "/tmp/" + "x" * 60)
    with pytest.raises(ConfigError, match=f"{name} is /tmp/x*; .* set RAY_TMPDIR to a folder of at most 39 bytes"):
        checks.check_this_machine(topology("router.port=0"), has_cluster=False)
    checks.check_this_machine(topology("router.port=0"), has_cluster=True)


def test_a_machine_whose_zmq_cannot_keep_strangers_out_is_refused(topology, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(ConfigError, match="built here without CURVE"):
        checks.check_this_machine(topology(), has_cluster=False)


def test_a_port_in_use_is_refused_with_its_owner(topology):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use by pid {os.getpid()} "):
            checks.check_this_machine(topology(f"router.port={port}"), has_cluster=True)


@pytest.mark.parametrize("host", ["router..example", "a" * 64])
def test_what_cannot_be_a_hosts_name_is_refused(topology, host: str):
    with pytest.raises(ConfigError, match="is not a host's name"):
        checks.check_this_machine(topology(f"router.host={host}"), has_cluster=True)


def test_an_address_of_another_machine_is_refused(topology):
    with pytest.raises(ConfigError, match="router.host 192.0.2.254 is not an address of this machine"):
        checks.check_this_machine(topology("router.host=192.0.2.254"), has_cluster=True)


def run_command(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began_s = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "cluster", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return done, time.monotonic() - began_s


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_refusal_exits_with_2_within_two_seconds_and_without_torch_or_ray(command: str, tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {path: configs/nowhere/at/all}\nprefill: {}\ndecode: {}\n")
    done, took_s = run_command(command, str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"tandem: {path}:1: model.path configs/nowhere/at/all: no such folder"
    assert took_s < 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "transformers"}


def test_a_value_that_cannot_work_is_named_with_the_place_where_it_stands(model: Path, tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{path: {model}}}\nprefill: {{}}\ndecode:\n  groups: 1\n  tensor_parallel: 3\n")
    done, _ = run_command("check", str(path))
    assert done.stderr.splitlines()[-1].startswith(f"tandem: {path}:5: decode.tensor_parallel: 4 attention heads")
    done, _ = run_command("check", str(path), "--set", "decode.tensor_parallel=1", "--set", "model.max_context=900")
    assert done.stderr.splitlines()[-1].startswith("tandem: --set model.max_context=900: model.max_context is 900")


def test_a_context_that_a_sliding_window_shortens_is_told_in_one_line(model: Path, tmp_path: Path):
    (model / "config.json").write_text(
        json.dumps(MODEL | {"architectures": ["MistralForCausalLM"], "sliding_window": 128})
    )
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{path: {model}}}\nrouter: {{port: 0}}\nprefill: {{}}\ndecode: {{}}\n")
    done, _ = run_command("check", str(path))
    assert done.returncode == 0
    assert "context: 128 of the model's 512 tokens, the width of its sliding window" in done.stdout.splitlines()[-1]
    done, _ = run_command("check", str(path), "--set", "model.max_context=128")
    assert "window" not in done.stdout
    done, _ = run_command("check", str(path), "--set", "model.max_context=129")
    assert "model.max_context is 129, but the model was made for at most 128 (its sliding window)" in done.stderr


def test_status_says_when_no_router_answers():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done, _ = run_command("status", "--router", url)
    assert done.returncode == 1
    assert f"tandem: no router answers at {url}" in done.stderr
