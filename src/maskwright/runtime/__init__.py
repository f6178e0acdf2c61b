"""The machine and the operating system: devices, background work, atomic files."""
