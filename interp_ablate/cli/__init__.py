"""The command line: one file a command.

May import: everything. To add a command: a file here with a settings class, `add(parser)` and
`run(args)`, and a line in `COMMANDS` of `main.py`; or another package's entry point `interp_ablate.commands`.
"""
