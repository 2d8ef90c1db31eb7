"""What is known of mechanisms, tasks, workloads and devices beside their rows, as plain values.

The command line makes it from Specs, which need torch; the site only reads it, and builds without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Catalogue:
    """Facts by name, as :func:`attnbench.harness.catalogue.catalogue` gives them."""

    mechanisms: Mapping[str, Entry] = field(default_factory=dict)
    tasks: Mapping[str, Entry] = field(default_factory=dict)
    workloads: Mapping[str, Entry] = field(default_factory=dict)
    devices: Mapping[str, Entry] = field(default_factory=dict)
