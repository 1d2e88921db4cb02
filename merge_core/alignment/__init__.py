"""Weight matching: which permutations of a model's neurons bring it closest to another model."""
