"""How each operation of ATen passes on what positions see; what is not here is refused, never guessed."""
