"""x / sqrt(mean(x^2) + eps) * weight, bit by bit."""

from dsv4_plugin.kernels.exact import rms_norm

__all__ = ["rms_norm"]
