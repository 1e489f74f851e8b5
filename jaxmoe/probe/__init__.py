"""Measurement of devices and interconnects, as a hardware file."""
