"""`rsr score`: INPUT's trajectories scored by one student into OUTPUT."""
