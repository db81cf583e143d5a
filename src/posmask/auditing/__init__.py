"""Audit of any SAE: which features depend on position, where reconstruction fails, and what codes know of order."""

from posmask.auditing.result import AuditReport, read_audit
from posmask.auditing.run import audit, audit_all

__all__ = ["AuditReport", "audit", "audit_all", "read_audit"]
