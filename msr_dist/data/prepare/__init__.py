"""From raw files to canonical parquet and `schema.toml`: one file per kind of source."""
