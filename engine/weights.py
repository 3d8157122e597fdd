"""From a checkpoint's tensors to one rank's layers: which names there must be, what slice is whose, what is merged.

Called once, when the engine is built. q, k and v become one matrix, gate and up another, so that each is one product.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, Shape
from engine.layers import ColumnParallelLinear, RowParallelLinear, VocabularyEmbedding, VocabularyHead
from engine.tensor_parallel import Range, TensorParallel
from kernels.linear import Linear
from protocol.model_config import ModelConfig
from protocol.progress import Tell

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norm weights are whole on every rank; q_norm and k_norm ([head_dim]) only where there are."""

    attention_norm: Tensor
    qkv: ColumnParallelLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: RowParallelLinear
    mlp_norm: Tensor
    gate_up: ColumnParallelLinear
    down: RowParallelLinear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """One rank's share of a whole model."""

    embedding: VocabularyEmbedding
    layers: list[LayerWeights]
    final_norm: Tensor
    head: VocabularyHead


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return name and shape of every tensor that a checkpoint of this model holds."""
    hidden, vocab = config.hidden_size, config.vocab_size
    tensors: dict[str, Shape] = {EMBEDDING: (vocab, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        tensors[HEAD] = (vocab, hidden)
    for index in range(config.num_layers):
        for name, shape in _expected_in_layer(config).items():
            tensors[f"model.layers.{index}.{name}"] = shape
    return tensors


def _expected_in_layer(config: ModelConfig) -> dict[str, Shape]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    shapes: dict[str, Shape] = {f"{name}.weight": (rows, columns) for name, (rows, columns, _) in linear.items()}
    shapes |= {f"{name}.bias": (rows,) for name, (rows, _, has_bias) in linear.items() if has_bias}
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return shapes


class Tensors(Protocol):
    """What the weights are made of, on their device: a checkpoint, or, to measure speed, anything of its shapes."""

    def whole(self, name: str) -> Tensor: ...

    def rows(self, name: str, rows: Range) -> Tensor:
        """Return rows of a matrix, or elements of a vector."""

    def columns(self, name: str, columns: Range) -> Tensor: ...


def load_weights(
    source: Path | Tensors,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    tensor_parallel: TensorParallel,
    progress: Tell,
) -> ModelWeights:
    """Read this rank's share of the weights, from a folder if source is one. Raise ConfigError for what does not fit.

    A folder's tensors are brought to dtype and device; other sources give what is to be used.
    """
    tensors = _open(source, config, dtype, device) if isinstance(source, Path) else source
    loader = _Loader(tensors, config, tensor_parallel)
    num_parts = config.num_layers + 1
    progress(f"weights 1 of {num_parts}")
    embedding, head = loader.vocabulary()
    layers = []
    for index in range(config.num_layers):
        progress(f"weights {index + 2} of {num_parts}")
        layers.append(loader.layer(f"model.layers.{index}."))
    return ModelWeights(embedding, layers, tensors.whole(FINAL_NORM), head)


def _open(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    def is_ignored(name: str) -> bool:
        """Old checkpoints hold the rotary frequencies; some hold a second copy of a tied embedding."""
        return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == HEAD)

    return Checkpoint(folder, expected_tensors(config), is_ignored, dtype, device)


class _Loader:
    """Reads one rank's slices."""

    def __init__(self, tensors: Tensors, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        self._tensors = tensors
        self._config = config
        self._tensor_parallel = tensor_parallel
        self._q_rows = tensor_parallel.even(config.num_heads).times(config.head_dim)
        self._kv_rows = tensor_parallel.kv_heads(config.num_kv_heads).times(config.head_dim)
        self._features = tensor_parallel.even(config.intermediate_size)

    def vocabulary(self) -> tuple[VocabularyEmbedding, VocabularyHead]:
        """Return embedding and head, which are one tensor when the model ties them."""
        config, group = self._config, self._tensor_parallel
        weight = self._vocabulary_shard(EMBEDDING)
        head_weight = weight if config.tie_word_embeddings else self._vocabulary_shard(HEAD)
        embedding = VocabularyEmbedding(weight, group.vocabulary(config.vocab_size), group)
        return embedding, VocabularyHead(Linear(head_weight), config.vocab_size, group)

    def _vocabulary_shard(self, name: str) -> Tensor:
        shard = self._tensors.rows(name, self._tensor_parallel.vocabulary(self._config.vocab_size))
        width = self._tensor_parallel.vocabulary_width(self._config.vocab_size)
        return torch.nn.functional.pad(shard, (0, 0, 0, width - len(shard))) if len(shard) < width else shard

    def layer(self, prefix: str) -> LayerWeights:
        whole, config = self._tensors.whole, self._config
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = {"q_proj": self._q_rows, "k_proj": self._kv_rows, "v_proj": self._kv_rows}
        gate_up = {"gate_proj": self._features, "up_proj": self._features}
        return LayerWeights(
            attention_norm=whole(prefix + "input_layernorm.weight"),
            qkv=self._columns_parallel(attention, qkv, config.qkv_bias),
            q_norm=whole(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=whole(attention + "k_norm.weight") if config.qk_norm else None,
            o=self._rows_parallel(attention + "o_proj", self._q_rows, config.o_bias),
            mlp_norm=whole(prefix + "post_attention_layernorm.weight"),
            gate_up=self._columns_parallel(mlp, gate_up, config.mlp_bias),
            down=self._rows_parallel(mlp + "down_proj", self._features, config.mlp_bias),
        )

    def _columns_parallel(self, prefix: str, parts: dict[str, Range], has_bias: bool) -> ColumnParallelLinear:
        """Merge several maps of one input; a map's outputs are the rows of its matrix."""
        rows = self._tensors.rows
        weight = torch.cat([rows(f"{prefix}{name}.weight", part) for name, part in parts.items()])
        bias = torch.cat([rows(f"{prefix}{name}.bias", part) for name, part in parts.items()]) if has_bias else None
        return ColumnParallelLinear(Linear(weight, bias))

    def _rows_parallel(self, name: str, inputs: Range, has_bias: bool) -> RowParallelLinear:
        weight = self._tensors.columns(f"{name}.weight", inputs)
        bias = self._tensors.whole(f"{name}.bias") if has_bias else None
        return RowParallelLinear(Linear(weight), bias, self._tensor_parallel)
