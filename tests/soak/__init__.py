"""The parts of tests/e2e/test_soak.py: clients, churn and faults, and what they measure."""
