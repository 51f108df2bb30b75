"""Plugins for programs that train by configuration files; each module imports its program."""
