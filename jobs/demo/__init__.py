"""The demonstration: made-up trajectories, a real student, and a picture."""
