"""Documents in, token shards out; reading them."""
