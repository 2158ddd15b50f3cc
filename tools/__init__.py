"""What people run: demo, checks, benchmarks."""
