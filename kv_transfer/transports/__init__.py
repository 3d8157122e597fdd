"""How frames get from one rank to another. transport.py says what a transport is, opening.py chooses one by name."""
