"""The engine: `core` is the mathematics, `kernels` its fast spellings, `adapters` the seam to ComfyUI."""
