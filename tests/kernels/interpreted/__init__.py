"""Tests that need Triton's interpreter, which must be chosen before Triton is imported: ../test_interpreted.py runs them."""
