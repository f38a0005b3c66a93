"""crma.training.tables: the table of an experiment's records."""

from typing import Any

from crma.training.tables import arms_table


def record(seed: int, loss: float, drift: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "mean_loss": loss,
        "mean_drift": drift,
        "drift": [drift, drift + 1, 0],
        "ACC": 0.5,
        "BWT": -0.1,
        "FWT": 0.0,
    }


def test_a_run_is_compared_with_the_control_at_the_same_seed() -> None:
    records = {f"FROZEN-matched-seed{seed}": record(seed, 1.0 + seed, 0.0) for seed in (0, 1)}
    records["MODULAR-seed0"] = record(0, 0.9, 0.1)
    records["MODULAR-seed1"] = record(1, 1.6, 0.3)
    records["alone-seed2"] = record(2, 0.9, 0.1) | {"mean_drift": None, "BWT": None}
    _, _, control, modular, alone = arms_table(records).splitlines()
    assert "| +0.0 [+0.0, +0.0]<br>(+0.0, +0.0) |" in control
    assert "| 0, 1 | +0.20 [-1.07, +1.47]<br>(+0.10, +0.30) | +1.30 | 0.1 |" in modular
    assert "(+10.0, +20.0) | 0.500 [" in modular
    assert "| 2 | – | – | – | 0.9000 | – | 0.500 | – | 0.000 |" in alone
