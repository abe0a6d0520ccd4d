"""Execution: sessions on a device, the artifact format, timing, kernel costs."""
