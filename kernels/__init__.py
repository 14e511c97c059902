"""Hidden states and an LM head to each target's rank, log-probability and entropy.

Tensors in, tensors out: nothing here knows about models, trajectories, vLLM or files.
"""
