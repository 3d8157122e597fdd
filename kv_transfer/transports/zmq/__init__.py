"""The transport over TCP sockets of ZeroMQ."""
