"""Other methods and other libraries' caches, in a form that the harness measures."""
