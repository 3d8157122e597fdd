"""Mistakes in what a model is: its files, config.json, fingerprint, formats, and a rank's share of its weights."""

from tests.mutations.mutation import Mutation

WEIGHTS = "tests/unit/test_weights.py"
FAMILIES = "tests/unit/test_families.py"
FINGERPRINT = "tests/unit/test_fingerprint.py"
LOADING = "tests/unit/test_loading.py"

MODELS = [
    ("formats", "own.moved(taken[part.name])", "own", WEIGHTS),
    ("formats", "share(spec.split).times(spec.width)", "share(spec.split)", WEIGHTS),
    ("vocabulary", "spec.head if spec.head in tensors else spec.embedding", "spec.embedding", WEIGHTS),
    ("vocabulary", "if spec.embedding not in tensors and spec.head in tensors:", "if False:", WEIGHTS),
    ("files", "if folder / SINGLE not in paths and (folder / SINGLE).exists():", "if False:", WEIGHTS),
    ("checkpoint", "        if shape != expected:", "        if False:", WEIGHTS),
    (
        "checkpoint",
        '                raise ConfigError(f"{path}: tensor {name} is in another',
        '                print(f"{path}: tensor {name} is in another',
        WEIGHTS,
    ),
    ("fingerprint", "whole.update(digest)", 'whole.update(digest if number % 2 else b"")', FINGERPRINT),
    ("fingerprint", "left -= got", "left = 0", FINGERPRINT),
    ("config_file", "isinstance(value, int) and not isinstance(value, bool)", "isinstance(value, int)", FAMILIES),
    ("config_file", "not 0 < value <= LARGEST_FLOAT", "not 0 < value", FAMILIES),
    ("tensor_parallel", "head = self.rank * total // self.size", "head = self.rank % total", WEIGHTS),
]

MUTATIONS = [
    *(Mutation(f"models/{file}.py", *rest) for file, *rest in MODELS),
    Mutation("worker/loading.py", "    files.check_unchanged()\n", "", LOADING),
    Mutation("worker/loading.py", "    _check_same_model(fingerprint, tensor_parallel, device)\n", "", LOADING),
]
