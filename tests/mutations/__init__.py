"""Planted mistakes: each changes one line of the product, and the tests that are named beside it must find it.

What is run is in __main__.py (`make mutations`); the mistakes are in one file for each part of the house. A new rule of
the product deserves a line here, above all one that only crowds or faults bring out.
"""
