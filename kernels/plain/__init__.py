"""Every operation in plain torch: correct on any device, decently fast on a CPU, the reference for fused versions."""
