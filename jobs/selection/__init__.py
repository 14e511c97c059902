"""Which rows: filter a scored corpus, select trajectories per problem."""
