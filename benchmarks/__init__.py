"""Benchmarks of the loss backend: `python -m benchmarks`, see README.md beside this file."""
