"""Device side of training: what a client does with a message."""
