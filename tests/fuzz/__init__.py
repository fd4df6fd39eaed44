"""Hostile files: whatever a stranger's file holds, a reader returns what it says or raises one clear line, and no more.

Each test draws files by hypothesis. `make test` draws the same few hundred in every run; `make fuzz` new ones, for longer.
"""
