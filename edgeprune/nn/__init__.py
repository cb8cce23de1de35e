"""Torch plumbing that stages and families share."""
