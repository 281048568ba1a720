"""Adapters on disk, without a model that runs: converted, merged, packed, compared and looked into."""
