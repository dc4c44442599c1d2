"""Distributed training of multi-scenario recommenders with sharded embedding tables."""
