"""The audit: what must be true and the schema cannot hold by itself, each as a query that a violation shows up in.

It only reads, in short transactions of one chunk each, and repairs nothing. `audit` looks at everything;
the hourly pass of engine/audit.py looks at what was written since the last one, by the same queries.
"""

from nightmail.store.audit.invariant import SAMPLE, Finding, Invariant, Scope
from nightmail.store.audit.walk import INVARIANTS, Progress, audit

__all__ = ["INVARIANTS", "SAMPLE", "Finding", "Invariant", "Progress", "Scope", "audit"]
