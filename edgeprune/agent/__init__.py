"""The program that runs on a device."""

# fmt: off
from edgeprune.agent.archive import START, line
from edgeprune.agent.protocol import HEAD_BYTES, LOGITS, MOST_BYTES, READY, checked, head, images, packed, read_logits
