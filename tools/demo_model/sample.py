"""Prints what the demo model writes for a handful of prompts, greedily and at temperature 0.8.

For whoever retrained the model and wants to read it: `python -m tools.demo_model.sample configs/demo_model`.
It uses transformers alone, so it says nothing about the cluster.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

COMPLETIONS = (
    "Once upon a time", "The train to", "Hello, my name is", "The capital of France is", "In the morning",
    "There was a small robot who", "The old lighthouse", "San Francisco is a", "It was raining, and",
)  # fmt: skip
CHATS = (
    "Tell me a story about a fox.", "Hello!", "Who are you?", "What is a prefill worker?", "What is 2 + 3?",
    "Write a story about a dragon and a mouse.", "What is the capital of Japan?", "Can you write a poem about the sea?",
    "Tell me a bedtime story about a girl named Emma.", "Explain quantum computing in simple terms.", "Say hello.",
    "Tell me a story about a penguin who lost his hat.", "What is the KV cache?", "Write a haiku.",
)  # fmt: skip


class Sampler:
    """A loaded model that answers prompts."""

    def __init__(self, path: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def chat_prompt(self, message: str) -> str:
        """Render one user message the way the server does."""
        messages = [{"role": "user", "content": message}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def answer(self, prompt: str, temperature: float, add_begin: bool) -> str:
        """Continue a prompt; the answer says so if it did not end on its own."""
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=add_begin, return_token_type_ids=False)
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        output = self.model.generate(**inputs, max_new_tokens=400, **choice)[0, inputs["input_ids"].shape[1] :]
        ended = output[-1] == self.tokenizer.eos_token_id
        text = str(self.tokenizer.decode(output, skip_special_tokens=True))
        return text if ended else text + " [NO END]"


def main() -> None:
    """Print all samples."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sampler = Sampler(sys.argv[1])
    for temperature in (0.0, 0.8):
        for prompt in COMPLETIONS:
            print(f"[{temperature}] {prompt} |{sampler.answer(prompt, temperature, add_begin=True)}\n")
        for message in CHATS:
            answer = sampler.answer(sampler.chat_prompt(message), temperature, add_begin=False)
            print(f"[{temperature}] USER {message}\n    MODEL {answer}\n")


if __name__ == "__main__":
    main()
