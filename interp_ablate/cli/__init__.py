"""The command line: one file a command.

May import: everything. To add a command: a file here with `add(commands)` and a line in `main.py`.
"""
