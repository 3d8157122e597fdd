"""The words every part of Tandem shares: requests, messages, orders, configuration, errors.

Imports nothing of ours and never torch, so that the router and the command line start fast.
"""
