"""The variables that Kubernetes sets in every pod for a Service.

For a Service named `crma` they are CRMA_SERVICE_HOST, CRMA_PORT=tcp://10.0.0.1:8000,
CRMA_PORT_8000_TCP_ADDR and so on; for `crma-blue` they begin with CRMA_BLUE. They look like
settings of this server. `enableServiceLinks: false` in the pod's specification turns them off.
"""

import re
from collections.abc import Mapping

_HOST = "SERVICE_HOST"
_FAMILY = re.compile(
    r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def service_links(environment: Mapping[str, str], prefix: str) -> list[str]:
    """The names of the variables that Kubernetes set for Services, sorted.

    A family counts only where both of the variables that every Service has are there: its host and
    its port. So a mistyped setting is never taken for one. `<family>_PORT` is one of them only if
    it is an address: otherwise somebody has set it.

    Args:
        environment: name -> value.
        prefix: only Services whose variables begin with it, such as "CRMA_".
    """
    found = set()
    for name in environment:
        family = name.removesuffix(_HOST)
        if family == name or not family.startswith(prefix):
            continue
        if not environment.get(f"{family}SERVICE_PORT", "").isdecimal():
            continue
        members = {
            other
            for other in environment
            if other.startswith(family) and _FAMILY.fullmatch(other.removeprefix(family))
        }
        if not _ADDRESS.fullmatch(environment.get(f"{family}PORT", "")):
            members.discard(f"{family}PORT")
        found |= members
    return sorted(found)
