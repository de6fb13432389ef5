"""Tools for tests of code that runs on accelerators, usable without one."""

from tempering.testing.simdevice import SimulatedTensor, simulated_device

__all__ = ["SimulatedTensor", "simulated_device"]
