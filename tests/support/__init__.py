"""What tests share and what checks the tree; no test is in here."""
