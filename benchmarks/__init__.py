"""Memory and speed, measured and beside each other: run one with python -m benchmarks.NAME."""
