"""What the names, shapes and config of a model say about its symmetries, by kind of structure."""
