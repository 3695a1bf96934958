"""The network's operations. Each is a package with one function: `reference` defines it, `cpu` is
torch's fast way, `kernel` Triton's; `dispatch` says which of them a device takes."""
