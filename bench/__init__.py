"""How fast Nightmail is, against floors of raw SQL on the same server: `python -m bench`."""
