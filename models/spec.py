"""What a model is made of, as data: its layers' parts, and the tensors of a checkpoint that each is stored in.

A family writes it from config.json, formats.py and the layers build from it. No torch: it can be read anywhere.
Names of tensors are as in the file; those of a layer come after the layer's prefix.
"""

from collections import Counter

import msgspec

from models.facts import ModelFacts, Split

Shape = tuple[int, ...]


class NormSpec(msgspec.Struct, frozen=True):
    """Root mean square norm over size elements, with one weight for each."""

    name: str
    size: int
    eps: float

    def tensors(self) -> dict[str, Shape]:
        return {f"{self.name}.weight": (self.size,)}


class Outputs(msgspec.Struct, frozen=True):
    """Some outputs of a linear map, width of them for each unit of split; name: the matrix whose rows compute them."""

    name: str
    split: Split
    width: int = 1

    def __len__(self) -> int:
        return self.split.number * self.width


class ColumnParallelSpec(msgspec.Struct, frozen=True):
    """A linear map whose outputs are split over ranks, put together from parts. Every rank gets its share of each part.

    Parts of one name are stored in one matrix, one below the other in this order.
    """

    num_inputs: int
    parts: tuple[Outputs, ...]
    has_bias: bool = False

    def tensors(self) -> dict[str, Shape]:
        rows: Counter[str] = Counter()
        for part in self.parts:
            rows[part.name] += len(part)
        weights: dict[str, Shape] = {f"{name}.weight": (number, self.num_inputs) for name, number in rows.items()}
        biases: dict[str, Shape] = {f"{name}.bias": (number,) for name, number in rows.items()}
        return weights | biases if self.has_bias else weights


class RowParallelSpec(msgspec.Struct, frozen=True):
    """A linear map whose inputs are split over ranks: width of them for each unit of split."""

    name: str
    split: Split
    width: int
    num_outputs: int
    has_bias: bool = False

    def tensors(self) -> dict[str, Shape]:
        weight: dict[str, Shape] = {f"{self.name}.weight": (self.num_outputs, self.split.number * self.width)}
        return weight | {f"{self.name}.bias": (self.num_outputs,)} if self.has_bias else weight


class Llama3Scaling(msgspec.Struct, frozen=True):
    """Llama 3's scaling of rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class RopeSpec(msgspec.Struct, frozen=True):
    """A rotary position embedding over head_dim dimensions."""

    theta: float
    head_dim: int
    scaling: Llama3Scaling | None = None


class AttentionSpec(msgspec.Struct, frozen=True):
    """Grouped-query attention. qkv: queries, keys and values in that order; q_norm and k_norm: over each head.

    window: how many tokens each attends to, itself included; None: to all.
    """

    heads: Split
    kv_heads: Split
    head_dim: int
    qkv: ColumnParallelSpec
    o: RowParallelSpec
    rope: RopeSpec
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    window: int | None = None

    def tensors(self) -> dict[str, Shape]:
        shapes = self.qkv.tensors() | self.o.tensors()
        for norm in (self.q_norm, self.k_norm):
            shapes |= norm.tensors() if norm else {}
        return shapes


class MLPSpec(msgspec.Struct, frozen=True):
    """down(silu(gate) * up). gate_up: gates and ups in that order."""

    gate_up: ColumnParallelSpec
    down: RowParallelSpec

    def tensors(self) -> dict[str, Shape]:
        return self.gate_up.tensors() | self.down.tensors()


class LayerSpec(msgspec.Struct, frozen=True):
    """Attention, then MLP, each on the normed sum of all that came before."""

    attention_norm: NormSpec
    attention: AttentionSpec
    mlp_norm: NormSpec
    mlp: MLPSpec

    def tensors(self) -> dict[str, Shape]:
        parts = (self.attention_norm, self.attention, self.mlp_norm, self.mlp)
        return {name: shape for part in parts for name, shape in part.tensors().items()}

    def splits(self) -> tuple[Split, ...]:
        """Return the dimensions that ranks share."""
        return self.attention.heads, self.attention.kv_heads, self.mlp.down.split


class VocabularySpec(msgspec.Struct, frozen=True):
    """Embedding and head, each a matrix [size, hidden_size]. is_tied: one of the two may be stored for both."""

    size: int
    hidden_size: int
    is_tied: bool
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"


class DecoderSpec(msgspec.Struct, frozen=True):
    """Embedding, layers, a norm, head. Tensors of layer i are named prefix(i) and then as the layer's spec says."""

    vocabulary: VocabularySpec
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    layer_prefix: str = "model.layers."

    def prefix(self, index: int) -> str:
        return f"{self.layer_prefix}{index}."

    def tensors(self) -> dict[str, Shape]:
        """Return name and shape of every tensor that a checkpoint must hold, without the vocabulary's."""
        shapes = self.final_norm.tensors()
        for index, layer in enumerate(self.layers):
            shapes |= {self.prefix(index) + name: shape for name, shape in layer.tensors().items()}
        return shapes


class ModelSpec(msgspec.Struct, frozen=True):
    """A model from outside and from inside."""

    facts: ModelFacts
    decoder: DecoderSpec
