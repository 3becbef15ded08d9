"""Pure functions and state tables."""
