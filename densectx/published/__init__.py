"""Published networks: their configs under the names of ``densectx list models``, and their weights in our form."""
