"""FLOPs, compilation for TPUs, and benchmarks."""
