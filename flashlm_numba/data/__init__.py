"""Data: read documents, write token shards, and read the shards."""
