"""Guard rails as the options of a command ask for them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from llava.serve.audit import AuditLog
from llava.serve.gate import GateSettings
from llava.serve.keys import KeyRing, read_cluster_key
from llava.serve.options import check_guards, host_of, public_hosts


def gate_settings(args: argparse.Namespace, *, urls: Iterable[str] = (), marks_audited: bool = False) -> GateSettings:
    """Return the guard rails of a server that is also reached under `urls`.

    Raises:
        ConfigError: an option is wrong, or a file of keys can be read by others.
        DataError: the audit file cannot be written.
    """
    check_guards(args)
    own = {host for url in urls if (host := host_of(url))}
    return GateSettings(
        hosts=public_hosts(args) | own,
        keys=KeyRing(args.api_keys),
        cluster_key=read_cluster_key(args.cluster_key) if args.cluster_key is not None else "",
        max_body_bytes=round(args.max_body_mb * (1 << 20)),
        audit=AuditLog(args.audit_file),
        marks_audited=marks_audited,
    )
