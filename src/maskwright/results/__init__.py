"""The result for one image, and the files made from it."""
