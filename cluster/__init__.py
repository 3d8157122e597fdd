"""The command line, and everything between a YAML topology and running processes.

Reads and checks topologies, places one Ray actor per rank, starts the router, supervises, and takes all of it down.
"""
