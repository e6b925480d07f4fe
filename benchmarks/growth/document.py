from store import ROOT

DOCUMENT = ROOT / "docs" / "growth.md"


def write():
    pass
