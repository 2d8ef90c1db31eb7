"""From a plan to measured rows: plan, worker processes, measurement, journal."""
