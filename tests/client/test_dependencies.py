"""The client depends on httpx and on nothing else."""

import sys

import grimp


def test_the_client_imports_httpx_only() -> None:
    graph = grimp.build_graph("crma_client", include_external_packages=True, cache_dir=None)
    packages = {name.split(".")[0] for name in graph.modules} - {"crma_client"}
    third_party = packages - sys.stdlib_module_names
    types_only = {"typing_extensions"}
    assert third_party == {"httpx"} | types_only
