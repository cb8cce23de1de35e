"""A shell over ssh or adb: run, copy, keep, be alone."""
