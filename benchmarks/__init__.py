"""Programs that measure and show; nothing in the package needs them."""
