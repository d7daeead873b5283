"""The parts of ``benchmarks/speed.py``: what is timed, against what, and how it is told."""
