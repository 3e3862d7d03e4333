"""Experiments: comparisons, single trainings, benchmarks, tasks and reports. Only the command line imports it."""
