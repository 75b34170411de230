"""From csrc/ to torch ops: build (`jit`), choose (`select`), call (`ops`). Importing any of it compiles nothing."""
