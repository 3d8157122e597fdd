"""Fields that clients of OpenAI's interface, vLLM and SGLang know and this server does not serve.

A wish is served or refused, never ignored: with any other value than those below such a field is a 400 that names it.
docs/http.md lists all fields; tests/unit/test_router_schemas.py holds that it does. Fields that are in no list of ours
nor theirs are ignored, as everywhere: clients send notes to themselves and to proxies on the way.
"""

from typing import Any

import msgspec

from router.front.errors import bad_request

HARMLESS: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "chat_template": (),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "data_parallel_rank": (),
    "disagg_prefill_dp_rank": (),
    "documents": ([],),
    "ebnf": (),
    "ec_transfer_params": ({},),
    "echo": (False,),
    "extra_key": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "json_schema": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "lora_path": (),
    "max_completion_tokens": (),
    "max_dynamic_patch": (),
    "media_io_kwargs": ({},),
    "messages": (),
    "min_dynamic_patch": (),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "repetition_detection": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_assistant_tokens_mask": (False,),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_prompt_text": (False,),
    "return_routed_experts": (False,),
    "return_token_offsets": (False,),
    "rid": (),
    "routed_dp_rank": (),
    "routed_experts_start_len": (0,),
    "separate_reasoning": (False,),
    "session_params": (),
    "stop_regex": ([],),
    "stream_reasoning": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": ("",),
    "task": (),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_audio_in_video": (False,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
"""Values besides null that ask for nothing. Some fields are served by one of the endpoints, and so only refused by the
other."""

IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_call_id": ("",),
    "tool_calls": ([],),
}
"""The same of what stands in a message: this server knows no tools and writes no speech."""

WITHOUT_EFFECT = frozenset(
    {
        *("custom_labels", "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"),
        *("parallel_tool_calls", "spaces_between_special_tokens"),
    }
)
"""Taken with any value, because none of them would change an answer of this server's."""


def refuse_unserved(data: bytes | bytearray, served: frozenset[str]) -> None:
    """Raise ApiError 400 for a field of data, a JSON object, that asks for something that is not served."""
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    for name in sorted((fields.keys() & HARMLESS.keys()) - served):
        _refuse_unless_harmless(name, msgspec.json.decode(fields[name]), HARMLESS[name])


def refuse_in_message(message: msgspec.Struct) -> None:
    """The same for the fields of one message."""
    for name, harmless in IN_MESSAGES.items():
        _refuse_unless_harmless(f"messages.{name}", getattr(message, name), harmless)


def _refuse_unless_harmless(name: str, value: Any, harmless: tuple[Any, ...]) -> None:
    if value is not None and not any(value == other and type(value) is type(other) for other in harmless):
        raise bad_request(f"{name} is not served with this value; leave it out", name)
