"""`python -m edgeprune.agent` reads one request on stdin, as `edgeprune.agent.program` says."""

from __future__ import annotations

import sys

from edgeprune.agent.program import main

sys.exit(main())
