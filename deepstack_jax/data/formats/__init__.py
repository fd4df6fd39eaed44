"""Reading: files by path or URL, and JSON, tables and image files as records of one form."""
