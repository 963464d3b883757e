"""Gradients of one module: by autograd, or by explicit kernels."""
