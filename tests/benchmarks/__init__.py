"""Measurements, one module each. They compare rates, so all of them have oneDNN on."""

from labkit.machine import fast_cpu

fast_cpu()
