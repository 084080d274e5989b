"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# Derandomised: the same examples everywhere, so that a failure is never a matter of luck; no deadlines and no
# health check by the clock, because the machines are shared.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
