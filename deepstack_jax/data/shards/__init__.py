"""Examples as ArrayRecord shards with their images inside: reading and writing."""
