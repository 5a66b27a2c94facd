"""Where blocks live: on the device, in host memory, on disk."""
