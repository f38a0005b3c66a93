"""docker/alerts.yml, by promtool's unit tests: what sets off each alert, and that it ends.

Debian's package `prometheus` has promtool.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from paths import ROOT

ALERTS = ROOT / "docker" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    for rule in group["rules"]
}
INSTANCE = {"instance": "a"}

Series = dict[str, str]  # a series -> its values, one a minute, in promtool's notation


class Case(NamedTuple):
    """What sets off an alert.

    Attributes:
        series: begin well, go wrong after minute 10, and are well again after minute 30.
        labels: of the alert, beside those of its rule.
        wrong_at: a minute at which it fires.
        well_at: a minute at which it does not fire any more.
    """

    series: Series
    labels: dict[str, str] = INSTANCE
    wrong_at: int = 30
    well_at: int = 45


def steady(rate: int) -> str:
    """A counter that grows by the same number every minute."""
    return f"0+{rate}x60"


def bursts(rate: int) -> str:
    """A counter that grows by so much a minute from minute 10 to minute 30."""
    return f"0x10 {rate}+{rate}x19 {rate * 20}x30"


def level(well: float, wrong: float) -> str:
    """A gauge that is wrong from minute 11 to minute 30."""
    return f"{well}x10 {wrong}x19 {well}x30"


def histogram(name: str, slow_le: str) -> Series:
    """60 quick observations a minute, and 60 beyond the bucket `slow_le` while it goes wrong."""
    all_observations = "0+60x10 720+120x19 3060+60x30"
    return {
        f'{name}_bucket{{instance="a",le="0.3"}}': steady(60),
        f'{name}_bucket{{instance="a",le="{slow_le}"}}': steady(60),
        f'{name}_bucket{{instance="a",le="60.0"}}': all_observations,
        f'{name}_bucket{{instance="a",le="+Inf"}}': all_observations,
    }


ANSWERS = {'crma_http_responses_total{instance="a",route="/generate",status="200"}': steady(600)}
PROBES = {'crma_http_responses_total{instance="a",route="/metrics",status="200"}': steady(6000)}
REQUESTS = {'crma_request_success_total{instance="a",finished_reason="stop"}': steady(600)}

CASES = {
    "CrmaDown": Case({'up{job="crma",instance="a"}': level(1, 0)}, {"job": "crma", **INSTANCE}),
    "CrmaAdapterVerificationFailed": Case({'crma_store_problems{instance="a"}': level(0, 1)}),
    "CrmaTaskCannotServe": Case({'crma_tasks_unable{instance="a"}': level(0, 2)}),
    "CrmaPromotionDrift": Case(
        {
            'crma_promotion_drift_ratio{instance="a",adapter="legal"}': level(0.01, 0.03),
            'crma_promotion_drift_ratio{instance="a",adapter="code"}': level(0.0, 0.015),
        },
        {"adapter": "legal", **INSTANCE},
    ),
    "CrmaServerErrors": Case(
        {
            **ANSWERS,
            **PROBES,
            'crma_errors_total{instance="a",code="generation_failed"}': bursts(20),
        }
    ),
    "CrmaRequestsFail": Case(
        {'crma_request_success_total{instance="a",finished_reason="error"}': "0x29 1x40"},
        wrong_at=31,
    ),
    "CrmaRefusesRequests": Case(
        {**ANSWERS, **PROBES, 'crma_errors_total{instance="a",code="queue_full"}': bursts(60)}
    ),
    "CrmaDeadlinesMissed": Case(
        {**REQUESTS, 'crma_deadlines_missed_total{instance="a",set_by="server"}': bursts(30)}
    ),
    "CrmaQueueStands": Case(histogram("crma_request_queue_time_seconds", "10.0")),
    "CrmaSlowFirstToken": Case(histogram("crma_time_to_first_token_seconds", "5.0")),
    "CrmaAdaptersThrash": Case({'crma_adapter_evictions_total{instance="a"}': bursts(60)}),
    "CrmaKvCacheFull": Case({'crma_num_preemptions_total{instance="a"}': bursts(30)}),
    "CrmaActNotRecorded": Case(
        {
            'crma_record_failures_total{instance="a",record="audit"}': "0x20 1x40",
            'crma_record_failures_total{instance="a",record="audit_log"}': "0x60",
        },
        {"record": "audit", **INSTANCE},
        well_at=50,
    ),
    "CrmaUsageNotRecorded": Case(
        {'crma_record_failures_total{instance="a",record="usage"}': bursts(12)}
    ),
    "CrmaDiskFull": Case(
        {
            'crma_disk_free_bytes{instance="a",folder="store"}': level(50, 5),
            'crma_disk_size_bytes{instance="a",folder="store"}': "100x60",
        },
        {"folder": "store", **INSTANCE},
    ),
}

HARMLESS = {
    **ANSWERS,
    **REQUESTS,
    'up{job="crma",instance="a"}': "1x60",
    'crma_http_responses_total{instance="a",route="/generate",status="504"}': steady(6000),
    'crma_http_responses_total{instance="a",route="/generate",status="429"}': steady(6000),
    'crma_deadlines_missed_total{instance="a",set_by="client"}': steady(6000),
    'crma_deadlines_missed_total{instance="a",set_by="server"}': "0x60",
    'crma_errors_total{instance="a",code="deadline_exceeded"}': steady(6000),
    'crma_errors_total{instance="a",code="constraint_stuck"}': steady(6000),
    'crma_errors_total{instance="a",code="invalid_field"}': steady(6000),
    'crma_errors_total{instance="a",code="too_many_jobs"}': steady(6000),
    'crma_errors_total{instance="a",code="client_gone"}': steady(6000),
    'crma_errors_total{instance="a",code="draining"}': steady(6000),
    'crma_errors_total{instance="a",code="server_stopped"}': steady(6000),
    'crma_errors_total{instance="a",code="internal_error"}': "0x60",
    'crma_errors_total{instance="a",code="queue_full"}': "0x60",
    'crma_request_success_total{instance="a",finished_reason="abort"}': steady(6000),
    'crma_request_success_total{instance="a",finished_reason="error"}': "0x60",
    'crma_num_requests_waiting{instance="a"}': "8x60",
    'crma_record_failures_total{instance="a",record="audit"}': "0x60",
    'crma_record_failures_total{instance="a",record="audit_log"}': "0x60",
    'crma_record_failures_total{instance="a",record="usage"}': "0x20 1x40",
}
"""One client sends nothing but what must fail, as fast as it can; and an ablation waits."""


def test_every_alert_has_a_unit_test() -> None:
    assert CASES.keys() == RULES.keys()


def run_promtool(folder: Path, series: Series, checks: list[dict[str, Any]]) -> None:
    """Check the alerts that fire at given minutes."""
    assert PROMTOOL is not None
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    case = {"interval": "1m", "input_series": inputs, "alert_rule_test": checks}
    file = folder / "test.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]})
    )
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check(name: str, minute: int, *alerts: dict[str, str]) -> dict[str, Any]:
    """What promtool expects of an alert at a minute: one for each set of labels."""
    rule = RULES[name]
    expected = []
    for labels in alerts:
        all_labels = {**labels, **rule["labels"]}
        expected.append({"exp_labels": all_labels, "exp_annotations": rule["annotations"]})
    return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected}


needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus"
)


@pytest.mark.e2e
@needs_promtool
@pytest.mark.parametrize("name", CASES)
def test_the_alert_fires_while_it_goes_wrong_and_ends(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    checks = [
        check(name, 9),
        check(name, case.wrong_at, case.labels),
        check(name, case.well_at),
    ]
    run_promtool(tmp_path, case.series, checks)


@pytest.mark.e2e
@needs_promtool
def test_no_client_sets_off_an_alert_by_what_it_sends(tmp_path: Path) -> None:
    """Requests with `timeout_s: 0.001` set off CrmaServerErrors, which is critical."""
    checks = [check(name, minute) for name in RULES for minute in (5, 20, 55)]
    run_promtool(tmp_path, HARMLESS, checks)
