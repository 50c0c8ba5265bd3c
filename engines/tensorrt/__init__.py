"""TensorRT and TensorRT-RTX: `library` chooses one of them, `compiler` builds plans with it, `backend` runs them."""
