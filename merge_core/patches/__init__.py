"""Small artifacts that are added to models and taken off again: deltas, and the signatures that are made of them."""
