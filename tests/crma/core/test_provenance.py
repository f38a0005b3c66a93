"""crma.core.provenance: which machines compute alike."""

from crma.core.provenance import hardware, machine_class

CPU = {"cpu": "A", "cores": 2, "threads": 1, "capability": "AVX2", "gpu": None}


def test_a_class_is_the_processor_and_what_torch_uses_of_it_but_not_its_size() -> None:
    assert machine_class(CPU) == machine_class(CPU | {"cores": 64, "threads": 8})
    assert machine_class(CPU) != machine_class(CPU | {"cpu": "B"})
    assert machine_class(CPU) != machine_class(CPU | {"capability": "AVX512"})
    assert machine_class(hardware()).keys() == {"cpu", "capability", "gpu"}


def test_where_there_is_a_gpu_only_that_counts() -> None:
    one = CPU | {"gpu": "H100"}
    assert machine_class(one) == machine_class(one | {"cpu": "B", "capability": "AVX512"})
    assert machine_class(one) != machine_class(one | {"gpu": "H200"})
    assert machine_class(one) != machine_class(CPU)
