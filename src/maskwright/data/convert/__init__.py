"""`maskwright convert-data`: write a dataset in another layout, and report what the layout cannot store."""
