"""What one GPU does with this package, stage by stage; `__main__.py` runs them, `stages.py` lists them."""
