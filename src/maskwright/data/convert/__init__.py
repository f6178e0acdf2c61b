"""`maskwright convert-data`: write a dataset in another layout, and report what that layout cannot store."""
