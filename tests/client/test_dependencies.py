"""The client installs with httpx and nothing else."""

import sys

import grimp


def test_the_client_imports_httpx_only() -> None:
    graph = grimp.build_graph("crma_client", include_external_packages=True, cache_dir=None)
    external = {name.split(".")[0] for name in graph.modules} - {"crma_client"}
    third_party = external - sys.stdlib_module_names
    assert third_party == {"httpx", "typing_extensions"}  # the second for types only
