"""The sub-commands of `atom`. Each module has add_arguments(parser) and run(arguments) -> exit code.

Importing them loads nothing heavy: that waits until a command runs.
"""
