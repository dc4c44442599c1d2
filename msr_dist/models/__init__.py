"""One paper, one file: `kind = "x"` in a run's TOML resolves to `models/x.py`, whose `Config` builds the backbone."""
