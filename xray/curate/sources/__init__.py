"""What a source can be, and how each kind becomes a frame: tables, shards, folders; `read` joins them."""
