"""The public API: one module per noun, each with its list of operations."""
