"""The parts of scripts/gpu_suite.py: each a module with `run(settings, report)`, run in a process of its own."""
