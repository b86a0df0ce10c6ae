"""The commands: `glimmer COMMAND`. A command is one file here and one line in main.py."""
