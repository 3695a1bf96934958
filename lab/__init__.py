"""What tests and benchmarks share: servers and engines in processes of their own, GPUs that are not
there (`kit`), and inputs of kernels (`kernels`). No part of the package that is installed."""
