"""The transport over TCP: payloads follow their headers through one connection per pair of ranks."""
