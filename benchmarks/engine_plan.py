"""What the engine's benchmark measures: the model, the rows on a GPU and elsewhere, and what peers reach on an H200."""

from dataclasses import dataclass

import torch

from benchmarks.engine_speed import Work
from benchmarks.kernel_speed import Chunks
from engine.limits import Limits
from models.config_file import ConfigFile
from models.families.hyperparameters import Hyperparameters, read_hyperparameters
from models.loading import describe
from models.spec import ModelSpec

H200 = "NVIDIA H200"
H200_PEERS = {
    "prefill 16 x 2048": 16 * 2048 / 42_500,
    "prefill 1 x 2048": 49.3e-3,
    "prefill 1 x 8192": 214e-3,
    "prefill 1 x 32000": 1165e-3,
    "decode step 1 x 1024": 4.89e-3,
    "decode step 16 x 1024": 5.58e-3,
    "decode step 64 x 1024": 7.74e-3,
    "decode step 128 x 1024": 10.95e-3,
    "decode step 256 x 1024": 18.49e-3,
    "decode step 32 x 8192": 14.14e-3,
    "decode attention 1 x 1024": 11.6e-6,
    "decode attention 1 x 8192": 18.4e-6,
    "decode attention 1 x 32768": 42.8e-6,
    "decode attention 16 x 1024": 25.3e-6,
    "decode attention 16 x 4096": 268.4e6 / 3.82e12,
    "decode attention 16 x 16384": 1073.7e6 / 3.97e12,
    "decode attention 64 x 1024": 76.5e-6,
    "decode attention 64 x 4096": 1073.7e6 / 4.23e12,
    "decode attention 64 x 8192": 2147.5e6 / 4.22e12,
    "decode attention 256 x 1024": 1073.7e6 / 3.91e12,
    "prefill attention 1 x 2048 over 2048": 34.38e9 / 475e12,
    "prefill attention 4 x 2048 over 2048": 137.5e9 / 521e12,
    "prefill attention 1 x 8192 over 8192": 549.8e9 / 611e12,
    "prefill attention 1 x 32768 over 32768": 8796e9 / 595e12,
    "prefill attention 4 x 512 over 4096": 128.9e9 / 529e12,
    "prefill attention 1 x 2048 over 16384": 515.4e9 / 592e12,
}
"""What others reach on one H200, by row, in seconds: vLLM 0.26.0 for steps and prefill, FlashAttention-3 for attention.
Where only a rate was written down, the seconds that it means."""


@dataclass(frozen=True)
class Plan:
    """What is measured: a model, and the rows for it."""

    config: ConfigFile
    dtype: torch.dtype
    limits: Limits
    decodes: tuple[Work, ...]
    num_steps: int
    prefills: tuple[Work, ...]
    decode_attention: tuple[Work, ...]
    prefill_attention: tuple[Chunks, ...]
    num_tokens: tuple[int, ...]  # of the kernels that do not attend
    copy_elements: int
    matrix: int

    @property
    def model(self) -> ModelSpec:
        return describe(self.config)

    @property
    def sizes(self) -> Hyperparameters:
        return read_hyperparameters(self.config)


def llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int
) -> ConfigFile:
    """Return a Llama of these sizes."""
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "dtype": "bfloat16",
    }
    return ConfigFile("the benchmark's model", keys)


FULL = Plan(
    config=llama(4096, 14336, 32, 32, 8, 128_256, 40_960),
    dtype=torch.bfloat16,
    limits=Limits(batch_tokens=8192, batch_requests=256, max_context=33_000),
    decodes=(*(Work(batch, 1024) for batch in (1, 16, 64, 128, 256)), Work(32, 8192)),
    num_steps=64,
    prefills=(Work(16, 2048), Work(1, 2048), Work(1, 8192), Work(1, 32_000)),
    decode_attention=(
        *(Work(1, length) for length in (1024, 8192, 32_768)),
        *(Work(16, length) for length in (1024, 4096, 16_384)),
        *(Work(64, length) for length in (1024, 4096, 8192)),
        Work(256, 1024),
    ),
    prefill_attention=(
        Chunks(1, 2048, 2048),
        Chunks(4, 2048, 2048),
        Chunks(1, 8192, 8192),
        Chunks(1, 32_768, 32_768),
        Chunks(4, 512, 4096),
        Chunks(1, 2048, 16_384),
    ),
    num_tokens=(2048, 8192),
    copy_elements=1 << 30,
    matrix=8192,
)

SMOKE = Plan(
    config=llama(128, 256, 2, 4, 2, 1000, 512),
    dtype=torch.bfloat16,
    limits=Limits(batch_tokens=128, batch_requests=4, max_context=128),
    decodes=(Work(1, 48), Work(4, 48)),
    num_steps=16,
    prefills=(Work(2, 64),),
    decode_attention=(Work(1, 64), Work(4, 100)),
    prefill_attention=(Chunks(2, 32, 64), Chunks(1, 64, 64)),
    num_tokens=(64,),
    copy_elements=1 << 20,
    matrix=256,
)
