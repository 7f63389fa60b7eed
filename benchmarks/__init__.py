"""Programmes that make the tables of docs/: run them as `python -m benchmarks.NAME`."""
