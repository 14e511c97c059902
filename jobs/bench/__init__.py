"""Measurements of this machine: the kernel, and the engine, each beside its peers."""
