"""Every SQL statement, one module per table or closely bound group."""
