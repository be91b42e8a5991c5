"""Benchmarks: `pytest bench/ --benchmark` measures; without the flag the same files are a smoke test."""
