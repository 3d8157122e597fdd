"""The router: OpenAI-style HTTP in front, one control socket to all workers behind; it owns every request's life.

Imports only protocol, never torch. Start it with `python -m router` (see router/launch.py for what it reads).
"""
