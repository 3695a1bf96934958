"""Inputs of kernels: small worlds with holes and poison, and launches of production's shapes."""
