"""`maskwright serve`: models answer HTTP requests. One process handles HTTP, another runs the models."""
