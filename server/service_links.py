"""The variables that Kubernetes sets in every pod for a Service.

For a Service named `crma` they are CRMA_SERVICE_HOST, CRMA_PORT=tcp://10.0.0.1:8000,
CRMA_PORT_8000_TCP_ADDR and so on; for `crma-blue` they begin with CRMA_BLUE. They look like
settings of this server, and `enableServiceLinks: false` in the pod's specification turns them off.
"""

import re
from collections.abc import Mapping

_ADDRESS = r"(tcp|udp|sctp)://\S+:\d+"
_FAMILY = r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"


def service_links(environment: Mapping[str, str], prefix: str) -> list[str]:
    """The names of the variables that Kubernetes set for Services, sorted.

    A family counts only where both of its fixed members are there: the host, and an address such as
    tcp://10.0.0.1:8000 as the port. So a mistyped setting is never taken for one.

    Args:
        environment: name -> value.
        prefix: only Services whose variables begin with it, such as "CRMA_".
    """
    found = set()
    for name, value in environment.items():
        service, _, rest = name.rpartition("PORT")
        is_address = not rest and service.startswith(prefix) and re.fullmatch(_ADDRESS, value)
        if is_address and f"{service}SERVICE_HOST" in environment:
            member = re.compile(re.escape(service) + f"({_FAMILY})")
            found |= {other for other in environment if member.fullmatch(other)}
    return sorted(found)
