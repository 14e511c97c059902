"""`rsr plan`: what a run would cost, before it costs anything."""
