"""Where things are on the site: the one place that turns names from data into paths and anchors."""

from __future__ import annotations

import hashlib
import re
from functools import cache

from attnbench.results.aggregate import Summary
from attnbench.site.views.case import Case, case_of


@cache
def slug(name: str) -> str:
    """``name`` as a file name or anchor: itself where that is safe, else its safe characters and a hash."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:60]
    return name if name and safe == name else f"{safe or 'x'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def impl_page(mechanism: str) -> str:
    """Page of a mechanism."""
    return f"impl/{slug(mechanism)}.html"


def task_page(task: str) -> str:
    """Page of a task."""
    return f"task/{slug(task)}.html"


def device_page(device: str) -> str:
    """Page of a device."""
    return f"gpu/{slug(device)}.html"


def run_page(run_id: str) -> str:
    """Page of a run."""
    return f"run/{slug(run_id)}.html"


def evidence_page(run_id: str, mechanism: str) -> str:
    """Page with everything that one run recorded of one mechanism."""
    return f"run/{slug(run_id)}/{slug(mechanism)}.html"


def impl_slug(label: str, mechanism: str) -> str:
    """What an anchor calls the impl ``label``, on a page of its mechanism: backend and hyper-parameters."""
    return slug(label.removeprefix(f"{mechanism}/"))


def anchor(case: Case, label: str, mechanism: str) -> str:
    """Anchor of one impl on one case on its evidence page. The script of the pages builds the same."""
    parts = (impl_slug(label, mechanism), case.device, case.workload, case.pattern, case.scope, case.dtype)
    rest = (case.direction, case.size, f"s{case.seed}")
    return "_".join(map(slug, (*parts, *rest)))


def evidence(s: Summary) -> str:
    """The place that shows how a summary was measured: page and anchor in its newest run."""
    mechanism = str(s.get("mechanism"))
    if s.get("scope") == "task":
        name = slug(f"{s.get('task') or s.get('suite')}")
        where = f"{impl_slug(s.label, mechanism)}_task_{name}_{slug(str(s.get('preset')))}_s{s.get('seed')}"
    else:
        where = anchor(case_of(s), s.label, mechanism)
    return f"{evidence_page(s.run_ids[0], mechanism)}#{where}"
