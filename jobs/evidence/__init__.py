"""Which teacher, and why: tables, statistics and a report over scored trajectories."""
