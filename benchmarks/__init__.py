"""Step time and memory as ratios to SGD, beside the peers: `python -m benchmarks --help`, or `make bench`."""
