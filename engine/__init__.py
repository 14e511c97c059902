"""One GPU or tensor-parallel group, in memory: trajectories in, their scores out.

Knows vLLM and chat templates; knows nothing of files, Ray or the command line.
"""
