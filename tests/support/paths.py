"""Where the files of the repository are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
NETS = SUPPORT / "nets.py"
RESNET20 = f"{ROOT / 'examples' / 'resnet20_cifar10.py'}:resnet20"
