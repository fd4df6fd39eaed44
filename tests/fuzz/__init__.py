"""Hostile files: whatever a stranger's file holds, a reader returns what it says or raises one clear line, and touches nothing else.

Each test draws files by hypothesis. `make test` draws the same few hundred in every run; `make fuzz` draws new ones, for longer.
"""
