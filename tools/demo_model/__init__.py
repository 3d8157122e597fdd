"""The demo model: a small Llama trained from scratch on text that this package makes up.

For people who change or retrain the model in configs/demo_model. Nothing that serves requests imports it.
"""
