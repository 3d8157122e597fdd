"""What a model is: its facts, its families, its weights and its forward pass. It knows nothing of requests and caches.

Whoever wants no torch reads facts, spec, loading and files; the rest computes.
"""
