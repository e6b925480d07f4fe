"""What a registry cannot be asked through its port: which names there are, a page of a search, a guarded move.

Exits 1 while one of them is missing, 0 once all are there.
"""
import inspect, sys
from esper.contracts.ports import RangedSource, Registry, SearchCriteria, TagMove

missing = []
if not any(hasattr(Registry, n) for n in ("names", "tags", "list_names", "list_tags")):
    missing.append("list the names and tags")
if not {"limit", "page_size"} & set(inspect.signature(Registry.search).parameters):
    missing.append("a page of a search (limit, cursor)")
if not {"expected", "expect", "if_at"} & set(inspect.signature(Registry.tag).parameters):
    missing.append("move a tag only if it still points where I saw it")
if not {"actor", "moved_by"} & set(TagMove.__dataclass_fields__):
    missing.append("who moved a tag")
if not {"kind", "input_spec", "in_features", "max_size_bytes"} & set(SearchCriteria.__annotations__):
    missing.append("search by what fits a site (shape, dtype, size)")
if not any(hasattr(Registry, n) for n in ("report_outcome", "add_outcome", "record_outcome", "annotate")):
    missing.append("field reports, validation report, deprecation: anything said of an artifact after its publication")
if len([n for n in dir(RangedSource) if not n.startswith("_")]) < 2:
    missing.append("a range or a stream of an artifact (resume, cap before memory)")
for line in missing:
    print("missing:", line)
sys.exit(1 if missing else 0)
