"""How good and how fast a model is: metrics of finished videos, prediction, VBench, benchmarks."""
