"""Access to the files of a dataset in folders and archives."""
