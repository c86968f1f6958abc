"""What `benchmarks/gpu/run.sh` does on a machine with a GPU."""
