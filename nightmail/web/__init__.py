"""HTTP in, JSON and pages out: no SQL and no business rule."""
