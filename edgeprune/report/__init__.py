"""A run on one page: rows once, then JSON, Markdown and HTML."""

# fmt: off
from edgeprune.report.assembly import build_sections, environment, layers, machine, sparse_notes, versions
from edgeprune.report.per_device import ON, unread, views, where_of
from edgeprune.report.rows import comparison, find, heading, value_of
from edgeprune.report.stage import load, run, summary_lines
