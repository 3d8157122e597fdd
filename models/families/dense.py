"""What families of dense decoders have in common: grouped-query attention, a gated MLP, layers that are all alike.

Called by the families' files, which say what differs. Another kind of attention or MLP gets a file beside this one.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from models.config_file import ConfigFile
from models.facts import Split
from models.families.hyperparameters import Hyperparameters
from models.families.rope import read_rope
from models.spec import (
    AttentionSpec,
    ColumnParallelSpec,
    DecoderSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    Outputs,
    RowParallelSpec,
    VocabularySpec,
)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED_QKV = ("self_attn.qkv_proj",) * 3
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
FUSED_GATE_UP = ("mlp.gate_up_proj",) * 2


def attention(
    config: ConfigFile,
    sizes: Hyperparameters,
    stored: tuple[str, str, str] = QKV,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    has_head_norms: bool = False,
) -> AttentionSpec:
    """Return grouped-query attention. stored: where queries, keys and values are; has_head_norms: on each q and k."""
    heads, kv_heads = Split("attention heads", sizes.num_heads), Split("KV heads", sizes.num_kv_heads, may_repeat=True)
    q, k, v = (Outputs(name, of, sizes.head_dim) for name, of in zip(stored, (heads, kv_heads, kv_heads), strict=True))
    norms = [NormSpec(f"self_attn.{name}", sizes.head_dim, sizes.eps) for name in ("q_norm", "k_norm")]
    return AttentionSpec(
        heads,
        kv_heads,
        sizes.head_dim,
        qkv=ColumnParallelSpec(sizes.hidden_size, (q, k, v), qkv_bias),
        o=RowParallelSpec("self_attn.o_proj", heads, sizes.head_dim, sizes.hidden_size, o_bias),
        rope=read_rope(config, sizes.head_dim),
        q_norm=norms[0] if has_head_norms else None,
        k_norm=norms[1] if has_head_norms else None,
    )


def mlp(
    config: ConfigFile, sizes: Hyperparameters, stored: tuple[str, str] = GATE_UP, *, has_bias: bool = False
) -> MLPSpec:
    """Return an MLP with a gate. stored: where gates and ups are."""
    if config.text("hidden_act", "silu") != "silu":
        raise config.refusal("hidden_act", "is served as silu only")
    features = Split("intermediate features", sizes.intermediate_size)
    gate_up = ColumnParallelSpec(sizes.hidden_size, tuple(Outputs(name, features) for name in stored), has_bias)
    return MLPSpec(gate_up, RowParallelSpec("mlp.down_proj", features, 1, sizes.hidden_size, has_bias))


def decoder(
    config: ConfigFile,
    sizes: Hyperparameters,
    attention: AttentionSpec,
    mlp: MLPSpec,
    windows: Sequence[int | None] | None = None,
) -> DecoderSpec:
    """Return a decoder of layers that are alike but for their windows (one for each; None: no layer has one)."""
    norms = [NormSpec(name, sizes.hidden_size, sizes.eps) for name in ("input_layernorm", "post_attention_layernorm")]
    attentions = (replace(attention, window=window) for window in windows or (None,) * sizes.num_layers)
    return DecoderSpec(
        VocabularySpec(config.count("vocab_size"), sizes.hidden_size, config.flag("tie_word_embeddings")),
        layers=tuple(LayerSpec(norms[0], attention, norms[1], mlp) for attention in attentions),
        final_norm=NormSpec("model.norm", sizes.hidden_size, sizes.eps),
    )
