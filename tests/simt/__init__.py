"""The SIMT machine: runs kernels_cu on the CPU, as strictly as no GPU does."""
