"""The command line: options, commands, tables, error -> exit code."""

from edgeprune.cli.app import main as main
