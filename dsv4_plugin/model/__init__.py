"""The network, as it runs on every device and in every engine."""
