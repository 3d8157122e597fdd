"""Tests that need Triton's interpreter, chosen before Triton is imported: ../test_interpreted.py runs them."""
