"""`maskwright serve`: models answer HTTP requests. One process speaks HTTP, another one runs the models."""
