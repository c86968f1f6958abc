"""Device kernels: one `<op>.cu` (CUDA) and one `<op>.py` (Triton) per op, side by side."""
