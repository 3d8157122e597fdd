"""The demo model's tokenizer: byte-level BPE, so that every UTF-8 text survives encoding and decoding.

For train.py, which trains and saves it, and for whoever loads configs/demo_model with transformers' AutoTokenizer.
It holds the chat template too: the one place that says what a chat looks like to the model.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [BEGIN, END, "<|user|>", "<|assistant|>", "<|system|>"]
VOCABULARY_SIZE = 2048
MAX_LENGTH = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from texts and wrap the result the way transformers loads and saves it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(texts),
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Plain text starts with <|begin|>; a chat gets it from the template and is encoded without special tokens.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer
