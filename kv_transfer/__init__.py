"""KV blocks from prefill ranks to decode ranks: plan, frames, sender, receiver, transports. Elsewhere: a KV connector.

Used by the two roles. Knows nothing of requests, schedulers or models beyond the layout of their caches.
"""
