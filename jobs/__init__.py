"""Many shards, many workers: Parquet in, Parquet out, and the `rsr` command."""
