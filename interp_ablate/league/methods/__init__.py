"""The methods of the league, one file each, with a `METHOD = LeagueMethod(...)`.

May import: every wing but explorer and cli. To add a method: a file here and a line in `league/registry.py`.
"""
