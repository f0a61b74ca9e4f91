"""Benchmarks: one file each, ours and the alternatives side by side in one run."""
